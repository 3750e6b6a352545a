"""The next token of every row in one pass: greedy, or by inverse transform of a counter-based uniform number.

Legend: B rows, V vocabulary. Logits are float32, or bfloat16 as bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from pellucid.ops.jit.lanes import FAST, exp, largest, wide

Array = np.ndarray[Any, Any]
BLOCK = 64  # weights whose sum is kept, so that the search steps over whole blocks


@njit(cache=True, inline="always")
def _mix(z: Any) -> Any:
    """splitmix64 (Steele et al. 2014); arithmetic of uint64 wraps around."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True, inline="always")
def uniform(seed: int, step: int) -> float:
    """A float64 in [0, 1) that depends on nothing but these two numbers."""
    return np.float64(_mix(_mix(np.uint64(seed)) + np.uint64(step)) >> np.uint64(11)) * 2.0**-53


@njit(fastmath=FAST, cache=True, nogil=True)
def greedy(row: Array, top: float) -> int:
    """The first place of `top`, the largest of row (V,); -1 where it is infinite or any entry is not a number."""
    strange = np.int32(0)
    for i in range(row.size):
        strange += np.int32(wide(row[i]) != wide(row[i]))
    if strange == 0 and np.isfinite(top):
        for i in range(row.size):
            if wide(row[i]) == top:
                return i
    return -1


@njit(fastmath=FAST, cache=True, nogil=True)
def chosen(weights: Array, sums: Array, point: float) -> int:
    """The token at which the running sum of weights (V,) passes `point`; sums: of each BLOCK of weights."""
    left, k = point, 0
    while k < sums.size - 1 and left >= sums[k]:
        left -= sums[k]
        k += 1
    token, last = k * BLOCK, min(weights.size, (k + 1) * BLOCK) - 1
    while token < last and left >= weights[token]:
        left -= weights[token]
        token += 1
    while token > 0 and weights[token] == 0:  # rounding may have led past the last token that has any weight
        token -= 1
    return token


@njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True, nogil=True)
def draw(logits: Array, temperature: Array, seeds: Array, steps: Array, tokens: Array, logprobs: Array) -> None:
    """tokens (B,) int64 of logits (B, V), each its row's `steps[b]`-th draw with `seeds[b]`; temperature 0: the largest logit, the first of equal ones.

    logprobs (B,): their log-probabilities at that temperature (at 1 for temperature 0), or (0,) where nobody asked.
    A row whose largest logit is not finite, or that holds NaN, gives token -1. The sums are float64 over blocks of
    float32: a row's draw never depends on other rows.
    """
    B, V = logits.shape
    blocks = (V + BLOCK - 1) // BLOCK
    for b in prange(B):
        row, heat = logits[b], temperature[b]
        top = largest(row)
        if heat == 0 and not logprobs.size:
            tokens[b] = greedy(row, top)
            continue
        scale = np.float32(1) if heat == 0 else np.float32(1) / max(heat, np.float32(1e-30))
        weights, sums = np.empty(V, np.float32), np.empty(blocks, np.float64)
        for k in range(blocks):
            start, stop, total = k * BLOCK, min(V, (k + 1) * BLOCK), np.float32(0)
            for i in range(start, stop):
                y = (wide(row[i]) - top) * scale
                weights[i] = np.float32(0) if y <= np.float32(-87) else exp(y)  # NaN stays NaN
            # A loop of its own. Where the one above also summed, LLVM took its scalar form, which adds in another order, whenever the
            # two arrays lay close enough that they might overlap: the last bit depended on where memory was free.
            for i in range(start, stop):
                total += weights[i]
            sums[k] = total
        whole = sums.sum()
        tokens[b] = -1
        if whole > 0:  # not NaN
            token = greedy(row, top) if heat == 0 else chosen(weights, sums, uniform(seeds[b], steps[b]) * whole)
            tokens[b] = token
            if logprobs.size:
                logprobs[b] = (wide(row[token]) - top) * scale - np.log(whole)
