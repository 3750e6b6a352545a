"""4-bit numbers, two to a byte: codes 0..15, of which 8 stands for zero, with a scale for each group of a row.

    w[n, k] = (code[n, k] - 8) * scale[n, k // group]            (the scheme of GGUF's Q4_0, with bfloat16 scales)

The byte at [n, k] holds the codes 2k (low half) and 2k + 1 of row n. A scale has 8 significant bits, so the product is
exact in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def int4_pack(codes: Tensor) -> Tensor:
    """codes (..., K) uint8 in 0..15, K even -> (..., K / 2) uint8"""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def int4_unpack(packed: Tensor) -> Tensor:
    """(..., K / 2) uint8 -> codes (..., K) uint8"""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def int4_decode(codes: Tensor, scale: Tensor) -> Tensor:
    """codes (..., K), scale (..., K / group) -> (..., K) float32"""
    groups = codes.view(*scale.shape, -1).float().sub_(8)
    return groups.mul_(scale.float()[..., None]).flatten(-2)
