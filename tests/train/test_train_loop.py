"""THE loop: it learns, it stops cleanly, and it goes on as if it had not stopped, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
import torch
from tiny_training import decoder, equal, rows, samples, weights

from pellucid import events
from pellucid.data.packing import Batches, pack_samples
from pellucid.errors import BadInput, Interrupted
from pellucid.optim import OptimConfig, Schedule
from pellucid.train import Loop, LoopConfig, language_loss, stop_requested

OPTIM = {"muon": OptimConfig("muon", lr=0.02, weight_decay=0.01), "adamw": OptimConfig("adamw", lr=3e-3)}


def config(name="muon", **changes):
    fields = dict(steps=8, rows=5, micro_rows=2, optim=OPTIM[name], schedule=Schedule(warmup=0.2), evaluations=4, seed=3)
    return LoopConfig(**(fields | changes))


def loop(cfg, folder=None, model_seed=0, evaluate=None, data=None):
    return Loop(decoder(model_seed), data or rows(), cfg, evaluate=evaluate, checkpoint=folder, resume_hint="run --resume")


def evaluation():
    return "loss", random.random() + float(torch.rand(())), {}  # draws from both global generators


def interrupted_at(step, running, number=signal.SIGINT):
    """Runs until a signal arrives in that step."""

    def reader(record):
        if record.kind == "step" and record.step == step:
            os.kill(os.getpid(), number)

    with events.subscribed(reader), pytest.raises(Interrupted) as caught:
        running.run()
    return caught.value


def state_of(running):
    names = {p: n for n, p in running.model.named_parameters()}
    return running.stepper.optimizer.state_tensors(names)


# --- exact resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIM)
@pytest.mark.parametrize("stops", [(4,), (1, 2, 7), (8,)], ids=str)
def test_a_run_that_stops_and_goes_on_equals_one_that_does_not_bit_for_bit(name, stops, tmp_path):
    torch.manual_seed(1)
    random.seed(1)
    straight = loop(config(name), evaluate=evaluation)
    history = straight.run()
    assert [round(p, 3) for p, _ in history.evaluations] == [0.25, 0.5, 0.75, 1.0]

    torch.manual_seed(1)
    random.seed(1)
    broken = loop(config(name), tmp_path / "state", evaluate=evaluation)
    for number, step in enumerate(stops):
        interrupted_at(step, broken)
        torch.manual_seed(99 + number)  # a new process has generators of its own
        random.seed(99 + number)
        broken = loop(config(name), tmp_path / "state", model_seed=50 + number, evaluate=evaluation)
        assert broken.resume()
    again = broken.run()

    assert equal(weights(straight.model), weights(broken.model))
    a, b = state_of(straight), state_of(broken)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (again.steps, again.tokens, again.losses, again.evaluations) == (
        history.steps, history.tokens, history.losses, history.evaluations)
    assert not broken.model.training


def test_data_of_another_run_is_refused(tmp_path):
    interrupted_at(2, loop(config(), tmp_path / "state"))
    for other in (loop(config(seed=4), tmp_path / "state"), loop(config(), tmp_path / "state", data=rows(seed=8))):
        with pytest.raises(BadInput, match="cannot resume"):
            other.resume()
    with pytest.raises(BadInput, match="optimizer"):
        loop(config("adamw"), tmp_path / "state").resume()


def test_nothing_to_resume_is_no_error(tmp_path):
    assert not loop(config(), tmp_path / "state").resume()
    assert not loop(config()).resume()


def test_seconds_before_the_interruption_count(tmp_path):
    first = loop(config(steps=None, seconds=60.0), tmp_path / "state")
    interrupted_at(3, first)
    second = loop(config(steps=None, seconds=60.0), tmp_path / "state")
    second.resume()
    assert second.history.seconds == first.history.seconds > 0
    assert second.budget.spent == first.history.seconds and second.budget.done == 3


def test_skipped_steps_before_the_interruption_count(tmp_path):
    first = loop(config(), tmp_path / "state")
    first.stepper.skipped = 2
    interrupted_at(3, first)
    second = loop(config(), tmp_path / "state")
    second.resume()
    assert second.history.skipped == second.stepper.skipped == 2
    assert second.run().skipped == 2


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(number, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    running = loop(config(), tmp_path / "state")
    error = interrupted_at(3, running, number)
    assert isinstance(error, KeyboardInterrupt) and error.exit_code == 130
    assert error.next == "run --resume" and "step 3" in error.what
    assert (tmp_path / "state" / "state.json").exists()
    assert running.history.steps == 3
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_without_a_folder_the_message_does_not_promise_anything():
    error = interrupted_at(1, loop(config()))
    assert "saved" not in error.what and not error.next


def test_a_signal_in_the_last_evaluation_saves_too(tmp_path):
    def slow():
        if running.budget.over:
            os.kill(os.getpid(), signal.SIGINT)
        return "loss", 1.0, {}

    running = loop(config(), tmp_path / "state", evaluate=slow)
    with pytest.raises(Interrupted):
        running.run()
    after = weights(running.model)
    running = loop(config(), tmp_path / "state", model_seed=7, evaluate=lambda: pytest.fail("evaluated twice"))
    assert running.resume()
    history = running.run()
    assert equal(weights(running.model), after)
    assert [p for p, _ in history.evaluations] == [0.25, 0.5, 0.75, 1.0]


def test_a_second_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt) as caught, stop_requested() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")
    assert not isinstance(caught.value, Interrupted)


def test_in_a_thread_the_loop_runs_without_signal_handlers():
    histories = []
    thread = threading.Thread(target=lambda: histories.append(loop(config(steps=2)).run()))
    thread.start()
    thread.join()
    assert histories[0].steps == 2


def test_a_state_is_saved_every_so_often(tmp_path):
    saved = []
    running = loop(config(save_seconds=1e-9), tmp_path / "state")
    save = running.save
    running.save = lambda: (save(), saved.append(running.history.steps))
    running.run()
    assert saved == list(range(1, 9))
    other = loop(config(), tmp_path / "state", model_seed=5)
    assert other.resume() and other.history.steps == 8
    assert equal(weights(other.model), weights(running.model))


# --- the run ----------------------------------------------------------------------------------------------------------


def test_micro_batches_change_memory_and_nothing_else():
    runs = [loop(config(micro_rows=m)) for m in (None, 1, 2, 5, 100)]
    losses = [[loss for _, loss in r.run().losses] for r in runs]
    for other, run in zip(losses[1:], runs[1:]):
        assert other == pytest.approx(losses[0], rel=1e-3)
        for a, b in zip(weights(runs[0].model), weights(run.model)):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=0)
    with pytest.raises(BadInput, match="micro_rows"):
        loop(config(micro_rows=0))


def test_it_learns_to_count():
    """Rows count up by 1, 2 or 3 modulo 60: what comes next is certain from the third token on."""
    data = pack_samples(samples(400, seed=1), 32)
    history = loop(config(steps=90, rows=12, micro_rows=None, evaluations=0), data=data).run()
    losses = [loss for _, loss in history.losses]
    assert sum(losses[:3]) / 3 > 3.0
    assert sum(losses[-10:]) / 10 < 1.0, losses[-10:]


def test_every_step_is_an_event_with_the_numbers_to_look_at():
    seen = []
    with events.subscribed(seen.append):
        running = loop(config(), evaluate=lambda: ("bits per byte", 2.5, {"by": "hand"}))
        history = running.run()
    steps = [r for r in seen if r.kind == "step"]
    assert [r.step for r in steps] == list(range(1, 9)) and steps[-1].progress == 1.0
    assert [r.metrics["loss"] for r in steps] == [loss for _, loss in history.losses]
    assert all(r.metrics["grad_norm"] > 0 and r.metrics["tokens_per_second"] > 0 for r in steps)
    assert history.tokens == 8 * 5 * 32
    # Warm-up over the first fifth, then full, then the last two fifths down to 0 (progress BEFORE the step).
    factors = [0.001, 0.625, 1, 1, 1, 0.9375, 0.625, 0.3125]
    assert [r.metrics["lr"] for r in steps] == pytest.approx([0.02 * f for f in factors])
    evaluations = [r for r in seen if r.kind == "evaluation"]
    assert [(r.name, r.value) for r in evaluations] == [("bits per byte", 2.5)] * 4


def test_without_evaluations_none_is_made():
    history = loop(config(evaluations=0), evaluate=lambda: pytest.fail("evaluated")).run()
    assert history.evaluations == []


def test_the_data_come_in_the_order_of_the_seed():
    running, packed = loop(config(seed=11)), rows()
    expected = Batches(packed, 5, seed=11)
    seen = []
    step = running.stepper.step
    running.stepper.step = lambda micro, *rest: step(seen.extend(m := list(micro)) or m, *rest)
    running.run()
    got = torch.cat([m.tokens for m in seen])
    assert torch.equal(got, torch.cat([expected.next().tokens for _ in range(8)]))


@pytest.mark.parametrize("micro", [None, 2])
def test_the_loss_of_a_step_is_the_mean_over_the_labels_of_its_rows(micro):
    batch = Batches(rows(), 5, seed=3).next()
    with torch.no_grad():
        nats, count = language_loss(decoder(), batch)
    running = loop(config(steps=1, micro_rows=micro))
    ((progress, loss),) = running.run().losses
    assert progress == 0.0 and loss == pytest.approx(float(nats) / count, rel=1e-5)


def test_a_run_of_seconds_ends_in_time():
    began = time.monotonic()
    history = loop(config(steps=None, seconds=0.5, evaluations=0)).run()
    assert 0.5 <= history.seconds <= time.monotonic() - began and history.steps >= 1
    assert history.losses[-1][0] < 1.0


def test_a_resumed_run_has_the_seconds_that_were_left(tmp_path):
    limits = dict(steps=None, seconds=0.5)
    first = loop(config(**limits), tmp_path / "c")
    first.history.steps, first.history.seconds = 7, 0.5
    first.save()
    resumed = loop(config(**limits), tmp_path / "c")
    assert resumed.resume() and resumed.run().steps == 7
