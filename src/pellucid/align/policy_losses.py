"""The policy term of a token: importance ratio, and what each method makes of ratio and advantage.

Shapes: M trained tokens laid end to end; `sequence` (M,) is the completion of each token. The KL term is not in here:
`objective` adds it, so that each can be read, replaced and tested alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pellucid.align.aggregation import sequence_means, sequence_sums
from pellucid.align.choices import check_name

RatioLevel = Literal["token", "sequence", "sequence-token", "sequence-sum"]
Policy = Literal["clip", "cispo", "sapo", "gmpo", "reinforce"]
RATIO_LEVELS: tuple[str, ...] = RatioLevel.__args__  # type: ignore[attr-defined]
POLICIES: tuple[str, ...] = Policy.__args__  # type: ignore[attr-defined]


def log_ratio(logp: Tensor, old: Tensor, sequence: Tensor, level: RatioLevel = "token") -> Tensor:
    """log of the importance ratio of every token, (M,).

    level  "token":           log p - log p_old                                          (PPO, GRPO)
           "sequence":        its mean over the completion, the same for all its tokens  (GSPO, arXiv 2507.18071 eq. 7)
           "sequence-token":  the value of "sequence", the gradient of the token alone   (GSPO-token, eq. 14)
           "sequence-sum":    its sum over the completion: the exact ratio of the answer (RLOO in trl); bound it

    "sequence" and "sequence-token" agree in value and gradient when the advantage is one number per completion.
    """
    check_name("ratio level", level, RatioLevel)
    token = logp - old
    if level == "token":
        return token
    whole = (sequence_sums if level == "sequence-sum" else sequence_means)(token, sequence)[sequence]
    return whole if level != "sequence-token" else whole.detach() + (logp - logp.detach())


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, *, low: float, high: float, delta: float | None = None
) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) at every token; all tensors of one shape.

    PPO (arXiv 1707.06347, eq. 7) with the two sides of the clip named apart (DAPO's clip-higher). The minimum makes
    the term pessimistic: moving further in the good direction stops paying, moving back from a bad place always pays.
    delta: caps r in the first branch at delta > 1 + high, so that one very likely bad token (A < 0) has no unbounded
    loss. Two names for the same: two-sided clipping (INTELLECT-2, arXiv 2505.07291; trl `delta`) and dual clip
    (arXiv 1912.09729; verl `clip_ratio_c` = 3), max(min(r A, clip(r) A), delta A) for A < 0.
    """
    clipped = ratio.clamp(1 - low, 1 + high)
    free = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(free * advantages, clipped * advantages)


def cispo(ratio: Tensor, logp: Tensor, advantages: Tensor, *, low: float, high: float) -> Tensor:
    """-sg[clip(r, 1 - low, 1 + high)] A log p (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

    The clip bounds the WEIGHT of a token's gradient; no token loses its gradient, as rare decisive ones do in PPO.
    low = 1 means no lower side. Here the upper bound is 1 + high, as everywhere (and in verl); trl's `epsilon_high` is
    the bound itself: its recommended 5 is high = 4.
    """
    return -ratio.detach().clamp(1 - low, 1 + high) * advantages * logp


def sapo(ratio: Tensor, advantages: Tensor, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Tensor:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau = tau_pos if A > 0 else tau_neg (arXiv 2511.20347, eq. 6).

    A soft gate in place of the clip: at r = 1 its gradient is that of the plain ratio, and it fades on both sides,
    faster for A <= 0.
    """
    tau = torch.where(advantages > 0, tau_pos, tau_neg).to(ratio.dtype)
    return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantages


def gmpo_log_ratio(token: Tensor, advantages: Tensor, sequence: Tensor, *, low: float, high: float) -> Tensor:
    """GMPO (arXiv 2507.20673): the mean over the completion of one-sidedly clipped LOG ratios, (M,).

        sign(A) min( sign(A) l_t, sign(A) clip(l_t, -low, high) );    the policy term is -A exp(mean)

    The geometric mean of the tokens' ratios: one runaway token moves it less than an arithmetic mean. low and high are
    distances in log space. token: log p - log p_old. A must be one number per completion.
    """
    side = advantages.sign()
    clipped = side * torch.minimum(side * token, side * token.clamp(-low, high))
    return sequence_means(clipped, sequence)[sequence]


def reinforce(logp: Tensor, advantages: Tensor) -> Tensor:
    """-A log p: the policy gradient without ratio or clip (verl's bypass mode; multiply by a correction off-policy)."""
    return -advantages * logp


def high_entropy_tokens(entropy: Tensor, fraction: float) -> Tensor:
    """The tokens at or above the (1 - fraction) quantile of entropy, (M,) bool (arXiv 2506.01939; trl
    `top_entropy_quantile`): those where the policy chooses. Give the entropies of the WHOLE step."""
    if fraction >= 1.0 or not entropy.numel():
        return torch.ones_like(entropy, dtype=torch.bool)
    ordered = entropy.detach().double().sort().values
    place = (1 - fraction) * (len(ordered) - 1)
    below, above = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    return entropy >= torch.lerp(below, above, place - int(place))


def clip_sides(ratio: Tensor, advantages: Tensor, *, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Which tokens the clip silences, as two boolean tensors (low side, high side): their policy gradient is zero.

    Only the side that the sign of the advantage makes active counts: r below 1 - low with A < 0, r above 1 + high
    with A > 0.
    """
    return (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
