"""Samples made beside the update: the run of the same lag without overlap, bit for bit, whoever is faster; its ends and its errors."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from test_online import PLAIN, config, interrupted_at, loop
from test_online_presets import ALL, equal
from tiny_policy import Noise, policy, weights

from pellucid import events
from pellucid.align.beside import Beside
from pellucid.align.estimate import memory
from pellucid.align.rewards import Reward, RewardSet
from pellucid.align.sampling import Sampling
from pellucid.errors import PellucidError
from pellucid.models.lora import LoraConfig, attach
from pellucid.optim import OptimConfig

KEPT = replace(PLAIN, dead_groups="keep")
CASES = {
    "one step off": dict(objective=KEPT),
    "truncated": dict(objective=replace(KEPT, correction="truncate", correction_low=0.5, correction_high=1.2), updates=2, epochs=2),
    "masked by sequence": dict(objective=replace(KEPT, correction="mask", correction_level="sequence", correction_high=1.05)),
    "two steps off": dict(objective=replace(PLAIN, correction="truncate"), lag=2, steps=6),
    "sampled again": dict(objective=PLAIN, rounds=4),
    "critic, controllers": dict(objective=ALL, updates=2),
    "nucleus": dict(objective=replace(KEPT, correction="truncate"), top_p=0.8),
    "adapters": dict(objective=replace(KEPT, beta=0.1)),
    "bfloat16": dict(objective=replace(KEPT, correction="truncate")),
}
TIMED = {"time/sampling", "time/waiting", "speed/sampled", "speed/trained", "memory/peak"}


def settings(name: str = "one step off", **changes):
    fields = dict(lag=1, steps=4, clip=1.0, optim=OptimConfig("adamw", lr=0.01))
    return config(**(fields | CASES[name] | changes))


def made(name: str = "one step off", hook=None, **changes):
    """A loop; hook: called with it before it runs."""
    model = policy()
    if name == "adapters":
        attach(model, LoraConfig(2), 0)
    if name == "bfloat16":
        model.compute_dtype = torch.bfloat16
    how = {k: changes.pop(k) for k in ("checkpoint", "rewards", "evaluate") if k in changes}
    running = loop(settings(name, **changes), task=Noise(flat="0246" if name == "sampled again" else ""), model=model, **how)
    if hook:
        hook(running)
    return running


def told(running):
    """All that a run gave, but for its times; numbers as text, in which NaN equals itself."""
    h = running.history
    tables = [(p, {k: repr(v) for k, v in m.items() if k not in TIMED}) for p, m in h.metrics]
    return tables, h.sampled, h.steps, running.shown_groups, running.sampling.source(), (running.beta, running.reward_beta, running.bonus)


def same(one, other):
    assert equal(weights(one.model), weights(other.model)) and told(one) == told(other)
    if one.critic is not None:
        assert equal(weights(one.critic.model), weights(other.critic.model))


@pytest.fixture(scope="module")
def sequential():
    """The runs without overlap, each made once."""
    known = {}

    def of(name):
        if name not in known:
            known[name] = made(name, overlap=False)
            known[name].run()
        return known[name]

    return of


def first_the_update(running):
    """What is sampled beside waits until the update is done: the weights it must not see are there."""
    updated, update, groups = threading.Event(), running._update, running.rollouts.groups
    first = threading.current_thread()

    def waiting(*args, **how):
        if threading.current_thread() is not first:
            assert updated.wait(20)
        return groups(*args, **how)

    def updating(*args):
        updated.clear()
        try:
            return update(*args)
        finally:
            updated.set()

    running._update, running.rollouts.groups = updating, waiting


def first_the_samples(running):
    """The update waits until all is sampled."""
    update = running._update

    def updating(*args):
        if running.sampling.beside is not None:
            running.sampling.beside._thread.join(20)
        return update(*args)

    running._update = updating


HOOKS = {"as they come": None, "update first": first_the_update, "samples first": first_the_samples}
ORDERS = [(name, "as they come") for name in CASES] + [
    (name, hook) for name in ("one step off", "truncated", "two steps off", "adapters", "bfloat16") for hook in list(HOOKS)[1:]]


@pytest.mark.parametrize(("name", "hook"), ORDERS, ids=", ".join)
def test_overlap_changes_nothing(name, hook, sequential):
    running = made(name, HOOKS[hook])
    running.run()
    same(running, sequential(name))
    assert not equal(weights(running.model), weights(made(name).model))
    assert running.sampling.beside is None and not running.sampling.ahead


def test_the_lag_is_real(sequential):
    """Fresh samples give another run; the age of the weights stands in the table, and a correction acts on it."""
    fresh = made(lag=0)
    fresh.run()
    assert not equal(weights(fresh.model), weights(sequential("one step off").model))
    assert [m["staleness/steps"] for _, m in sequential("one step off").history.metrics] == [0, 1, 1, 1]
    assert [m["staleness/steps"] for _, m in sequential("two steps off").history.metrics] == [0, 1, 2, 2, 2, 2]
    assert "staleness/steps" not in fresh.history.metrics[0][1]
    tables = [m for _, m in sequential("masked by sequence").history.metrics]
    assert tables[0]["correction/dropped"] == 0 < tables[1]["correction/dropped"]


def test_both_halves_run_at_the_same_time():
    """A reward that waits for the update to begin, and an update that waits for the reward: one behind the other they would never end."""
    grading, learning = threading.Event(), threading.Event()

    def reward(completions, **columns):
        if running.latest is not None or running.sampling.beside is not None:  # not the first rollout, which nothing is beside of
            grading.set()
            assert learning.wait(20)
        return [float(len(text)) for text in completions]

    running = made(rewards=RewardSet([Reward("length", reward)]), steps=2)
    judge = running._judge

    def judging(*args):
        learning.set()
        assert grading.wait(20)
        return judge(*args)

    running._judge = judging
    table = running.run().metrics[-1][1]
    assert table["reward/length/mean"] > 0 and 0 <= table["time/waiting"] < 1


def test_readers_are_called_in_one_thread_and_in_one_order():
    runs = []
    for hook in (None, None, first_the_update):
        seen = []

        def reader(event, seen=seen):
            assert threading.current_thread() is threading.main_thread()
            seen.append((event.kind, getattr(event, "means", None)))

        running = made(hook=hook)
        with events.subscribed(reader):
            running.run()
        runs.append(seen)
    assert runs[0] == runs[1] == runs[2] and [kind for kind, _ in runs[0]].count("graded") == 4


# --- stop and go on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["truncated", "two steps off"])
def test_a_run_that_was_stopped_goes_on_with_overlap_or_without(name, sequential, tmp_path):
    overlap, running = True, made(name, checkpoint=tmp_path / "state")
    for step in (1, 2, 3):
        interrupted_at(step, running)
        assert running.sampling.beside is None
        overlap = not overlap
        running = made(name, checkpoint=tmp_path / "state", overlap=overlap)
        assert running.resume()
    running.run()
    same(running, sequential(name))


def test_an_evaluation_finds_nothing_beside_it():
    def evaluate():
        assert running.sampling.beside is None and not running.rollouts._held
        return "nothing", 0.0, {}

    running = made(evaluate=evaluate, evaluations=4)
    assert len(running.run().evaluations) == 4


def beside():
    return [t for t in threading.enumerate() if t.name == "pellucid beside"]


def test_a_second_signal_ends_what_runs_beside(sequential):
    """At once, in the middle of a step; and whoever goes on with the loop all the same (a notebook) gets the run that was begun."""
    running = made()
    update = running._update

    def interrupted(*args):
        running._update = update
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    running.step(0.0)
    source = running.sampling.source()
    waiting = list(running.sampling.ahead)
    running._update = interrupted
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        running.run()
    assert time.monotonic() - began < 5 and not beside()
    assert running.sampling.source() == source and running.sampling.beside is None and not running.rollouts._held
    running.sampling.ahead.extend(waiting)  # what the interrupted step had begun to learn from
    while running.budget.done < 4:
        running.step(running.budget.done / 4)
    assert equal(weights(running.model), weights(sequential("one step off").model))


def test_an_update_that_fails_ends_what_runs_beside():
    running = made()

    def failing(*args):
        raise PellucidError("told to fail")

    running._update = failing
    with pytest.raises(PellucidError, match="told to fail"):
        running.run()
    assert not beside()


def test_a_reward_that_fails_beside_the_update_ends_the_run():
    def broken(completions, **columns):
        if running.sampling.beside is not None:
            raise ValueError("no")
        return [float(len(text)) for text in completions]

    seen = []
    running = made(rewards=RewardSet([Reward("broken", broken)], max_failures=1), steps=3)
    with events.subscribed(seen.append), pytest.raises(PellucidError, match="failed in 1 steps"):
        running.run()
    assert any(e.kind == "reward_failed" for e in seen) and not beside() and running.history.steps == 0


def test_what_hangs_is_left_behind_and_waited_for_by_the_next_step():
    """A reward inside a long call: the error of the step is told after some seconds, and the weights are not touched while it reads them."""
    free, sampling = threading.Event(), made().sampling
    sampling.collect = lambda step, check=None: free.wait(20) and []
    sampling.begun = sampling.source()
    sampling.beside = Beside(lambda check: [sampling.collect(0, check)], torch.device("cpu"))
    sampling.abandon(0.05)
    assert sampling.beside is not None
    threading.Timer(0.2, free.set).start()
    sampling.collect = Sampling.collect.__get__(sampling)
    assert len(sampling.take(1, made().history).groups) == 6 and sampling.beside is None and free.is_set()


def test_work_beside_gives_its_value_its_error_and_its_events():
    def work(check):
        events.note("from beside")
        return torch.is_grad_enabled(), torch.get_num_threads()

    seen, one = [], Beside(work, torch.device("cpu"))
    with events.subscribed(seen.append):
        one._thread.join()
        assert not seen
        assert one.result() == (True, torch.get_num_threads())
        assert [e.text for e in seen] == ["from beside"]
    two = Beside(lambda check: 1 / 0, torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        two.result()

    def endless(check):
        while True:
            check()
            time.sleep(0.001)

    assert Beside(endless, torch.device("cpu")).abandon()


def test_without_a_lag_there_is_no_second_copy_and_no_thread():
    running = made(lag=0)
    assert not running.sampling.overlap
    running.run()
    assert running.rollouts._copied is None and "time/waiting" not in running.history.metrics[0][1]
    adapted = made("adapters")
    adapted.run()
    assert adapted.rollouts._copied is None  # the merged model is a copy already


def test_the_copy_is_in_the_estimate_of_memory():
    one, two, three = (memory(policy(), config(**how), 5) for how in ({}, dict(lag=1), dict(lag=1, overlap=False)))
    assert one == three and two["sampler"] == two["weights"]
    assert two["peak"] == one["peak"] + two["weights"] + two["rollout"]  # the update's part is the larger one here
