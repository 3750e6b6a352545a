"""Several tasks as one, drawn by weight."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from pellucid.errors import BadInput
from pellucid.tasks.task import Problem, Split, Task, reward_weights


@dataclass(frozen=True)
class MixtureDials:
    weights: tuple[tuple[str, float], ...]
    """Task names with their shares, which sum to 1."""


class Mixture:
    """A task that draws from others; a problem goes back to the task that made it, by `problem.task`."""

    name = "mixture"

    def __init__(self, parts: Sequence[tuple[Task, float]]):
        names = [task.name for task, _ in parts]
        weights = [weight for _, weight in parts]
        if not parts or len(set(names)) != len(names):
            raise BadInput(f"cannot mix the tasks {names}", "a mixture needs at least one task, and each only once",
                           "give each task once, with one set of dials")
        if any(not math.isfinite(w) or w < 0 for w in weights) or sum(weights) <= 0:
            raise BadInput(f"cannot mix with the weights {weights}", "weights are shares: finite, not negative, "
                           "not all zero", "for instance [(countdown, 2), (sorting, 1)]")
        self.tasks: dict[str, Task] = {task.name: task for task, _ in parts}
        self.dials = MixtureDials(tuple((n, w / sum(weights)) for n, w in zip(names, weights)))

    def sample(self, rng: random.Random, split: Split) -> Problem:
        """A problem of a task drawn by weight."""
        name, = rng.choices([n for n, _ in self.dials.weights], [w for _, w in self.dials.weights])
        return self.tasks[name].sample(rng, split)

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """The completion of the task that made the problem."""
        return self.of(problem).demonstrate(problem, rng)

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        """The components of the task that made the problem."""
        return self.of(problem).grade(problem, text)

    @property
    def weights(self) -> dict[str, float]:
        """The reward weights that all parts share."""
        every = {name: reward_weights(task) for name, task in self.tasks.items()}
        first, *others = every.values()
        if any(other != first for other in others):
            raise BadInput("these tasks reward different things", "; ".join(f"{n}: {w}" for n, w in every.items()),
                           "train them one at a time, or give the weights yourself")
        return first

    def of(self, problem: Problem) -> Task:
        """The task that made the problem."""
        if problem.task not in self.tasks:
            raise BadInput(f"the mixture has no task {problem.task!r}", f"it mixes {', '.join(self.tasks)}",
                           "grade the problem with the task that made it")
        return self.tasks[problem.task]
