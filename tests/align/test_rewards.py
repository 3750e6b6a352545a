"""Rewards end to end: trl's functions give what they give in trl, and nothing that a reward does loses a run."""

import asyncio
import gc
import json
import math
import random
import signal
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_policy import Echo

from pellucid import events
from pellucid.align.components import total_reward
from pellucid.align.reward_calls import Outcome, call
from pellucid.align.reward_sources import TaskGrader, model_reward, task_reward, verl_reward
from pellucid.align.reward_specs import reward_of, reward_set
from pellucid.align.rewards import Batch, Reward, RewardFailed, RewardSet, batch_of, text_of
from pellucid.align.rollout import Group, components
from pellucid.engine import Sample, SamplingParams
from pellucid.errors import BadInput, PellucidError
from pellucid.tasks import Mixture, finished_only, make

TEXTS = ["a", "bb", "ccc", "dddd", "eeeee", "f"]
ANSWERS = [1, 2, 3, 4, 5, 6]


def batch(**more):
    return Batch([f"q{i}" for i in range(6)], list(TEXTS), {"answer": list(ANSWERS), **more}, [[7] * len(t) for t in TEXTS])


def length(completions):
    return [float(len(c)) for c in completions]


def score(*rewards, b=None, **how):
    return RewardSet([r if isinstance(r, Reward) else Reward(getattr(r, "__name__", "r"), r) for r in rewards], **how).score(b or batch())


def nans(values):
    return [math.isnan(v) for v in values.tolist()]


@pytest.fixture
def told():
    """The events of a test."""
    seen = []
    with events.subscribed(seen.append):
        yield seen


# --- what functions get and give ------------------------------------------------------------------------------------------


def test_a_component_is_what_its_function_gives_and_none_is_missing():
    half = lambda completions, **columns: [None if i % 2 else i for i in range(len(completions))]
    scores = score(Reward("length", length, 0.5), Reward("half", half))
    assert scores.components["length"].tolist() == [1, 2, 3, 4, 5, 1] and scores.components["length"].dtype == torch.float64
    assert nans(scores.components["half"]) == [False, True] * 3 and scores.failed == {"length": 0, "half": 0}
    assert scores.weights == {"length": 0.5, "half": 1.0}
    assert scores.matrix(3)["length"].tolist() == [[1, 2, 3], [4, 5, 1]]


def test_functions_get_what_they_name_and_everything_if_they_take_it():
    got = {}

    def named(completions, answer, trainer_state, other="default"):
        got["named"] = (completions, answer, trainer_state, other)
        return [0.0] * 6

    def everything(prompts, completions, completion_ids, **columns):
        got["everything"] = columns
        return [0.0] * 6

    class Called:
        def __call__(self, prompts, *, answer):
            got["called"] = (prompts, answer)
            return torch.zeros(6)

    RewardSet([Reward("a", named), Reward("b", everything), Reward("c", Called())]).score(batch(), state="state")
    assert got["named"] == (TEXTS, ANSWERS, "state", "default") and got["called"] == ([f"q{i}" for i in range(6)], ANSWERS)
    assert set(got["everything"]) == {"answer", "trainer_state", "log_metric", "log_extra"}


@pytest.mark.parametrize("given", [(1, 2, 3, 4, 5, 6), torch.arange(6), torch.arange(6).float().numpy(), [True, False, 1, 0, 1.5, torch.tensor(2.0)]])
def test_any_kind_of_numbers(given):
    assert score(lambda completions: given).components["<lambda>"].tolist() == [float(g) for g in given]


def test_what_was_logged_comes_back():
    def logs(completions, log_metric, log_extra):
        log_metric("mean", sum(map(len, completions)) / len(completions))
        log_extra("shout", [c.upper() for c in completions])
        return [0.0] * len(completions)

    for size in (None, 2, 1):
        scores = score(Reward("logs", logs, batch=size))
        assert scores.metrics["mean"] == pytest.approx(16 / 6) and scores.extra["shout"] == [t.upper() for t in TEXTS]


def test_what_was_logged_stays_with_its_completion():
    """Also where another call fails, or logs something of another length."""
    def logs(completions, log_extra):
        if completions == TEXTS[2:4]:
            raise ValueError("no")
        log_extra("shout", [c.upper() for c in completions])
        log_extra("torn", completions[:1] if len(completions) > 1 else completions)
        if completions == TEXTS[2:3]:
            raise ValueError("no")
        return [0.0] * len(completions)

    scores = score(Reward("logs", logs, batch=2))
    assert scores.extra["shout"] == [t.upper() for t in TEXTS]
    assert scores.extra["torn"] == [None, None, TEXTS[2], TEXTS[3], None, None]
    assert scores.components["logs"].isnan().tolist() == [False, False, True, False, False, False]


def test_none_is_missing_and_not_zero():
    """In numbers, in a dict, and in what depends on it; a total takes it by the rule for missing components."""
    given = score(lambda completions: [1.0, None, 0.0, None, 1.0, 0.0]).components["<lambda>"]
    assert given.isnan().tolist() == [False, True, False, True, False, False]
    parts = RewardSet([Reward("two", lambda completions: [{"a": 1.0, "b": None}] * 3 + [{"a": 0.0, "b": 2.0}] * 3, parts=("a", "b")),
                       Reward("c", lambda completions: [0.5] * 6, on="b")]).score(Batch(TEXTS, TEXTS, {"answer": ANSWERS}))
    assert parts.components["b"].isnan().tolist() == [True] * 3 + [False] * 3
    assert parts.components["c"].isnan().tolist() == [True] * 3 + [False] * 3 and parts.components["c"][3:].tolist() == [0.5] * 3
    matrix = parts.matrix(6)
    zero, exclude = total_reward(matrix, parts.weights), total_reward(matrix, parts.weights, "exclude")
    assert zero.tolist() == [[1.0] * 3 + [2.5] * 3] and exclude[0, :3].isnan().all() and exclude[0, 3:].tolist() == [2.5] * 3


@pytest.mark.parametrize("size", [None, 1, 2, 4, 100])
def test_batches_do_not_change_the_values(size):
    sizes = []

    def f(completions, answer):
        sizes.append(len(completions))
        return [a * len(c) for a, c in zip(answer, completions)]

    async def g(completions, answer):
        return f(completions, answer)

    scores = score(Reward("f", f, batch=size), Reward("g", g, batch=size))
    assert scores.components["f"].tolist() == scores.components["g"].tolist() == [1, 4, 9, 16, 25, 6]
    assert max(sizes) == min(size or 6, 6) and sum(sizes) == 12


def test_an_empty_batch():
    scores = RewardSet([Reward("length", length)]).score(Batch([], []))
    assert scores.components["length"].shape == (0,) and scores.failed == {"length": 0}


# --- against trl ----------------------------------------------------------------------------------------------------------


async def judged(completions, **kwargs):
    await asyncio.sleep(0.001)
    return [float(ord(text_of(c)[0])) if text_of(c) else None for c in completions]


def overlap(prompts, completions, completion_ids, answer, trainer_state, **kwargs):
    return [a + len(ids) + trainer_state.global_step if len(text_of(c)) != 3 else None
            for a, ids, c in zip(answer, completion_ids, completions)]


class Callable_:
    async def __call__(self, prompts, completions, **kwargs):
        return [len(text_of(p)) for p in prompts]


@pytest.mark.parametrize("conversational", [False, True])
def test_reward_functions_of_trl_give_the_same_here(conversational):
    """The same functions, sync and async, through GRPOTrainer's own `_calculate_rewards` and through a RewardSet."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    wrap = (lambda role, text: [{"role": role, "content": text}]) if conversational else (lambda role, text: text)
    prompts, completions = [wrap("user", f"q{i}") for i in range(6)], [wrap("assistant", t) for t in TEXTS]
    ids, state = [[7] * len(t) for t in TEXTS], SimpleNamespace(global_step=10)
    functions, names = [judged, overlap, Callable_()], ["judged", "overlap", "called"]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=False), reward_funcs=functions, reward_processing_classes=[None] * 3, reward_func_names=names,
        state=state, environments=None, async_loop=loop, args=SimpleNamespace(report_to=[]), _log_completion_extra=None, _log_metric=None,
        is_world_process_zero=lambda: False, _metrics={"train": {}})
    inputs = [{"prompt": p, "answer": a} for p, a in zip(prompts, ANSWERS)]
    import trl.trainer.grpo_trainer as module
    gather, module.gather = module.gather, lambda x: x
    try:
        theirs = GRPOTrainer._calculate_rewards(trainer, inputs, prompts, completions, ids)
    finally:
        module.gather = gather
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    rewards = RewardSet([Reward(n, f) for n, f in zip(names, functions)])
    ours = rewards.score(Batch(prompts, completions, {"answer": ANSWERS}, ids), state)
    torch.testing.assert_close(torch.stack([ours.components[n] for n in names], 1).float(), theirs, equal_nan=True, rtol=0, atol=0)
    assert theirs.isnan().any() and not theirs.isnan().all()


# --- what goes wrong ------------------------------------------------------------------------------------------------------


def test_one_bad_completion_costs_only_itself(told):
    def fragile(completions):
        return [1.0 / (len(c) - 3) for c in completions]

    async def fragile_too(completions):
        return fragile(completions)

    scores = score(fragile, fragile_too, length)
    for name in ("fragile", "fragile_too"):
        assert nans(scores.components[name]) == [False, False, True, False, False, False]
        assert scores.components[name][0] == -0.5 and scores.failed[name] == 1
    assert not any(nans(scores.components["length"]))
    failed = [e for e in told if isinstance(e, RewardFailed)]
    assert [(e.reward, e.reason, e.completions, e.of, e.in_a_row) for e in failed] == [
        ("fragile", "error", 1, 6, 0), ("fragile_too", "error", 1, 6, 0)]
    assert "ZeroDivisionError" in failed[0].text and "test_rewards.py:" in failed[0].traceback and "in fragile" in failed[0].traceback
    notes = [e.text for e in told if isinstance(e, events.Note)]
    assert len(notes) == 2 and "1 of 6 completions" in notes[0]


@pytest.mark.parametrize("given, text", [
    ([1, 2], "2 values for 6"), (3.0, "3.0 for 6"), (None, "None for 6"), ("abcdef", "'abcdef' for 6"), ({"a": 1}, "for 6"), (iter([1] * 6), "for 6")])
def test_a_wrong_number_of_values_is_missing_for_all(told, given, text):
    scores = score(lambda completions: given)
    assert all(nans(scores.components["<lambda>"])) and scores.failed == {"<lambda>": 6}
    (failed,) = [e for e in told if isinstance(e, RewardFailed)]
    assert failed.reason == "wrong result" and text in failed.text and failed.in_a_row == 1


@pytest.mark.parametrize("wrong", ["high", "1.0", [1], math.inf, -math.inf, {"a": 1}, 1j, object()])
def test_a_value_that_is_no_number_is_missing_for_its_completion(told, wrong):
    scores = score(lambda completions: [0.0, wrong, 2.0, math.nan, None, 5.0])
    assert nans(scores.components["<lambda>"]) == [False, True, False, True, True, False]
    assert scores.failed == {"<lambda>": 1}  # NaN and None are answers: they say that nothing can be said


def spin():
    while True:
        pass


def stubborn():
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass


def swallows():
    for _ in range(3):
        try:
            time.sleep(60)
        except:  # noqa: E722 - as bad code does
            pass
    time.sleep(60)


def backtracks():
    import re
    return re.fullmatch("(a+)+b", "a" * 40)


@pytest.mark.parametrize("hang", [spin, stubborn, swallows, backtracks, lambda: time.sleep(60)])
def test_a_slow_function_is_stopped_and_the_others_are_not_lost(told, hang):
    def slow(completions):
        return hang() or [0.0] * 6

    before, threads = time.monotonic(), threading.active_count()
    scores = score(Reward("slow", slow, timeout=0.2), length)
    assert time.monotonic() - before < 3
    assert all(nans(scores.components["slow"])) and not any(nans(scores.components["length"]))
    (failed,) = [e for e in told if isinstance(e, RewardFailed)]
    assert (failed.reason, failed.completions) == ("timeout", 6) and "0.2 seconds" in failed.text
    assert threading.active_count() == threads


def test_slow_async_functions_are_stopped_each_by_its_own_limit(told):
    async def slow(completions):
        await asyncio.sleep(0.0 if completions[0] == "bb" else 60)
        return [1.0]

    async def blocks(completions):
        time.sleep(60)
        return [1.0]

    async def refuses(completions):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(60)

    async def quick(completions):
        return length(completions)

    threads, before = threading.active_count(), time.monotonic()
    scores = score(Reward("slow", slow, timeout=0.2, batch=1), quick)
    assert nans(scores.components["slow"]) == [True, False, True, True, True, True] and scores.failed["slow"] == 5
    assert not any(nans(scores.components["quick"])) and time.monotonic() - before < 2
    for bad in (blocks, refuses):
        before = time.monotonic()
        scores = score(Reward("bad", bad, timeout=0.2), quick)
        assert all(nans(scores.components["bad"])) and not any(nans(scores.components["quick"])), bad
        assert time.monotonic() - before < 3
    assert threading.active_count() == threads


def test_a_reward_that_is_always_slow_does_not_take_the_step_with_it():
    """64 completions asked one by one, each to its timeout, would be 64 timeouts."""
    asked = {"plain": 0, "later": 0}

    def plain(completions):
        asked["plain"] += 1
        time.sleep(60)

    async def later(completions):
        asked["later"] += 1
        await asyncio.sleep(60)

    many = Batch(["q"] * 64, ["a"] * 64)
    before = time.monotonic()
    scores = score(Reward("plain", plain, timeout=0.05, batch=1), Reward("later", later, timeout=0.05, batch=1), b=many, at_once=4)
    assert time.monotonic() - before < 2 and asked["plain"] == 3 and 4 <= asked["later"] <= 8
    assert scores.failed == {"plain": 64, "later": 64}
    turns = []

    def now_and_then(completions):
        turns.append(1)
        time.sleep(60 if len(turns) % 3 else 0)
        return [1.0]

    scores = score(Reward("now_and_then", now_and_then, timeout=0.05, batch=1), b=Batch(["q"] * 9, ["a"] * 9))
    assert len(turns) == 9 and scores.failed == {"now_and_then": 6}


def test_what_was_given_up_leaves_no_noise(caplog, recwarn):
    async def refuses(completions):
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass

    async def slow(completions):
        await asyncio.sleep(60)

    score(Reward("refuses", refuses, timeout=0.05), Reward("slow", slow, timeout=0.05))
    gc.collect()
    assert not caplog.records and not [w for w in recwarn if "corout" in str(w.message) or "Task" in str(w.message)]


def test_async_rewards_run_together_within_the_bound():
    running, most = 0, 0

    async def watched(completions):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return [1.0] * len(completions)

    for at_once, expected in ((1, 1), (3, 3), (100, 12)):
        most = 0
        before = time.monotonic()
        score(Reward("a", watched, batch=1), Reward("b", watched, batch=1), at_once=at_once)
        assert most == expected and time.monotonic() - before < 0.02 * 12 / expected + 0.25


def test_inside_a_running_event_loop_and_outside_the_main_thread(told):
    """A notebook's loop, and a rollout thread: no signal there, and still nothing hangs and no thread stays."""
    async def judge(completions):
        return length(completions)

    def work(results):
        scores = score(Reward("spin", lambda completions: spin(), timeout=0.3), Reward("fragile", lambda completions: 1 / 0), judge, length)
        results.append(scores)

    async def notebook(results):
        work(results)

    threads, results = threading.active_count(), []
    asyncio.run(notebook(results))
    thread = threading.Thread(target=work, args=(results,))
    thread.start()
    thread.join(20)
    assert len(results) == 2 and threading.active_count() == threads
    for scores in results:
        assert scores.components["judge"].tolist() == scores.components["length"].tolist() == [1, 2, 3, 4, 5, 1]
        assert scores.failed == {"spin": 6, "fragile": 6, "judge": 0, "length": 0}


def test_a_thread_that_cannot_be_stopped_is_told_and_not_called_again(told):
    calls = []

    class Blocked:
        """Stands for a call of a C library: it holds its thread until it is done."""

        def __call__(self, completions):
            calls.append(1)
            import ctypes
            ctypes.CDLL(None).usleep(1_200_000)  # releases the lock, hears no exception
            return [1.0] * 6

    rewards, results = RewardSet([Reward("blocked", Blocked(), timeout=0.05)]), []
    thread = threading.Thread(target=lambda: results.extend([rewards.score(batch()), rewards.score(batch())]))
    from pellucid.align import reward_calls
    reward_calls.AGAIN, before = 0.01, reward_calls.AGAIN
    try:
        thread.start()
        thread.join(20)
    finally:
        reward_calls.AGAIN = before
    assert len(calls) == 1 and all(all(nans(r.components["blocked"])) for r in results) and len(results) == 2
    assert "not asked again" in next(e.text for e in told if isinstance(e, RewardFailed))
    time.sleep(1.2)  # it ends by itself
    assert not any(t.name == "pellucid reward" for t in threading.enumerate())


def test_exits_are_failures_and_the_persons_interrupt_is_not():
    def leaves(completions):
        raise SystemExit(1)

    async def leaves_too(completions):
        raise SystemExit(1)

    def interrupted(completions):
        raise KeyboardInterrupt

    scores = score(leaves, leaves_too, length)
    assert scores.failed["leaves"] == 6 and scores.failed["leaves_too"] == 6 and scores.failed["length"] == 0
    with pytest.raises(KeyboardInterrupt):
        score(interrupted)


def test_timers_and_handlers_of_others_live_on():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    outer = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        assert call(lambda: 5, 10) == Outcome(5) and not rung
        assert call(spin, 0.05).timed_out
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < left < 0.26 and not rung
        time.sleep(0.4)
        assert rung == [1]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *outer)


def test_too_many_failures_in_a_row_end_the_run_with_the_reason(told):
    broken = [True]

    def sometimes(completions):
        if broken[0]:
            raise RuntimeError("the judge is down")
        return length(completions)

    rewards = RewardSet([Reward("sometimes", sometimes), Reward("length", length)], max_failures=3)
    for state in (True, True, False, True, True):
        broken[0] = state
        rewards.score(batch())
    with pytest.raises(PellucidError, match="'sometimes' failed in 3 steps in a row") as error:
        broken[0] = True
        rewards.score(batch())
    assert "the judge is down" in error.value.why and not isinstance(error.value, BadInput) and "checkpoint" in error.value.next
    assert [e.in_a_row for e in told if isinstance(e, RewardFailed)] == [1, 2, 1, 2, 3]
    assert rewards.failures == {"sometimes": 30, "length": 0}
    assert [bool(e.traceback) for e in told if isinstance(e, RewardFailed)] == [True, False, False, False, False]


def test_a_failure_of_some_is_not_a_failure_in_a_row():
    rewards = RewardSet([Reward("r", lambda completions: [1 / (len(c) - 3) for c in completions])], max_failures=1)
    for _ in range(5):
        rewards.score(batch())
    assert rewards.failures == {"r": 5}


# --- refused before the run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build, message", [
    (lambda: RewardSet([]), "no reward was given"), (lambda: RewardSet([Reward("a", length), Reward("a", length)]), "two rewards are called 'a'"),
    (lambda: Reward("a", length, timeout=0), "timeout=0"), (lambda: Reward("a", length, batch=0), "batch=0"), (lambda: Reward("", length), "name"),
    (lambda: Reward("a", length, weight=math.inf), "weight=inf"), (lambda: Reward("a", 3), "cannot be called"),
    (lambda: RewardSet([Reward("correct", length), Reward("b", length, on="corect")]), "did you mean 'correct'"),
    (lambda: RewardSet([Reward("a", length, on="a")]), "cannot depend on itself"), (lambda: RewardSet([Reward("a", length)], weights={"b": 1}), "no reward component 'b'"),
    (lambda: RewardSet([Reward("a", length)], conditions={"b": ("a", 1)}), "'b'"), (lambda: RewardSet([Reward("a", length)], max_failures=0), "max_failures=0"),
    (lambda: RewardSet([Reward("a", lambda completions, solution: [])]).check(["answer"]), "needs 'solution'"),
    (lambda: RewardSet([Reward("a", lambda completions, solution: [])]).score(batch()), "needs 'solution'"),
    (lambda: model_reward(object()), "no reward model"), (lambda: model_reward(SimpleNamespace(score=len), takes="words"), "'words'")])
def test_what_cannot_work_is_refused(build, message):
    with pytest.raises(BadInput) as error:
        build()
    assert message in str(error.value)


def test_lists_of_unequal_length_are_an_error():
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        Batch(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="2 prompts but 3 answer"):
        Batch(["a", "b"], ["c", "d"], {"answer": [1, 2, 3]})


# --- conditions -----------------------------------------------------------------------------------------------------------


def test_conditions_are_gdpos_and_look_at_what_was_given():
    correct = lambda completions: [1.0, 1.0, 0.5, 0.0, None, 1.0]
    short = lambda completions: [0.3, None, 0.3, 0.3, 0.3, -2.0]
    scores = score(Reward("correct", correct), Reward("short", short, on="correct"), Reward("late", length, on="short", at_least=0.0))
    nan, same = math.nan, lambda values: pytest.approx(values, nan_ok=True)
    assert scores.components["short"].tolist() == same([0.3, nan, 0.0, 0.0, nan, -2.0])
    assert scores.raw["short"].tolist() == same([0.3, nan, 0.3, 0.3, 0.3, -2.0])
    assert scores.components["late"].tolist() == same([1, nan, 3, 4, 5, 0])  # on the raw `short`, not on the conditioned one
    assert scores.components["correct"].tolist() == same([1.0, 1.0, 0.5, 0.0, nan, 1.0]) == scores.raw["correct"].tolist()


# --- tasks, models, verl --------------------------------------------------------------------------------------------------


def test_a_tasks_grades_are_the_rollouts_components():
    rng, groups = random.Random(0), []
    for _ in range(5):
        p = Echo().sample(rng, "train")
        texts = [p.answer, p.answer + "0", p.answer, "x"]
        samples = [Sample([1, 2], SamplingParams(), 0, [3] * len(t), [], "length" if i == 2 else "stop") for i, t in enumerate(texts)]
        groups.append(Group(p, samples, texts, [finished_only(Echo().grade(p, t), s.finish_reason == "stop") for s, t in zip(samples, texts)]))
    scores = RewardSet([task_reward(Echo())]).score(batch_of(groups))
    wanted = components(groups)
    assert set(scores.components) == set(wanted)
    for name, matrix in scores.matrix(4).items():
        assert torch.equal(matrix.nan_to_num(-9), wanted[name].nan_to_num(-9))
    assert scores.matrix(4)["correct"].any() and not scores.matrix(4)["correct"].all()


def test_what_a_task_does_not_reward_is_measured_with_weight_zero():
    rewards = RewardSet([task_reward(make("hackable"))])
    assert rewards.weights == {"correct": 0.0, "format": 0.0, "progress": 0.0, "proxy": 1.0}
    brevity = RewardSet([task_reward(make("brevity"))], conditions={"length": ("correct", 1.0)}, weights={"length": 0.25})
    assert brevity.weights["length"] == 0.25 and brevity.weights["correct"] == 1.0
    rng, task = random.Random(0), make("brevity")
    p = task.sample(rng, "train")
    good, wrong = task.demonstrate(p, rng), "<think>\n\n</think>\n\n1"
    scores = brevity.score(Batch([p.prompt] * 2, [good, wrong], {"problem": [p, p]}))
    assert scores.raw["length"].tolist() == [1, 1] and scores.components["length"].tolist() == [1, 0]


def test_a_mixture_and_a_dialogue_are_graded_by_their_own():
    lookup, sorting = make("lookup"), make("sorting")
    rng, mixture = random.Random(0), Mixture([(lookup, 1), (sorting, 1)])
    a, b = lookup.sample(rng, "train"), sorting.sample(rng, "train")
    turns = [lookup.turns(a), [], lookup.turns(a)[:1]]
    made = Batch([a.prompt, b.prompt, a.prompt], ["x", sorting.demonstrate(b, rng), "x"],
                 {"problem": [a, b, a], "turns": turns, "finished": [True, False, True]})
    scores = RewardSet([task_reward(mixture)]).score(made)
    assert scores.components["correct"].tolist() == [1, 0, 0] and scores.components["progress"].tolist() == [1, 0.9, pytest.approx(0.3)]
    assert TaskGrader(mixture).names == ("correct", "format", "progress")


def test_a_grader_that_fails_on_one_completion():
    class Fragile(Echo):
        def grade(self, problem, completion):
            if completion == "boom":
                raise ValueError("boom")
            return super().grade(problem, completion)

    p = Echo("5").sample(random.Random(0), "train")
    scores = RewardSet([task_reward(Fragile("5"))]).score(Batch(["5"] * 3, ["5", "boom", "6"], {"problem": [p] * 3}))
    assert nans(scores.components["correct"]) == [False, True, False] and scores.failed == {"echo": 1}
    assert all(nans(scores.components["progress"]))  # which this task does not have


def test_reward_models_by_tokens_and_by_text():
    class ByIds:
        def score(self, sequences):
            return torch.tensor([float(sum(s)) for s in sequences])

    class ByTexts:
        takes = "texts"

        def score(self, texts):
            return [len(t) for t in texts]

    b = batch()
    b.prompt_ids = [[i] for i in range(6)]
    scores = score(Reward("ids", model_reward(ByIds())), Reward("texts", model_reward(ByTexts())), b=b)
    assert scores.components["ids"].tolist() == [i + 7 * len(t) for i, t in enumerate(TEXTS)]
    assert scores.components["texts"].tolist() == [2 + len(t) for t in TEXTS]


def test_verls_compute_score():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        right = float(len(solution_str) == ground_truth)
        return {"score": right, "acc": right, "note": "x"} if data_source == "gsm8k" else right + extra_info["index"]

    b = batch(data_source=["gsm8k"] * 3 + ["math"] * 3, ground_truth=[1, 1, 3, 4, 4, 1], extra_info=[{"index": i} for i in range(6)])
    scores = score(Reward("r", verl_reward(compute_score)), b=b)
    assert scores.components["r"].tolist() == [1, 0, 1, 4, 4, 6] and scores.metrics == {"acc": pytest.approx(2 / 3)}


# --- specs ----------------------------------------------------------------------------------------------------------------

FILE = '''
    calls = []

    def short(prompts, completions, limit=2, **columns):
        calls.append(columns)
        return [1.0 if len(c) <= limit else 0.0 for c in completions]

    async def judge(completions):
        return [0.5] * len(completions)

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        return float(len(solution_str) == ground_truth)

    class Model:
        def __init__(self, plus=0):
            self.plus = plus

        def score(self, sequences):
            return [len(s) + self.plus for s in sequences]

    number = 3
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(textwrap.dedent(FILE))
    return path


def test_specs(file):
    rewards = reward_set([f"{file}:short", f"brief={file}:short?limit=4&timeout=5&batch=2*0.5@short>=1", f"{file}:judge?batch=1*2e-1",
                          "exact", "gold=exact?case=false*-1", "overlong?longest=4&margin=2", f"rm={file}:Model?plus=10*0"])
    assert rewards.names == ["short", "brief", "judge", "exact", "gold", "overlong", "rm"]
    assert rewards.weights == {"short": 1, "brief": 0.5, "judge": 0.2, "exact": 1, "gold": -1, "overlong": 1, "rm": 0}
    assert rewards.conditions == {"brief": ("short", 1.0)}
    assert (rewards.rewards[1].timeout, rewards.rewards[1].batch, rewards.rewards[2].batch) == (5, 2, 1)
    b = batch()
    b.prompt_ids = [[1]] * 6
    b.columns["answer"] = ["A", "bb", "x", "x", "x", None]
    scores = rewards.score(b)
    assert scores.raw["short"].tolist() == [1, 1, 0, 0, 0, 1] and scores.raw["brief"].tolist() == [1, 1, 1, 1, 0, 1]
    assert scores.components["brief"].tolist() == [1, 1, 0, 0, 0, 1] and scores.components["judge"].tolist() == [0.5] * 6
    assert scores.components["exact"].tolist()[:5] == [0, 1, 0, 0, 0] and scores.components["gold"].tolist()[:5] == [1, 1, 0, 0, 0]
    assert scores.components["overlong"].tolist() == [0, 0, -0.5, -1, -1, 0] and scores.components["rm"].tolist() == [12, 13, 14, 15, 16, 12]


def test_a_verl_function_is_adapted_and_a_tasks_components_are_weighed(file):
    b = batch(data_source=["x"] * 6, ground_truth=[1, 2, 3, 9, 9, 9])
    assert RewardSet([reward_of(f"{file}:compute_score")]).score(b).components["compute_score"].tolist() == [1, 1, 1, 0, 0, 0]
    rewards = reward_set(["length*0.25@correct>=1", "progress*0", "extra=exact"], task=make("brevity"))
    assert rewards.names == ["correct", "format", "progress", "length", "extra"] and rewards.conditions == {"length": ("correct", 1.0)}
    assert rewards.weights == {"correct": 1, "format": 0.2, "progress": 0, "length": 0.25, "extra": 1}


@pytest.mark.parametrize("spec, message", [
    ("", "cannot be read"), ("a*b", "cannot be read"), ("exact@correct", "cannot be read"), ("exact@correct>=high", "cannot be read"),
    ("exat", "did you mean 'exact'"), ("exact?colum=x", "does not take colum"), ("overlong", "does not take"), ("overlong?longest", "the option 'longest'"),
    ("exact?timeout=soon", "timeout='soon'"), ("exact?timeout=-1", "timeout=-1"), ("{file}:shrt", "did you mean 'short'"), ("{file}:number", "cannot be called"),
    ("{file}:short?limits=3", "did you mean 'limit'"), ("nowhere.py:f", "there is no file"), ("nowhere_at_all:f", "there is no module"),
    ("matches?pattern=(", "no regular expression")])
def test_specs_that_cannot_be_read(file, spec, message):
    if "{file}:short?limits" in spec:  # a function that takes everything takes this, too
        file.write_text("def short(completions, limit=2): return []")
    with pytest.raises(BadInput) as error:
        reward_of(spec.format(file=file))
    assert message in str(error.value)


def test_reserved_characters_can_be_written(file):
    reward = reward_of("matches?pattern=%5Ba-c%5D%2B")
    assert RewardSet([reward]).score(batch()).components["matches"].tolist() == [1, 1, 1, 0, 0, 0]


def test_a_failing_reward_is_logged_as_json(tmp_path):
    log = events.RunLog(tmp_path / "events.jsonl")
    with events.subscribed(log):
        score(Reward("broken", lambda completions: 1 / 0))
    log.close()
    record = next(e for e in map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines()) if e["kind"] == "reward_failed")
    assert record["reward"] == "broken" and record["completions"] == 6 and "ZeroDivisionError" in record["traceback"]


def test_a_rewards_weight_multiplies_those_of_its_parts():
    def parts(completions, **columns):
        return [{"a": 1.0, "b": 0.0} for _ in completions]

    assert RewardSet([Reward("r", parts, weight=0.5, parts=("a", "b"))]).weights == {"a": 0.5, "b": 0.5}
    parts.weights = {"a": 3.0}
    assert RewardSet([Reward("r", parts, weight=0.5, parts=("a", "b"))]).weights == {"a": 1.5, "b": 0.0}
