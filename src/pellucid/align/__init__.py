"""Alignment: rewards to advantages, objectives as pure functions, rollouts, and the trainers that use them.

The objective itself is `pellucid.align.objective.objective`; its name is left to its module here.
"""

from pellucid.align.advantages import (
    Credit,
    assign_credit,
    group_advantages,
    informative_groups,
    live_groups,
    total_reward,
)
from pellucid.align.aggregation import Counts, aggregate, count
from pellucid.align.kl import kl_penalty
from pellucid.align.objective import ObjectiveConfig, formula, notes, objective_padded
from pellucid.align.recipes import RECIPES, recipe

__all__ = [
    "Counts", "Credit", "ObjectiveConfig", "RECIPES", "aggregate", "assign_credit", "count", "formula",
    "group_advantages", "informative_groups", "kl_penalty", "live_groups", "notes", "objective_padded",
    "recipe", "total_reward",
]
