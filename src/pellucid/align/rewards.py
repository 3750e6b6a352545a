"""Rewards as named components, from a function of ten lines to the (N, G) matrix that the objectives take.

    # rewards.py                                            trl's signature: people's existing functions work as they are
    def short(prompts, completions, **columns):
        return [1.0 if len(text) < 200 else 0.0 for text in completions]

    rewards = RewardSet([
        Reward("correct", math("answer")),
        Reward("short", load_object("rewards.py:short"), weight=0.5, on="correct"),   # counts where correct >= 1
        Reward("judge", ask_a_model, timeout=20, batch=1)])                            # async, one completion a call
    scores = rewards.score(Batch(prompts, completions, {"answer": answers}))
    scores.matrix(G)["short"]                                                          # (N, G), NaN: not graded

A function gets lists of equal length, by name: `prompts`, `completions` (texts, or lists of messages where the dataset is
conversational), `completion_ids`, every other column of the dataset, and as trl has it `trainer_state`, `log_metric` and
`log_extra`; those it has no parameter for are left out.  It gives a list of numbers, None meaning "cannot say".

Nothing that a reward does ends the run: what raises, hangs, or gives something else than numbers is missing (NaN) for the
completions concerned, counted, and told.  Where a call for many completions raises, they are tried one by one; after three
timeouts in a row a reward is not asked again in that step.  Only a reward that gives nothing for many steps in a row ends
the run, with a clear error.
"""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pellucid import events
from pellucid.align.components import conditioned
from pellucid.align.prompts import content_of
from pellucid.align.reward_calls import Outcome, Stuck, TimeIsUp, call, call_async, is_async
from pellucid.errors import BadInput, PellucidError, nearest
from pellucid.tasks import where_it_failed

if TYPE_CHECKING:
    from pellucid.align.rollout import Group

Content = str | list[dict[str, Any]]
PATIENCE = 3  # timeouts in a row after which a reward is not asked for the other completions of a step
RESERVED = ("prompts", "completions", "completion_ids", "prompt_ids", "trainer_state", "log_metric", "log_extra")


@dataclass
class RewardFailed(events.Event):
    """A reward gave nothing for some completions of a step. traceback: of its first failure only, shortened."""

    kind = "reward_failed"
    reward: str
    reason: str  # "error" | "timeout" | "wrong result"
    completions: int
    of: int
    text: str
    in_a_row: int  # steps in which it gave nothing at all
    traceback: str = ""


@dataclass
class Reward:
    """One named component (or several that one function gives: `parts`)."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    """In the total; 0: measured and shown, not trained on."""
    on: str | None = None
    """The component on which this one depends: it counts only where that one is at least `at_least`, and is 0 elsewhere."""
    at_least: float = 1.0
    timeout: float = 60.0
    """Seconds for a call."""
    batch: int | None = None
    """Completions in a call; None: all.  With 1, a slow or failing call concerns one completion only."""
    parts: tuple[str, ...] = ()
    """Names of the components where the function gives a dict for each completion; else it gives numbers."""

    def __post_init__(self) -> None:
        problems = [("timeout", self.timeout > 0, "above 0 seconds"), ("batch", self.batch is None or self.batch >= 1, "at least 1"),
                    ("weight", math.isfinite(self.weight), "a finite number"), ("name", bool(self.name), "a name")]
        for what, fine, must in problems:
            if not fine:
                raise BadInput(f"reward {self.name!r}: {what}={getattr(self, what)!r} is not possible", f"it must be {must}")
        if not callable(self.function):
            raise BadInput(f"reward {self.name!r} cannot be called", f"it is a {type(self.function).__name__}",
                           "give a function, or model_reward(model) for a trained reward model")

    @property
    def components(self) -> tuple[str, ...]:
        return self.parts or (self.name,)


@dataclass
class Batch:
    """The completions to be graded, S of them, and what belongs to each; completions of a group stand together."""

    prompts: list[Content]
    completions: list[Content]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    completion_ids: list[list[int]] | None = None
    prompt_ids: list[list[int]] | None = None

    def __post_init__(self) -> None:
        lists = {"completions": self.completions, "completion_ids": self.completion_ids, "prompt_ids": self.prompt_ids, **self.columns}
        for name, values in lists.items():
            if values is not None and len(values) != len(self.prompts):
                raise ValueError(f"{len(self.prompts)} prompts but {len(values)} {name}")

    def __len__(self) -> int:
        return len(self.prompts)

    def arguments(self, at: Sequence[int]) -> dict[str, list[Any]]:
        """The lists that a reward function gets, for the completions at these places."""
        every: dict[str, list[Any] | None] = {
            **{name: values for name, values in self.columns.items() if name not in RESERVED}, "prompts": self.prompts,
            "completions": self.completions, "completion_ids": self.completion_ids, "prompt_ids": self.prompt_ids}
        return {name: [values[i] for i in at] for name, values in every.items() if values is not None}


@dataclass
class Scores:
    """The components of S completions."""

    components: dict[str, Tensor]
    """name -> (S,) float64, NaN where it is missing; conditions applied."""
    raw: dict[str, Tensor]
    """The same before the conditions."""
    weights: dict[str, float]
    failed: dict[str, int] = field(default_factory=dict)
    """Completions for which a reward failed, by reward."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What each reward took; async ones run together and share theirs."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What functions gave to `log_metric`."""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """What functions gave to `log_extra`: columns for the table of completions, S values each, None where there is none."""

    def matrix(self, group: int) -> dict[str, Tensor]:
        """name -> (N, G) with G = group."""
        return {name: values.view(-1, group) for name, values in self.components.items()}


class RewardSet:
    """Rewards that are asked together.  See the module.

    weights, conditions: of single components, in place of what the rewards say themselves ("length": ("correct", 1.0)
    makes `length` count only where `correct` is at least 1).  max_failures: a reward that gives nothing at all for so
    many steps in a row ends the run.  at_once: async calls that run at a time.
    """

    def __init__(self, rewards: Sequence[Reward], *, weights: Mapping[str, float] | None = None,
                 conditions: Mapping[str, tuple[str, float]] | None = None, max_failures: int = 10, at_once: int = 16):
        self.rewards = list(rewards)
        self.weights = {name: w for reward in self.rewards for name, w in _weights_of(reward).items()} | dict(weights or {})
        """Component -> weight in the total."""
        self.conditions = {name: (reward.on, reward.at_least) for reward in self.rewards if reward.on is not None
                           for name in reward.components} | dict(conditions or {})
        self.max_failures, self.at_once = max_failures, at_once
        names = self.names
        if not names:
            raise BadInput("no reward was given", next="give at least one, such as rewards.py:function")
        for name in names:
            if names.count(name) > 1:
                raise BadInput(f"two rewards are called {name!r}", "components are told apart by their names",
                               "name them: NAME=module:function")
        for name in [*self.weights, *self.conditions, *(on for on, _ in self.conditions.values())]:
            if name not in names:
                raise BadInput(f"there is no reward component {name!r}{nearest(name, names)}", f"there are {', '.join(names)}",
                               "name one of these")
        for name, (on, _) in self.conditions.items():
            if name == on:
                raise BadInput(f"the reward {name!r} cannot depend on itself", next="name another component as its condition")
        if max_failures < 1 or at_once < 1:
            raise BadInput(f"max_failures={max_failures}, at_once={at_once} is not possible", "both are at least 1")
        self.failures = dict.fromkeys((reward.name for reward in self.rewards), 0)  # completions, over the whole run
        self._in_a_row = dict(self.failures)
        self._stuck: dict[str, threading.Thread] = {}
        self._checked: set[frozenset[str]] = set()

    @property
    def names(self) -> list[str]:
        """All components, in order."""
        return [name for reward in self.rewards for name in reward.components]

    def check(self, columns: Sequence[str]) -> None:
        """BadInput if a function needs something that is neither a column nor given to all: before the run, not in it."""
        given = {*columns, *RESERVED}
        for reward in self.rewards:
            lacking = [p.name for p in _parameters(reward.function) if p.default is p.empty and p.name not in given
                       and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            if lacking:
                raise BadInput(f"the reward {reward.name!r} needs {', '.join(map(repr, lacking))}",
                               f"the data has the columns {', '.join(sorted(columns)) or 'prompt alone'}",
                               "rename the parameter or the column, or give it a default")

    def score(self, batch: Batch, state: Any = None) -> Scores:
        """Grade all completions.  state: handed to functions as `trainer_state`."""
        have = frozenset(batch.columns)
        if have not in self._checked:
            self.check(sorted(have))
            self._checked.add(have)
        size = len(batch)
        scores = Scores({}, {name: torch.full((size,), math.nan, dtype=torch.float64) for name in self.names}, self.weights)
        calls = [_Call(reward, at, batch, state) for reward in self.rewards for at in _chunks(size, reward.batch)]
        self._run(calls, scores.seconds)
        for reward in self.rewards:
            self._collect(reward, [c for c in calls if c.reward is reward], size, scores)
        scores.components = dict(scores.raw)
        for name, (on, at_least) in self.conditions.items():
            scores.components[name] = conditioned(scores.raw, name, on, at_least)[name]
        return scores

    # --- running ------------------------------------------------------------------------------------------------------

    def _run(self, calls: list[_Call], seconds: dict[str, float]) -> None:
        """Plain functions one after the other, then the async ones together; then whatever raised, one by one."""
        later = [c for c in calls if is_async(c.reward.function)]
        slow = dict.fromkeys((c.reward.name for c in calls), 0)  # timeouts in a row
        for c in [c for c in calls if not is_async(c.reward.function)]:
            name, began = c.reward.name, time.perf_counter()
            if slow[name] >= PATIENCE:
                c.outcome = Outcome(error=TimeIsUp())
                continue
            self._plain(c, c.reward.timeout)
            slow[name] = slow[name] + 1 if c.outcome.timed_out else 0
            for single in c.singles():
                self._plain(single, c.reward.timeout - (time.perf_counter() - began))
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        began = time.perf_counter()
        self._together(later)
        self._together([single for c in later for single in c.singles()])
        seconds.update(dict.fromkeys((c.reward.name for c in later), time.perf_counter() - began))

    def _plain(self, c: _Call, seconds: float) -> None:
        name = c.reward.name
        if name in self._stuck and self._stuck[name].is_alive():
            c.outcome = Outcome(error=Stuck(self._stuck[name]))
            return
        c.outcome = call(c.bound(), max(seconds, 0.01))
        if isinstance(c.outcome.error, Stuck):
            self._stuck[name] = c.outcome.error.thread
        if inspect.isawaitable(c.outcome.value):  # a plain function that gives a coroutine, such as a lambda
            given = c.outcome.value
            (c.outcome,) = call_async([lambda: given], [max(seconds, 0.01)], 1)

    def _together(self, calls: list[_Call]) -> None:
        outcomes = call_async([c.bound() for c in calls], [c.reward.timeout for c in calls], self.at_once,
                              [c.reward.name for c in calls], PATIENCE)
        for c, outcome in zip(calls, outcomes):
            c.outcome = outcome

    # --- what came of it ----------------------------------------------------------------------------------------------

    def _collect(self, reward: Reward, calls: list[_Call], size: int, scores: Scores) -> None:
        failed, first = 0, None
        metrics: dict[str, list[float]] = {}
        for c in [part for whole in calls for part in (whole.split or [whole])]:
            values, wrong = c.values()
            for name, number in c.metrics.items():
                metrics.setdefault(name, []).append(number)
            for name, column in c.extra.items():
                if isinstance(column, Sequence) and not isinstance(column, str) and len(column) == len(c.at):
                    whole = scores.extra.setdefault(name, [None] * size)
                    for i, value in zip(c.at, column):
                        whole[i] = value
            for i, given in zip(c.at, values):
                for name, value in given.items():
                    if name in scores.raw:
                        scores.raw[name][i] = value
            failed += sum(map(bool, wrong))
            first = first or next((w for w in wrong if w), None)
        scores.metrics |= {name: sum(numbers) / len(numbers) for name, numbers in metrics.items()}
        scores.failed[reward.name] = failed
        self.failures[reward.name] += failed
        self._in_a_row[reward.name] = self._in_a_row[reward.name] + 1 if failed == size and size else 0
        if first is not None:
            self._tell(reward, first, failed, size)

    def _tell(self, reward: Reward, problem: _Problem, failed: int, size: int) -> None:
        row = self._in_a_row[reward.name]
        new = self.failures[reward.name] == failed  # its first failure in this run
        events.emit(RewardFailed(reward.name, problem.reason, failed, size, problem.text, row, problem.where if new else ""))
        if new:
            events.note(f"reward {reward.name!r}: {problem.reason} for {failed} of {size} completions, which count as not graded: "
                        f"{problem.where or problem.text}", "warning")
        if row >= self.max_failures:
            raise PellucidError(f"the reward {reward.name!r} failed in {row} steps in a row", problem.where or problem.text,
                                "mend it, give it more time (timeout), or leave it out; the last checkpoint is intact")


@dataclass
class _Problem:
    reason: str
    text: str
    where: str = ""


@dataclass(eq=False)
class _Call:
    """One call of a reward for the completions at some places."""

    reward: Reward
    at: list[int]
    batch: Batch
    state: Any
    outcome: Outcome = field(default_factory=Outcome)
    split: list[_Call] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def singles(self) -> list[_Call]:
        """A call for each completion, where this one raised for several: perhaps because of one of them."""
        if len(self.at) > 1 and self.outcome.error is not None and not self.outcome.timed_out:
            self.split = [_Call(self.reward, [i], self.batch, self.state) for i in self.at]
        return self.split

    def bound(self) -> Callable[[], Any]:
        """The call with the arguments that the function takes."""
        arguments = {**self.batch.arguments(self.at), "trainer_state": self.state, "log_metric": self.metrics.__setitem__,
                     "log_extra": self.extra.__setitem__}
        parameters = _parameters(self.reward.function)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            taken = {p.name for p in parameters}
            arguments = {name: value for name, value in arguments.items() if name in taken}
        return partial(self.reward.function, **arguments)

    def values(self) -> tuple[list[dict[str, float]], list[_Problem | None]]:
        """For each completion its components (NaN: missing), and what was wrong."""
        reward, n, outcome = self.reward, len(self.at), self.outcome
        if outcome.error is not None:
            return [{}] * n, [_problem_of(outcome, reward)] * n
        given = outcome.value.tolist() if hasattr(outcome.value, "tolist") else outcome.value
        if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence) or len(given) != n:
            what = f"{len(given)} values" if isinstance(given, Sequence) and not isinstance(given, str) else repr(given)[:60]
            return [{}] * n, [_Problem("wrong result", f"it gave {what} for {n} completions")] * n
        pairs = [_components_of(value, reward) for value in given]
        return [p[0] for p in pairs], [p[1] for p in pairs]


def _components_of(value: Any, reward: Reward) -> tuple[dict[str, float], _Problem | None]:
    """One completion's components; None is missing, and no failure."""
    if value is None:
        return {}, None
    if reward.parts and not isinstance(value, Mapping):
        return {}, _Problem("wrong result", f"it gave {value!r} instead of named components")
    numbers: dict[str, float] = {}
    for name, number in (value.items() if reward.parts else [(reward.name, value)]):
        try:
            numbers[name] = math.nan if number is None else float(number)
        except (TypeError, ValueError, RuntimeError):
            return {}, _Problem("wrong result", f"it gave {number!r} instead of a number"[:200])
        if math.isinf(numbers[name]) or isinstance(number, str):
            return {}, _Problem("wrong result", f"it gave {number!r}"[:200])
    return numbers, None


def _problem_of(outcome: Outcome, reward: Reward) -> _Problem:
    assert outcome.error is not None
    if isinstance(outcome.error, Stuck):
        return _Problem("timeout", f"no answer in {reward.timeout:g} seconds; {outcome.error}, so it is not asked again until it ends")
    if outcome.timed_out:
        return _Problem("timeout", f"no answer in {reward.timeout:g} seconds")
    return _Problem("error", f"{type(outcome.error).__name__}: {outcome.error}"[:300], where_it_failed(outcome.error))


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions tell nothing: they get everything
        return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]


def _chunks(size: int, batch: int | None) -> list[list[int]]:
    step = batch or max(size, 1)
    return [list(range(start, min(start + step, size))) for start in range(0, size, step)]


def _weights_of(reward: Reward) -> dict[str, float]:
    if not reward.parts:
        return {reward.name: reward.weight}
    own = getattr(reward.function, "weights", dict.fromkeys(reward.parts, 1.0))
    return {part: reward.weight * own.get(part, 0.0) for part in reward.parts}


def text_of(content: Content) -> str:
    """A completion's text: itself, or what the assistant said last."""
    if isinstance(content, str):
        return content
    spoken = [m.get("content") for m in content if m.get("role", "assistant") == "assistant"] or [m.get("content") for m in content]
    return spoken[-1] if spoken and isinstance(spoken[-1], str) else ""


# --- groups of a rollout --------------------------------------------------------------------------------------------------


def batch_of(groups: Sequence[Group]) -> Batch:
    """The completions of sampled groups. Columns: `problem`, `answer`, `finished` (False: cut off), `turns` (of dialogues),
    and those that the data have, which win."""
    every = [(group, i) for group in groups for i in range(len(group.samples))]
    rows = [dict(getattr(group.problem, "columns", {})) for group, _ in every]
    shared = set.intersection(*map(set, rows)) if rows else set()
    columns: dict[str, list[Any]] = {"problem": [group.problem for group, _ in every], "answer": [group.problem.answer for group, _ in every],
                                     "finished": [group.samples[i].finish_reason == "stop" for group, i in every],
                                     "turns": [group.turns(i) for group, i in every]}
    columns |= {name: [row[name] for row in rows] for name in sorted(shared)}
    return Batch([content_of(group.problem) for group, _ in every], [_completion(group, i) for group, i in every], columns,
                 [group.samples[i].tokens for group, i in every], [group.samples[i].prompt for group, i in every])


def _completion(group: Group, i: int) -> Content:
    """A text behind a text, messages behind messages: all of a dialogue's."""
    if isinstance(content_of(group.problem), str):
        return group.texts[i]
    return group.episodes[i] if group.episodes else [{"role": "assistant", "content": group.texts[i]}]
