"""Routers: which experts a token goes to, and with what weight.

Legend: N tokens, E experts, k chosen for each token. Scores and weights are float32 at least, whatever the logits are.

    score           over               in
    softmax         all experts        Mixtral, Qwen MoE, DeepSeek-V2
    sigmoid         each expert alone  DeepSeek-V3 (section 2.1.2 of arXiv 2412.19437)
    top_k_softmax   the chosen only    gpt-oss: chosen by their logits

The order of the k experts of a token means nothing to the result; the highest score comes first, so that a limited
capacity can serve first choices first.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = ("softmax", "sigmoid", "top_k_softmax")
GROUP_SCORES = ("max", "top2")


def route(
    logits: Tensor, top_k: int, *, score: str = "softmax", select_bias: Tensor | None = None, groups: int = 1, top_groups: int = 1,
    group_score: str = "max", renormalize: bool = False, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """logits (N, E) -> weights (N, k), chosen (N, k) int64.

    select_bias (E,): added to the scores for choosing; the weights come from the scores without it. groups: experts stand
    in so many groups of equal size, and only the best `top_groups` of each token can be chosen from: ranked by their best
    score (max: DeepSeek-V2) or by the sum of their two best (top2: V3). renormalize: a token's weights add up to 1 (before
    `scale`).
    """
    scores = router_scores(logits, score)
    choice = scores.detach() if select_bias is None else scores.detach() + select_bias
    if groups > 1:
        choice = within_groups(choice, groups, top_groups, group_score)
    chosen = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, chosen)
    if score == "top_k_softmax":
        weights = weights.softmax(-1)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
    return (weights if scale == 1 else weights * scale), chosen


def router_scores(logits: Tensor, score: str) -> Tensor:
    """What is compared, and weighed with: (N, E) -> (N, E)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score == "softmax":
        return wide.softmax(-1)
    return wide.sigmoid() if score == "sigmoid" else wide


def within_groups(choice: Tensor, groups: int, top_groups: int, group_score: str) -> Tensor:
    """(N, E) with -inf for every expert outside the token's best groups. Not 0: a score with a bias may be negative."""
    by_group = choice.unflatten(-1, (groups, -1))  # (N, groups, E / groups)
    best = by_group.topk(1 if group_score == "max" else min(2, by_group.shape[-1]), dim=-1).values.sum(-1)
    outside = torch.ones_like(best, dtype=torch.bool).scatter(1, best.topk(top_groups, dim=-1).indices, False)
    return by_group.masked_fill(outside[..., None], -torch.inf).flatten(1)


def expert_choice(logits: Tensor, per_expert: int, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Experts choose tokens (arXiv 2202.09368, equation 1): logits (N, E) -> weights (E, c), tokens (E, c), c = per_expert.
    real (N,): False for padding, which is not chosen while there are others.

    Every expert does the same work by construction, and a token gets as many experts as want it. It looks at the whole
    batch, later tokens included: a model trained so is no causal model, and decoding token by token gives other numbers.
    """
    scores = router_scores(logits, "softmax")
    if real is not None:
        scores = scores.masked_fill(~real[:, None], 0)
    weights, tokens = scores.T.topk(per_expert, dim=-1)
    return weights, tokens
