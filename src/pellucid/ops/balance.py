"""Keeping experts equally busy: auxiliary losses, and the bias that needs none.

Legend: N tokens, E experts, k chosen for each. logits (N, E) of a router, before scores are made; chosen (N, k); real (N,)
bool, False for padding, None if there is none. Several layers are given as lists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pellucid.ops.router import router_scores


def load(chosen: Tensor, experts: int, real: Tensor | None = None) -> Tensor:
    """chosen (N, k) -> (E,) float32: how many tokens each expert was given."""
    ids = chosen if real is None else chosen[real]
    return ids.flatten().bincount(minlength=experts).float()


def switch_loss(logits: Sequence[Tensor], chosen: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
    """E sum_e f_e P_e (Switch, arXiv 2101.03961, equations 4 to 6): f_e is the share of tokens that chose e (they add up to
    k), P_e the mean softmax probability of e. The tokens of all layers stand in one row, as in transformers.

    Its smallest value for even probabilities is k. f has no gradient: P is what moves.
    """
    E = logits[0].shape[-1]
    rows = sum(len(layer) if real is None else int(real.sum()) for layer in logits)
    f = torch.stack([load(layer, E, real) for layer in chosen]).sum(0) / rows
    P = torch.stack([_real(router_scores(layer, "softmax"), real).sum(0) for layer in logits]).sum(0) / rows
    return E * (f * P).sum()


def sequence_loss(logits: Tensor, chosen: Tensor, rows: int, score: str = "sigmoid", real: Tensor | None = None) -> Tensor:
    """DeepSeek-V3's balance within each sequence (arXiv 2412.19437, equations 17 to 20), the mean over `rows` sequences of
    sum_e f_e P_e, with f_e = E / (k T) times the tokens of the sequence that chose e, and P_e the mean of its score divided
    by the sum of all experts' scores. 1 when both are even. logits (rows T, E), sequence after sequence.
    """
    E, k = logits.shape[-1], chosen.shape[-1]
    wide = router_scores(logits, score)
    shares = (wide / wide.sum(-1, keepdim=True)).view(rows, -1, E)
    given = torch.zeros_like(wide).scatter(1, chosen, 1.0).view(rows, -1, E)
    lengths = torch.full((rows, 1), float(shares.shape[1]), device=logits.device)
    if real is not None:
        seen = real.view(rows, -1, 1)
        shares, given, lengths = shares * seen, given * seen, seen.sum(1).clamp_min(1)
    return ((E / k) * (given.sum(1) / lengths) * (shares.sum(1) / lengths)).sum(-1).mean()


def z_loss(logits: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
    """Mean of (log sum_e e^logit)^2 over the tokens of all layers (ST-MoE, arXiv 2202.08906, equation 5): keeps logits small."""
    wide = [_real(layer, real).to(torch.promote_types(layer.dtype, torch.float32)) for layer in logits]
    return torch.cat([layer.logsumexp(-1).square() for layer in wide]).mean()


def updated_bias(bias: Tensor, load: Tensor, speed: float) -> Tensor:
    """bias + speed * sign(mean load - load): what an expert lacks, it is chosen more easily for in the next step.

    Balancing without an auxiliary loss (arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2): after
    the optimizer's step, outside of autograd, from the load (E,) of the whole step.
    """
    return bias + speed * torch.sign(load.mean() - load)


def _real(rows: Tensor, real: Tensor | None) -> Tensor:
    return rows if real is None else rows[real]
