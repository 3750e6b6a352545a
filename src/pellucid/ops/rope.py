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

BY_LENGTH = ("dynamic", "longrope", "qwen-ntk")
"""The kinds whose frequencies depend on how long the sequence is. Keys that a cache holds keep the frequencies that they
were turned by: with a cache, logits change a little where a border is crossed, here as in transformers."""


def rope_frequencies(dim: int, theta: float, scaling: Mapping[str, Any] | None = None, length: int = 0) -> Tensor:
    """(dim / 2,) float32 frequencies f_j = theta^(-2j/dim), after `scaling`, whose fields are config.json's.

    linear: f / factor (arXiv 2306.15595).  llama3: frequencies whose wavelength exceeds the original context over
    `low_freq_factor` are divided by `factor`, short ones stay, between them interpolate (Llama 3.1 release).
    yarn: the same with a ramp over j instead of wavelengths (arXiv 2309.00071; with attention_factor 1 it is NTK by parts).
    dynamic: a larger theta, as far as `length` exceeds the original context.  longrope: f_j over a number for each j,
    of one list up to the original context and of another beyond (arXiv 2402.13753).  qwen-ntk: a larger theta too, in steps where
    `length` passes the original context and its doublings (Qwen v1).
    Raises ValueError for a kind it does not know: guessing would give wrong numbers silently.
    """
    scaling = scaling or {}
    kind, original = scaling.get("rope_type", "default"), scaling.get("original_max_position_embeddings", 0)
    if kind == "qwen-ntk":
        alpha = max(2 ** math.ceil(math.log2(length / original) + 1) - 1, 1) if length else 1
        theta = theta * alpha ** (dim / (dim - 2))
    if kind == "dynamic":
        stretch = scaling["factor"] * max(length, original) / original - (scaling["factor"] - 1)
        theta = theta * stretch ** (dim / (dim - 2))
    # In the order of operations that models are trained with: where positions are large, the last bit of f_j counts.
    periods = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    f = 1.0 / periods
    if kind in ("default", "dynamic", "qwen-ntk"):
        return f
    if kind == "linear":
        return f / scaling["factor"]
    if kind == "longrope":
        return 1.0 / (torch.tensor(scaling["long_factor" if length > original else "short_factor"]) * periods)
    if kind == "yarn":
        fast = 1 - _yarn_ramp(dim, theta, scaling)
        return 1.0 / (scaling["factor"] * periods) * (1 - fast) + f * fast
    if kind == "llama3":
        turns = original / (2 * math.pi / f)  # how often the pair turns within the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow pair, fully scaled; 1: fast pair, untouched
        return (1 - keep) * f / scaling["factor"] + keep * f
    raise ValueError(f"rope_type {kind!r} is not supported (default, linear, llama3, yarn, dynamic, longrope, qwen-ntk are)")


def _yarn_ramp(dim: int, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """(dim / 2,) 0 for fast pairs, which stay; 1 for slow ones, which are scaled. The ramp runs between the pairs that
    turn beta_fast and beta_slow times within the original context."""
    original = scaling["original_max_position_embeddings"]
    low, high = (dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                 for turns in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def rope_attention_factor(scaling: Mapping[str, Any], context: int) -> float:
    """What cos and sin are multiplied by, so that attention over longer contexts stays as sharp: YaRN's 1/sqrt(t) = 0.1
    ln factor + 1 (equation 22), LongRoPE's sqrt(1 + ln factor / ln original). 1 for all other kinds.

    context: `max_position_embeddings`, whose ratio to the original context is LongRoPE's factor if none is given.
    """
    kind, original = scaling.get("rope_type", "default"), scaling.get("original_max_position_embeddings", 0)
    if kind not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    factor = scaling.get("factor") or context / original
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if above and below:  # DeepSeek; its attention then scales all of the scores by the lower one's square
        return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def rope_angles(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype = torch.float32, factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """positions (..., T) int -> cos, sin (..., T, dim), times `factor`: each angle stands twice, once for each half."""
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), -1)
    cos, sin = (angles.cos(), angles.sin()) if factor == 1 else (angles.cos() * factor, angles.sin() * factor)
    return cos.to(dtype), sin.to(dtype)


def log_n_scale(positions: Tensor, trained: int) -> Tensor:
    """positions (..., T) from 0 -> max(1, log(position + 1) / log(trained)): queries grow so that attention over more keys
    than in training stays as sharp (Qwen v1; arXiv 2202.12172)."""
    return (torch.log((positions + 1).float()) / math.log(trained)).clamp_min(1.0)


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
