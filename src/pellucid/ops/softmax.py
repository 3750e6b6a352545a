"""Softmax, three ways: safe, in log space, and online.

The textbook form exp(x_i) / sum_j exp(x_j) overflows as soon as one x_i is large. Subtracting the maximum m changes
nothing mathematically (numerator and denominator are both divided by e^m) and keeps every exponent at or below 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Safe softmax along `dim`; same shape and dtype as x.

    A slice that is entirely -inf (a query that may see nothing) gives zeros instead of NaN: attention over the empty
    set adds nothing. `torch.softmax` returns NaN there.
    """
    m = x.amax(dim, keepdim=True)
    e = torch.exp(x - m.masked_fill(m == -torch.inf, 0.0))
    return e / e.sum(dim, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """log softmax(x) = x - m - log sum exp(x - m), without ever taking the logarithm of a rounded-off 0."""
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def online_softmax(x: Tensor, block: int = 128) -> Tensor:
    """Softmax over the last dimension, reading x in blocks (Milakov & Gimelshein 2018, arXiv 1805.02867, algorithm 3).

    x: (..., N) -> (..., N). One pass keeps the running maximum m and the running sum l = sum exp(x_j - m). When a new
    block raises the maximum from m to m', the old sum is worth l * exp(m - m'). FlashAttention is this recurrence
    with a weighted sum of values carried along.
    """
    m = torch.full(x.shape[:-1], -torch.inf, dtype=x.dtype, device=x.device)
    total = torch.zeros_like(m)
    for piece in x.split(block, dim=-1):
        new_m = torch.maximum(m, piece.amax(-1))
        base = new_m.masked_fill(new_m == -torch.inf, 0.0)  # nothing visible yet: keep 0, not NaN
        total = total * torch.exp(m - base) + torch.exp(piece - base[..., None]).sum(-1)
        m = new_m
    base = m.masked_fill(m == -torch.inf, 0.0)
    return torch.exp(x - base[..., None]) / total.clamp_min(torch.finfo(x.dtype).tiny)[..., None]
