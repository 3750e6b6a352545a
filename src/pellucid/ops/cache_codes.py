"""How a cache keeps numbers: in float32 or bfloat16 as they are, or in 8 bits with a scale for each token and head.

    f32    as computed                                                              4 bytes a number
    bf16   wrong by at most 2^-8 of the number                                      2
    fp8    float8_e4m3fn times a scale: at most 2^-4 of the number, or, of numbers
           below amax / 28,672, at most amax / 458,752                              1, and 2 for each vector
    int8   whole numbers from -127 to 127 times a scale: at most amax / 253         1, and 2 for each vector

amax: the largest entry of the vector that a token leaves in one head (of a latent, there is one head). A scale is that
vector's own because a token is written once, when those behind it are not known: nothing is ever rewritten, so that what
stands in a block does not depend on what came in which chunk, and blocks can be shared. It is amax / largest code, in
bfloat16, and the codes are made with the rounded scale: its rounding adds no error.

States of constant size (linear attention, the inputs of its convolution) are not kept in these formats: an entry is
written once and read, a state is read and written by every token, and would be rounded again each time, errors adding up
over the whole text; and it does not grow, so that there is little to win. Legend: K heads, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.errors import BadInput
from pellucid.runtime import DTYPES

TINY = 1e-30
"""Smallest scale: a vector of zeros has one too."""


@dataclass(frozen=True)
class CacheCodes:
    """kept: the dtype in memory (e4m3 as its bits).  top: the largest code, None where numbers are kept as they are."""

    name: str
    kept: torch.dtype
    top: float | None = None

    def encode(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """t (..., K, d) -> codes (..., K, d), scales (..., K) or None."""
        if self.top is None:
            return t.to(self.kept), None
        wide = t.float()
        scales = (wide.abs().amax(-1) / self.top).clamp_min(TINY).bfloat16()
        codes = wide / scales.float()[..., None]
        if self.kept == torch.int8:
            return codes.round_().clamp_(-self.top, self.top).to(torch.int8), scales
        return codes.clamp_(-self.top, self.top).to(torch.float8_e4m3fn).view(torch.uint8), scales

    def decode(self, codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        """codes (..., K, d), scales (..., K) -> (..., K, d) of that dtype."""
        if scales is None:
            return codes.to(dtype)
        numbers = codes.view(torch.float8_e4m3fn) if self.kept == torch.uint8 else codes
        return (numbers.float() * scales.float()[..., None]).to(dtype)

    def bytes(self, heads: int, width: int) -> int:
        """Of what one token leaves."""
        return heads * (width * self.kept.itemsize + 2 * (self.top is not None))


FORMATS = {"fp8": CacheCodes("fp8", torch.uint8, 448.0), "int8": CacheCodes("int8", torch.int8, 127.0)}
SHORT = {"f32": "float32", "fp32": "float32", "bf16": "bfloat16"}
CACHE_DTYPES = ("auto", "f32", "bf16", "fp8", "int8")


def cache_codes(name: str, computed: torch.dtype = torch.float32) -> CacheCodes:
    """The format of that name.  computed: what `auto` stands for, the dtype that the model computes in."""
    if name == "auto":
        return CacheCodes(str(computed).removeprefix("torch."), computed)
    if name in FORMATS:
        return FORMATS[name]
    full = SHORT.get(name, name)
    if full not in DTYPES:
        raise BadInput(f"unknown dtype {name!r} of a cache", next=f"one of {', '.join(CACHE_DTYPES[1:])}")
    return CacheCodes(full, getattr(torch, full))
