"""Rotary position embedding (RoFormer, arXiv 2104.09864, equation 34), half-split layout as on the Hub.

Pair j of a head, (x_j, x_{j + d/2}), is turned by the angle position * f_j with f_j = theta^(-2j/d). A dot product of
two turned vectors depends on the positions only through their difference. (Meta's original Llama files and DeepSeek's
MLA pair neighbours (x_2j, x_2j+1) instead: `interleaved=True`.)

Shapes: x (B, H, T, d) or (B, T, H, d) as `heads_last` says; cos, sin (B or 1, T, r) with r <= d the rotated part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rope_frequencies(dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """(dim / 2,) float32 frequencies f_j = theta^(-2j/dim), after `scaling` of kind default, linear or llama3.

    linear: f / factor (arXiv 2306.15595).  llama3: frequencies whose wavelength exceeds the original context over
    `low_freq_factor` are divided by `factor`, short ones stay, between them interpolate (Llama 3.1 release).
    Raises ValueError for a kind it does not know: guessing would give wrong numbers silently.
    """
    f = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kind = (scaling or {}).get("rope_type", "default")
    if kind == "default":
        return f
    assert scaling is not None
    if kind == "linear":
        return f / scaling["factor"]
    if kind == "llama3":
        original = scaling["original_max_position_embeddings"]
        turns = original * f / (2 * math.pi)  # how often the pair turns within the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow pair, fully scaled; 1: fast pair, untouched
        return (1 - keep) * f / scaling["factor"] + keep * f
    raise ValueError(f"rope_type {kind!r} is not supported (default, linear, llama3 are)")


def rope_angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """positions (..., T) int -> cos, sin (..., T, dim): each angle stands twice, once for each half."""
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, heads_last: bool = False, interleaved: bool = False) -> Tensor:
    """Turns the first r = cos.shape[-1] entries of every head; the rest passes through.

    x (B, H, T, d), or (B, T, H, d) with `heads_last`; cos, sin (B or 1, T, r) as `rope_angles` makes them.
    """
    cos, sin = (cos.unsqueeze(-2), sin.unsqueeze(-2)) if heads_last else (cos.unsqueeze(1), sin.unsqueeze(1))
    r = cos.shape[-1]
    turn, rest = (x, None) if r == x.shape[-1] else (x[..., :r], x[..., r:])
    if interleaved:  # (2j, 2j+1) -> (j, j + r/2): queries and keys are permuted alike, their dot product is unchanged
        turn = turn.unflatten(-1, (r // 2, 2)).transpose(-1, -2).flatten(-2)
    turned = _Turn.apply(turn, cos, sin)
    return turned if rest is None else torch.cat((turned, rest), -1)


def apply_rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, as most code writes it: x (B, H, T, d), half-split, every entry turned."""
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]


class _Turn(torch.autograd.Function):
    """Three passes: x cos, x rolled by half a head, their sum. A rotation's gradient is turned back by the same angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # small: one row a position, for all heads
        ctx.save_for_backward(cos, signed)
        return (x * cos).addcmul_(x.roll(half, -1), signed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (g,), (cos, signed) = grads, ctx.saved_tensors
        return (g * cos).addcmul_(g.roll(g.shape[-1] // 2, -1), signed, value=-1), None, None
