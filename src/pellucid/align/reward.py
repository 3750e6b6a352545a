"""One reward, and one call of it: what it is asked with, and what came of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pellucid.align.reward_batch import Batch
from pellucid.align.reward_calls import Outcome, Stuck
from pellucid.errors import BadInput
from pellucid.tasks import where_it_failed


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
class Problem:
    """What was wrong with a result, or with getting one."""

    reason: str
    text: str
    where: str = ""


@dataclass(eq=False)
class Call:
    """One call of a reward for the completions at some places."""

    reward: Reward
    at: list[int]
    batch: Batch
    state: Any
    outcome: Outcome = field(default_factory=Outcome)
    split: list[Call] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def singles(self) -> list[Call]:
        """A call for each completion, where this one raised for several: perhaps because of one of them."""
        if len(self.at) > 1 and self.outcome.error is not None and not self.outcome.timed_out:
            self.split = [Call(self.reward, [i], self.batch, self.state) for i in self.at]
        return self.split

    def bound(self) -> Callable[[], Any]:
        """The call with the arguments that the function takes."""
        arguments = {**self.batch.arguments(self.at), "trainer_state": self.state, "log_metric": self.metrics.__setitem__,
                     "log_extra": self.extra.__setitem__}
        parameters = parameters_of(self.reward.function)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            taken = {p.name for p in parameters}
            arguments = {name: value for name, value in arguments.items() if name in taken}
        return partial(self.reward.function, **arguments)

    def values(self) -> tuple[list[dict[str, float]], list[Problem | None]]:
        """For each completion its components (NaN: missing), and what was wrong."""
        reward, n, outcome = self.reward, len(self.at), self.outcome
        if outcome.error is not None:
            return [{}] * n, [_problem_of(outcome, reward)] * n
        given = outcome.value.tolist() if hasattr(outcome.value, "tolist") else outcome.value
        if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence) or len(given) != n:
            what = f"{len(given)} values" if isinstance(given, Sequence) and not isinstance(given, str) else repr(given)[:60]
            return [{}] * n, [Problem("wrong result", f"it gave {what} for {n} completions")] * n
        pairs = [_components_of(value, reward) for value in given]
        return [p[0] for p in pairs], [p[1] for p in pairs]


def _components_of(value: Any, reward: Reward) -> tuple[dict[str, float], Problem | None]:
    """One completion's components; None is missing, and no failure."""
    if value is None:
        return {}, None
    if reward.parts and not isinstance(value, Mapping):
        return {}, Problem("wrong result", f"it gave {value!r} instead of named components")
    numbers: dict[str, float] = {}
    for name, number in (value.items() if reward.parts else [(reward.name, value)]):
        try:
            numbers[name] = math.nan if number is None else float(number)
        except (TypeError, ValueError, RuntimeError):
            return {}, Problem("wrong result", f"it gave {number!r} instead of a number"[:200])
        if math.isinf(numbers[name]) or isinstance(number, str):
            return {}, Problem("wrong result", f"it gave {number!r}"[:200])
    return numbers, None


def _problem_of(outcome: Outcome, reward: Reward) -> Problem:
    assert outcome.error is not None
    if isinstance(outcome.error, Stuck):
        return Problem("timeout", f"no answer in {reward.timeout:g} seconds; {outcome.error}, so it is not asked again until it ends")
    if outcome.timed_out:
        return Problem("timeout", f"no answer in {reward.timeout:g} seconds")
    return Problem("error", f"{type(outcome.error).__name__}: {outcome.error}"[:300], where_it_failed(outcome.error))


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions tell nothing: they get everything
        return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]
