"""Samples of several processes: each makes its share of them, and all get all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pellucid.align.pending import groups_from, groups_state
from pellucid.align.rollout import Group, Rollouts, completions
from pellucid.tasks import Completion, Problem
from pellucid.train.ranks import Ranks


def ungraded(rollouts: Rollouts, ranks: Ranks, problems: Sequence[Problem], n: int, temperature: float, seed: int) -> list[Group]:
    """n completions of each problem, without grades. What is drawn goes by the seed and the problem's number, not by who draws it."""
    numbers = list(ranks.mine(range(len(problems))))
    made = rollouts.ungraded([problems[i] for i in numbers], n, temperature, seed, None, numbers)
    if ranks.size == 1:
        return made
    return groups_from(ranks.dealt(ranks.gathered(groups_state(made))), problems, rollouts.max_tokens)


def for_evaluation(rollouts: Rollouts, ranks: Ranks, seed: int) -> Callable[[list[Problem], int, float], list[list[Completion]]]:
    """The `generate` that `tasks.evaluate` asks for."""
    return lambda problems, draws, temperature: completions(ungraded(rollouts, ranks, problems, draws, temperature, seed))
