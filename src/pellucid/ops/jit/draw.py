"""The next token of every row in one pass: greedy, or by inverse transform of a counter-based uniform number.

Legend: B rows, V vocabulary. Logits are float32, or bfloat16 as bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from pellucid.ops.jit.lanes import FAST, exp, wide

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


@njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True)
def draw(logits: Array, temperature: Array, seeds: Array, step: int, tokens: Array, logprobs: Array) -> None:
    """tokens (B,) int64 of logits (B, V), and their log-probabilities (B,) at that temperature; temperature 0: the largest
    logit, at temperature 1. A row without a finite largest logit gives token -1. The sums are float64 over blocks of float32: a row's draw never depends on other rows."""
    B, V = logits.shape
    blocks = (V + BLOCK - 1) // BLOCK
    for b in prange(B):
        row, heat = logits[b], temperature[b]
        top = np.float32(-np.inf)
        for i in range(V):
            top = max(top, wide(row[i]))
        scale = np.float32(1) if heat == 0 else np.float32(1) / max(heat, np.float32(1e-30))
        weights, sums = np.empty(V, np.float32), np.empty(blocks, np.float64)
        for k in range(blocks):
            total = np.float32(0)
            for i in range(k * BLOCK, min(V, (k + 1) * BLOCK)):
                y = (wide(row[i]) - top) * scale
                weights[i] = exp(y) if y > np.float32(-87) else np.float32(0)
                total += weights[i]
            sums[k] = total
        whole = sums.sum()
        token = 0
        if heat == 0:
            while token < V - 1 and wide(row[token]) != top:
                token += 1
        else:
            left, k = uniform(seeds[b], step) * whole, 0
            while k < blocks - 1 and left >= sums[k]:
                left -= sums[k]
                k += 1
            token, last = k * BLOCK, min(V, (k + 1) * BLOCK) - 1
            while token < last and left >= weights[token]:
                left -= weights[token]
                token += 1
            while token > 0 and weights[token] == 0:  # rounding may have led past the last token that has any weight
                token -= 1
        tokens[b] = token if top > -np.inf and weights[token] > 0 else -1
        logprobs[b] = (wide(row[token]) - top) * scale - np.log(whole)
