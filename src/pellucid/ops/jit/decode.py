"""One new token for every sequence of a batch, between the matrix products: norms, rotation, cache, attention, gate.

Legend: B sequences, D model width, H query heads, K key/value heads, G = H / K, d head dim, R columns of the cache,
I width of the feed-forward layer, P positions. Arrays are float32, or bfloat16 as bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit, prange

from pellucid.ops.compiled import kernel_cache
from pellucid.ops.jit.lanes import FAST, exp, largest, narrow, sigmoid, wide

Array = np.ndarray[Any, Any]


@njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True, nogil=True)
def add_and_norm(x: Array, delta: Array, weight: Array, eps: float, out: Array) -> None:
    """x (B, D) float32 += delta (B, D);  out (B, D) = weight * x / sqrt(mean(x^2) + eps). The residual stays in float32."""
    D = x.shape[1]
    for b in prange(x.shape[0]):
        total = np.float32(0)
        for i in range(D):
            x[b, i] += wide(delta[b, i])
            total += x[b, i] * x[b, i]
        r = np.float32(1) / np.sqrt(total / np.float32(D) + np.float32(eps))
        for i in range(D):
            out[b, i] = narrow(x[b, i] * r * wide(weight[i]), out[b, i])


@njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True, nogil=True)
def gate(gate_up: Array, out: Array) -> None:
    """SwiGLU: gate_up (B, 2I) -> out (B, I) = silu(gate) * up."""
    width = out.shape[1]
    for b in prange(out.shape[0]):
        for i in range(width):
            g = wide(gate_up[b, i])
            out[b, i] = narrow(g * sigmoid(g) * wide(gate_up[b, width + i]), out[b, i])


@njit(fastmath=FAST, cache=True, inline="always")
def _read_head(row: Array, offset: int, weight: Array, eps: float, cos: Array, sin: Array, scale: float, head: Array, d: int) -> None:
    """head (d,) = scale * rope(norm(row[offset : offset + d])): half-split rotation of the first 2 * len(cos) entries."""
    total = np.float32(0)
    for i in range(d):
        head[i] = wide(row[offset + i])
        total += head[i] * head[i]
    if weight.size:
        r = np.float32(1) / np.sqrt(total / np.float32(d) + np.float32(eps))
        for i in range(d):
            head[i] *= r * wide(weight[i])
    half = cos.size
    for j in range(half):
        a, b = head[j], head[j + half]
        head[j] = a * cos[j] - b * sin[j]
        head[j + half] = b * cos[j] + a * sin[j]
    for i in range(d):
        head[i] *= np.float32(scale)


@njit(fastmath=FAST, cache=True, inline="always")
def exp_from_top(scores: Array) -> float:
    """scores become exp(scores - max); returns their sum."""
    top = largest(scores)
    total = np.float32(0)
    for s in range(scores.size):
        scores[s] = exp(scores[s] - top)
        total += scores[s]
    return total


@njit(fastmath=FAST, cache=True, inline="always")
def dots(head: Array, rows: Array, start: int, scores: Array, d: int) -> None:
    """scores[s] = head . rows[start + s]; four rows at a time, so that their sums run side by side."""
    n, s = scores.size, 0
    while s + 4 <= n:
        a = b = c = e = np.float32(0)
        for i in range(d):
            x = head[i]
            a += x * wide(rows[start + s, i])
            b += x * wide(rows[start + s + 1, i])
            c += x * wide(rows[start + s + 2, i])
            e += x * wide(rows[start + s + 3, i])
        scores[s], scores[s + 1], scores[s + 2], scores[s + 3] = a, b, c, e
        s += 4
    while s < n:
        a = np.float32(0)
        for i in range(d):
            a += head[i] * wide(rows[start + s, i])
        scores[s] = a
        s += 1


@njit(fastmath=FAST, cache=True, inline="always")
def mix(shares: Array, rows: Array, start: int, mixed: Array, d: int) -> None:
    """mixed (d,) = sum over s of shares[s] * rows[start + s], four rows at a time."""
    mixed[:] = np.float32(0)
    n, s = shares.size, 0
    while s + 4 <= n:
        a, b, c, e = shares[s], shares[s + 1], shares[s + 2], shares[s + 3]
        for i in range(d):
            mixed[i] += (a * wide(rows[start + s, i]) + b * wide(rows[start + s + 1, i])
                         + c * wide(rows[start + s + 2, i]) + e * wide(rows[start + s + 3, i]))
        s += 4
    while s < n:
        for i in range(d):
            mixed[i] += shares[s] * wide(rows[start + s, i])
        s += 1


@cache
def attend_kernel(d: int, G: int) -> Callable[..., None]:
    """`attend` for heads of d entries and G query heads to a key/value head.

    Both are compiled in: loops of a known length run on whole vectors (as arguments they cost a third of the speed). The
    kernel may close over numbers only: numba finds a closure in its cache by what it closes over.
    """
    with kernel_cache():
        return _attend_kernel(d, G)


def _attend_kernel(d: int, G: int) -> Callable[..., None]:

    @njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True, nogil=True)
    def attend(
        qkv: Array, q_weight: Array, k_weight: Array, eps: float, cos: Array, sin: Array, first: Array, t: int, window: int,
        scale: float, keys: Array, values: Array, out: Array,
    ) -> None:
        """Reads q, k, v of one token, norms and turns q and k, writes column t of the cache, attends to columns up to t.

        qkv (B, (H + 2K) d), keys and values (B, K, R, d), out (B, H d); q_weight, k_weight (d,) or empty: no norm.
        cos, sin (P, r / 2) by position; sequence b begins at column first[b]. window 0: none.
        """
        B, K = keys.shape[0], keys.shape[1]
        for pair in prange(B * K):
            b, kh = pair // K, pair % K
            row, position = qkv[b], t - first[b]
            head = np.empty(d, np.float32)
            _read_head(row, (K * G + kh) * d, k_weight, eps, cos[position], sin[position], 1.0, head, d)
            mine, theirs = keys[b, kh], values[b, kh]
            for i in range(d):
                mine[t, i] = narrow(head[i], mine[t, i])
                theirs[t, i] = narrow(wide(row[(K * G + K + kh) * d + i]), theirs[t, i])
            start = first[b] if window == 0 else max(first[b], t + 1 - window)
            scores = np.empty(t + 1 - start, np.float32)
            mixed = np.empty(d, np.float32)
            for g in range(G):
                _read_head(row, (kh * G + g) * d, q_weight, eps, cos[position], sin[position], scale, head, d)
                dots(head, mine, start, scores, d)
                total = exp_from_top(scores)
                mix(scores, theirs, start, mixed, d)
                for i in range(d):
                    out[b, (kh * G + g) * d + i] = narrow(mixed[i] / total, out[b, i])

    return attend  # type: ignore[no-any-return]
