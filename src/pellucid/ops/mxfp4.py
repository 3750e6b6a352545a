"""MXFP4 (Open Compute Project, Microscaling Formats 1.0): blocks of 32 four-bit numbers that share a power of two.

A number is E2M1: a sign, two bits of exponent, one of mantissa. A scale is E8M0: one byte, 2^(byte - 127); 255 is NaN. The
published gpt-oss files keep their experts so: `<name>_blocks` (..., G, 16), two numbers a byte, the low half first, and
`<name>_scales` (..., G), for a matrix (..., 32 G) with the inputs in its last dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the sixteen codes stand for."""


def mxfp4_decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """blocks (..., G, 16) uint8, scales (..., G) uint8 -> (..., 32 G). Exact in float32 and bfloat16 (scales of 2^128 apart)."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape != (*scales.shape, 16):
        raise ValueError(f"blocks {tuple(blocks.shape)} {blocks.dtype} and scales {tuple(scales.shape)} {scales.dtype} do not fit")
    pairs = torch.tensor([(E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256)], dtype=dtype, device=blocks.device)
    powers = torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [torch.nan], dtype=torch.float64, device=blocks.device).to(dtype)
    numbers = pairs[blocks.int()].flatten(-2)  # (..., G, 32)
    return numbers.mul_(powers[scales.int()][..., None]).flatten(-2)
