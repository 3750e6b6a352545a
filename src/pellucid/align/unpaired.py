"""Losses on single completions that are labelled good or bad: KTO (arXiv 2402.01306) and unpaired APO.

Shapes: M tokens laid end to end, `sequence` (M,) their completion, `good` (S,) bool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pellucid.align.aggregation import Counts, sequence_sums
from pellucid.align.choices import check_choices
from pellucid.errors import BadInput


@dataclass(frozen=True)
class UnpairedConfig:
    """Every choice of an unpaired objective that changes a number."""

    loss: Literal["kto", "apo_zero"] = "kto"
    """kto: against the KL to the reference; apo_zero: against the reference itself"""
    beta: float = 0.1
    """how strongly the policy is held to the reference"""
    good_weight: float = 1.0
    """weight of good completions; choose good_weight * good / (bad_weight * bad) in [1, 4/3]"""
    bad_weight: float = 1.0
    """weight of bad completions"""

    def __post_init__(self) -> None:
        check_choices(self, "unpaired objective")
        if not (self.beta > 0 and self.good_weight >= 0 and self.bad_weight >= 0):
            raise BadInput("unpaired objective: beta is positive, the weights are not negative")


def kl_reference_point(log_ratio: Tensor) -> Tensor:
    """z = max(0, mean over the WHOLE step of log p / p_ref of mismatched completions): a scalar, detached.

    log_ratio: (S,) sums over completions y_{i+1 mod S} read after prompt x_i: what the policy says about answers to
    other questions estimates its KL to the reference (KTO, sec. 4.1). Needs at least two different examples.
    """
    if log_ratio.numel() < 2:
        raise BadInput("KTO compares with the answers of other prompts", "the step has a single example",
                       "use a batch of two examples or more")
    return log_ratio.detach().double().mean().clamp(min=0).to(log_ratio.dtype)


def unpaired_losses(log_ratio: Tensor, good: Tensor, z: Tensor | float, cfg: UnpairedConfig) -> Tensor:
    """The loss of every completion, (S,); c = log p / p_ref of the completion.

        kto:       good: w_d (1 - σ(b (c - z)));   bad: w_u (1 - σ(b (z - c)))   (arXiv 2402.01306, eq. 8)
        apo_zero:  the same with z = 0 (arXiv 2408.06266, eq. 7, without pairs)
    """
    shift = z if cfg.loss == "kto" else 0.0
    x = cfg.beta * (log_ratio - shift)
    return torch.where(good, cfg.good_weight * (1 - x.sigmoid()), cfg.bad_weight * (1 - (-x).sigmoid()))


def unpaired_objective(
    logp: Tensor, ref: Tensor, sequence: Tensor, good: Tensor, z: Tensor | float, cfg: UnpairedConfig, counts: Counts
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the step's loss, and of its metrics. counts.sequences: completions of the step."""
    c = sequence_sums(logp.to(torch.promote_types(logp.dtype, torch.float32)), sequence)
    c = c - sequence_sums(ref.detach().to(c.dtype), sequence)
    n = max(counts.sequences, 1)
    reward, sums = cfg.beta * c.detach(), sequence_sums(logp.detach(), sequence)
    metrics = {"rewards/good_sum": (reward * good).sum() / n, "rewards/bad_sum": (reward * ~good).sum() / n,
               "share/good": good.to(c.dtype).sum() / n, "logps/good_sum": (sums * good).sum() / n,
               "logps/bad_sum": (sums * ~good).sum() / n}
    return unpaired_losses(c, good, z, cfg).sum() / n, metrics


def unpaired_formula(cfg: UnpairedConfig) -> str:
    """The resolved objective in plain text.

    >>> print(unpaired_formula(UnpairedConfig()))
    minimise  mean over completions of  1 (1 - σ(b (c - z))) if good, 1 (1 - σ(b (z - c))) if bad
    b = 0.1; c = log p / p_ref of the completion, summed over its tokens
    z = max(0, mean over the batch of log p / p_ref of the next example's completion after this prompt), no gradient
    """
    z, minus = (" - z", "z - c") if cfg.loss == "kto" else ("", "-c")
    first = f"b (c{z})" if z else "b c"
    lines = [f"minimise  mean over completions of  {cfg.good_weight:g} (1 - σ({first})) if good, "
             f"{cfg.bad_weight:g} (1 - σ(b ({minus}))) if bad",
             f"b = {cfg.beta:g}; c = log p / p_ref of the completion, summed over its tokens"]
    if cfg.loss == "kto":
        lines.append("z = max(0, mean over the batch of log p / p_ref of the next example's completion after this prompt), "
                     "no gradient")
    return "\n".join(lines)
