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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pellucid import events
from pellucid.align.components import conditioned
from pellucid.align.reward import Call, Problem, Reward, parameters_of
from pellucid.align.reward_batch import RESERVED, Batch, Content, batch_of, text_of
from pellucid.align.reward_calls import Outcome, Stuck, TimeIsUp, call, call_async, is_async
from pellucid.errors import BadInput, PellucidError, nearest

__all__ = ["Batch", "Content", "Reward", "RewardFailed", "RewardSet", "Scores", "batch_of", "text_of"]
PATIENCE = 3  # timeouts in a row after which a reward is not asked for the other completions of a step


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
            lacking = [p.name for p in parameters_of(reward.function) if p.default is p.empty and p.name not in given
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
        calls = [Call(reward, at, batch, state) for reward in self.rewards for at in _chunks(size, reward.batch)]
        self._run(calls, scores.seconds)
        for reward in self.rewards:
            self._collect(reward, [c for c in calls if c.reward is reward], size, scores)
        scores.components = dict(scores.raw)
        for name, (on, at_least) in self.conditions.items():
            scores.components[name] = conditioned(scores.raw, name, on, at_least)[name]
        return scores

    # --- running ------------------------------------------------------------------------------------------------------

    def _run(self, calls: list[Call], seconds: dict[str, float]) -> None:
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

    def _plain(self, c: Call, seconds: float) -> None:
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

    def _together(self, calls: list[Call]) -> None:
        outcomes = call_async([c.bound() for c in calls], [c.reward.timeout for c in calls], self.at_once,
                              [c.reward.name for c in calls], PATIENCE)
        for c, outcome in zip(calls, outcomes):
            c.outcome = outcome

    # --- what came of it ----------------------------------------------------------------------------------------------

    def _collect(self, reward: Reward, calls: list[Call], size: int, scores: Scores) -> None:
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

    def _tell(self, reward: Reward, problem: Problem, failed: int, size: int) -> None:
        row = self._in_a_row[reward.name]
        new = self.failures[reward.name] == failed  # its first failure in this run
        events.emit(RewardFailed(reward.name, problem.reason, failed, size, problem.text, row, problem.where if new else ""))
        if new:
            events.note(f"reward {reward.name!r}: {problem.reason} for {failed} of {size} completions, which count as not graded: "
                        f"{problem.where or problem.text}", "warning")
        if row >= self.max_failures:
            raise PellucidError(f"the reward {reward.name!r} failed in {row} steps in a row", problem.where or problem.text,
                                "mend it, give it more time (timeout), or leave it out; the last checkpoint is intact")


def _chunks(size: int, batch: int | None) -> list[list[int]]:
    step = batch or max(size, 1)
    return [list(range(start, min(start + step, size))) for start in range(0, size, step)]


def _weights_of(reward: Reward) -> dict[str, float]:
    if not reward.parts:
        return {reward.name: reward.weight}
    own = getattr(reward.function, "weights", dict.fromkeys(reward.parts, 1.0))
    return {part: reward.weight * own.get(part, 0.0) for part in reward.parts}
