"""Alignment: rewards to advantages, objectives as pure functions, rollouts, and the trainers that use them.

The objective itself is `pellucid.align.objective.objective`; its name is left to its module here.
"""

from pellucid.align.advantages import gdpo_advantages, group_advantages, pass_at_k_advantages, whiten
from pellucid.align.aggregation import Counts, aggregate, count
from pellucid.align.components import conditioned, informative_groups, live_groups, soft_overlong, total_reward
from pellucid.align.controllers import EntropyController, KLController
from pellucid.align.corrections import importance_weights, off_policy_mask
from pellucid.align.credit import Credit, assign_credit, token_advantages
from pellucid.align.formulas import formula, notes
from pellucid.align.kl import kl_penalty
from pellucid.align.objective import objective_padded
from pellucid.align.objective_config import ObjectiveConfig
from pellucid.align.recipes import RECIPES, recipe
from pellucid.align.returns import gae, returns_to_go, token_rewards
from pellucid.align.value import value_loss

__all__ = [
    "Counts", "Credit", "EntropyController", "KLController", "ObjectiveConfig", "RECIPES", "aggregate", "assign_credit",
    "conditioned", "count", "formula", "gae", "gdpo_advantages", "group_advantages", "importance_weights",
    "informative_groups", "kl_penalty", "live_groups", "notes", "objective_padded", "off_policy_mask",
    "pass_at_k_advantages", "recipe", "returns_to_go", "soft_overlong", "token_advantages", "token_rewards",
    "total_reward", "value_loss", "whiten",
]
