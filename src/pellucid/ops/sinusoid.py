"""Sinusoidal positions of the original Transformer (arXiv 1706.03762, section 3.5)."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoids(positions: Tensor, dim: int, interleaved: bool = True) -> Tensor:
    """PE(p, 2i) = sin(p / 10000^(2i / D)), PE(p, 2i + 1) = cos(p / 10000^(2i / D)):  (...,) int -> (..., D) float32.

    interleaved False: all sines in front of all cosines, as Marian has them. The angles are float64: in float32 that of position
    500 would be off by 3e-5.
    """
    frequencies = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angles = positions[..., None].double() * frequencies
    both = angles.sin(), angles.cos()
    return (torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)).float()
