"""The critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(values: Tensor, returns: Tensor, old: Tensor | None = None, clip: float | None = None) -> Tensor:
    """1/2 max( (V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2 ) at every token (PPO as in arXiv 2005.12729).

    values: the critic now, with gradient; old: the critic at the rollout, whose values made the returns. Without
    `clip` it is half the squared error. All of one shape; sum it with `aggregate`, by tokens.
    """
    error = (values - returns.detach()).square()
    if clip is None or old is None:
        return error / 2
    near = old.detach() + (values - old.detach()).clamp(-clip, clip)
    return torch.maximum(error, (near - returns.detach()).square()) / 2


def value_clipped(values: Tensor, returns: Tensor, old: Tensor, clip: float) -> Tensor:
    """Where the clipped branch is the larger: the critic gets no gradient there. (bool, same shape)"""
    near = old + (values - old).clamp(-clip, clip)
    return (near - returns).square() > (values - returns).square()
