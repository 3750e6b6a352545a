"""The words that all kernels are written with: bfloat16 as bits, a fast exponential, tensors as arrays.

numba knows no bfloat16 and no float8: such tensors go in as their bits (uint16, uint8 for e4m3), `wide` turns an element into
a float32 and `narrow` rounds one back. Both cost a few instructions and vectorise. int8 are the codes of a cache
(ops/cache_codes.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

# Sums may be reordered (that is what lets a loop run on vector lanes); infinities keep their meaning.
FAST = {"reassoc", "contract", "arcp", "nsz"}


@intrinsic
def float_of(typingctx: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def bits_of(typingctx: Any, number: Any) -> Any:
    """The 32 bits of a float32."""
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


def wide(x: Any) -> Any:
    """An element of a float32 or int8 array, or of a bfloat16 or e4m3 array given as bits -> float32."""


@overload(wide, inline="always")
def _wide(x: Any) -> Any:
    def from_bits(x: Any) -> Any:
        return float_of(np.uint32(x) << np.uint32(16))

    def from_e4m3(x: Any) -> Any:  # its exponent and mantissa at their places in a float32, whose exponents begin 120 lower
        bits = np.uint32(x)
        number = float_of((bits & np.uint32(0x7F)) << np.uint32(20) | (bits & np.uint32(0x80)) << np.uint32(24))
        return number * np.float32(2.0**120)

    def as_it_is(x: Any) -> Any:
        return np.float32(x)

    return from_bits if x == types.uint16 else from_e4m3 if x == types.uint8 else as_it_is


def narrow(value: Any, like: Any) -> Any:
    """float32 -> an element of the kind of `like`, to nearest, ties to even; codes stop at their largest, 448 and 127."""


@overload(narrow, inline="always")
def _narrow(value: Any, like: Any) -> Any:
    def rounded(value: Any, like: Any) -> Any:
        bits = bits_of(np.float32(value))
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    def as_e4m3(value: Any, like: Any) -> Any:
        bits = bits_of(np.float32(value))
        size = bits & np.uint32(0x7FFFFFFF)
        code = ((size + np.uint32(0x7FFFF) + ((size >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - np.uint32(120 << 3)
        small = np.uint32(np.rint(min(np.abs(np.float32(value)), np.float32(1.0)) * np.float32(512.0)))  # below 2^-6: steps of 2^-9
        below = np.uint32(size < np.uint32(121 << 23))
        code = below * small + (np.uint32(1) - below) * min(code, np.uint32(0x7E))
        return np.uint8(code | (bits >> np.uint32(24)) & np.uint32(0x80))

    def as_int8(value: Any, like: Any) -> Any:
        return np.int8(min(max(np.rint(np.float32(value)), np.float32(-127.0)), np.float32(127.0)))

    def as_it_is(value: Any, like: Any) -> Any:
        return np.float32(value)

    return {types.uint16: rounded, types.uint8: as_e4m3, types.int8: as_int8}.get(like, as_it_is)


@njit(inline="always", fastmath=FAST)
def exp(x: float) -> float:
    """e^x in float32 without a call: 2^n times a polynomial. Wrong by at most 2e-7 (1 + |x| / 4) of its value; below -87,
    where float32 ends, it stays at e^-87, and above 88 at e^88. NaN stays NaN."""
    y = min(max(np.float32(x), np.float32(-87.0)), np.float32(88.0)) * np.float32(1.4426950408889634)
    n = np.floor(y + np.float32(0.5))  # math.floor would make it an int64: half the lanes
    f = y - n
    p = np.float32(1.5403530e-4)
    p = p * f + np.float32(1.3333558e-3)
    p = p * f + np.float32(9.6181291e-3)
    p = p * f + np.float32(5.5504109e-2)
    p = p * f + np.float32(2.4022651e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + np.float32(1.0)
    return p * float_of(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


def array(t: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as numba takes it: float32 as it is, bfloat16 as uint16."""
    return t.detach().view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.detach().numpy()


@njit(inline="always", fastmath=FAST)
def sigmoid(x: float) -> float:
    """1 / (1 + e^-x). The kernel around it needs error_model="numpy": a check for division by zero has no vector lanes."""
    return np.float32(1.0) / (np.float32(1.0) + exp(-x))


@njit(cache=True, fastmath=FAST, error_model="numpy")
def largest(row: np.ndarray[Any, Any]) -> float:
    """max(row): 64 maxima side by side, since one alone is a chain of comparisons that cannot run on lanes."""
    best, whole = np.full(64, -np.inf, np.float32), len(row) // 64 * 64
    for start in range(0, whole, 64):
        part = row[start : start + 64]
        for i in range(64):
            best[i] = max(best[i], wide(part[i]))
    for half in (32, 16, 8, 4, 2, 1):
        for i in range(half):
            best[i] = max(best[i], best[i + half])
    top = best[0]
    for i in range(whole, len(row)):
        top = max(top, wide(row[i]))
    return top
