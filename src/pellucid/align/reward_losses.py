"""Losses of reward models: of whole answers from pairs (Bradley-Terry), and of single steps (process rewards)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.align.choices import check_name
from pellucid.errors import BadInput


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centring: float = 0.0) -> Tensor:
    """-log σ(r_c - r_r - margin) + centring (r_c + r_r)^2 of every pair, (P,) (arXiv 2203.02155, eq. 1).

    chosen, rejected: (P,) scores, read at the last token that is not padding. margin: (P,) how much better the chosen
    answer is (Llama 2, arXiv 2307.09288, eq. 2). centring (1e-2 is usual) pulls the mean score to 0, which the pairs
    leave open (arXiv 2312.09244, eq. 2). Divide the sum by the pairs of the step.
    """
    if centring < 0:
        raise BadInput(f"centring = {centring:g} would push the scores away from 0", next="choose 0 or more")
    loss = -F.logsigmoid(chosen - rejected - (0.0 if margin is None else margin))
    return loss + centring * (chosen + rejected).square() if centring else loss


def process_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of every step's score, (M,): -y log σ(s) - (1 - y) log σ(-s) (arXiv 2305.20050).

    scores: (M,) the head's value at the last token of each step; labels: (M,) bool, or in [0, 1] for steps whose value
    was estimated by rollouts (arXiv 2312.08935). A two-class head (trl's) is the same with s = logit_1 - logit_0.
    Divide the sum by the labelled steps of the optimizer step.
    """
    y = labels.to(scores.dtype)
    return F.binary_cross_entropy_with_logits(scores, y, reduction="none")


def solution_score(step_scores: Tensor, how: str = "min") -> Tensor:
    """The score of a solution from its steps' log-odds, (M,) -> scalar probability: their minimum, product or last."""
    check_name("way to join the scores of steps", how, ("min", "product", "last"))
    p = F.logsigmoid(step_scores)
    return (p.amin() if how == "min" else p.sum() if how == "product" else p[-1]).exp()


def pair_shares(chosen: Tensor, rejected: Tensor, pairs: int) -> dict[str, Tensor]:
    """Shares of the step's metrics; a tie counts as wrong, as in trl. Keys that end in `/max` take the maximum."""
    c, r = chosen.detach(), rejected.detach()
    both = torch.cat([c, r])
    return {"accuracy": (c > r).to(c.dtype).sum() / max(pairs, 1), "margin": (c - r).sum() / max(pairs, 1),
            "score/mean": both.sum() / max(2 * pairs, 1), "score/square": both.square().sum() / max(2 * pairs, 1),
            "score/max": both.max() if both.numel() else both.new_zeros(())}
