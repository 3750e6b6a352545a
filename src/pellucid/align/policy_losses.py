"""The policy term of a token: importance ratio and clipped surrogate.

Shapes: M trained tokens laid end to end; `sequence` (M,) is the completion of each token. The KL term is not in here:
`objective` adds it, so that each can be read, replaced and tested alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pellucid.align.aggregation import sequence_means
from pellucid.errors import BadInput, nearest

RatioLevel = Literal["token", "sequence", "sequence-token"]
RATIO_LEVELS: tuple[str, ...] = RatioLevel.__args__  # type: ignore[attr-defined]


def log_ratio(logp: Tensor, old: Tensor, sequence: Tensor, level: RatioLevel = "token") -> Tensor:
    """log of the importance ratio of every token, (M,).

    level  "token":           log p - log p_old                                          (PPO, GRPO)
           "sequence":        its mean over the completion, the same for all its tokens  (GSPO, arXiv 2507.18071 eq. 7)
           "sequence-token":  the value of "sequence", the gradient of the token alone   (GSPO-token, eq. 14)

    The last two agree in value and gradient when the advantage is one number per completion.
    """
    if level not in RATIO_LEVELS:
        raise BadInput(f"unknown ratio level {level!r}{nearest(str(level), list(RATIO_LEVELS))}",
                       next=f"use one of {', '.join(RATIO_LEVELS)}")
    token = logp - old
    if level == "token":
        return token
    whole = sequence_means(token, sequence)[sequence]
    return whole if level == "sequence" else whole.detach() + (logp - logp.detach())


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, *, low: float, high: float, delta: float | None = None
) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) at every token; all tensors of one shape.

    PPO (arXiv 1707.06347, eq. 7) with the two sides of the clip named apart (DAPO's clip-higher). The minimum makes
    the term pessimistic: moving further in the good direction stops paying, moving back from a bad place always pays.
    delta: caps r in the first branch at delta > 1 + high, so that one very likely bad token (A < 0) has no unbounded
    loss (two-sided clipping, INTELLECT-2; trl `delta`).
    """
    clipped = ratio.clamp(1 - low, 1 + high)
    free = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(free * advantages, clipped * advantages)


def clip_sides(ratio: Tensor, advantages: Tensor, *, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Which tokens the clip silences, as two boolean tensors (low side, high side): their policy gradient is zero.

    Only the side that the sign of the advantage makes active counts: r below 1 - low with A < 0, r above 1 + high
    with A > 0.
    """
    return (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
