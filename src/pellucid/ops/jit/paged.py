"""Attention that reads a paged cache where it lies: every token of a step is a row, whatever request it belongs to.

Legend: N tokens of the step, B requests, H query heads, K key/value heads, G = H / K, d head dim, S slots of the longest request,
P positions. A token at position p of request b reads slots[b, 0 .. p]. Arrays are float32, or bfloat16 as bits; keys and values also
codes of 8 bits with a scale for each slot and head (ops/cache_codes.py), which a row's sum is multiplied by, not its entries.
Scales are (slots, K) bfloat16 as bits, or empty.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit, prange

from pellucid.ops.cache_codes import TINY
from pellucid.ops.compiled import kernel_cache
from pellucid.ops.jit.decode import _read_head, exp_from_top
from pellucid.ops.jit.lanes import FAST, narrow, wide

Array = np.ndarray[Any, Any]


@njit(fastmath=FAST, cache=True, inline="always")
def dots(head: Array, keys: Array, kh: int, slots: Array, scores: Array, d: int) -> None:
    """scores[s] = head . keys[slots[s], kh]; four rows at a time, so that their sums run side by side."""
    n, s = scores.size, 0
    while s + 4 <= n:
        p, q, r, t = keys[slots[s], kh], keys[slots[s + 1], kh], keys[slots[s + 2], kh], keys[slots[s + 3], kh]
        a = b = c = e = np.float32(0)
        for i in range(d):
            x = head[i]
            a += x * wide(p[i])
            b += x * wide(q[i])
            c += x * wide(r[i])
            e += x * wide(t[i])
        scores[s], scores[s + 1], scores[s + 2], scores[s + 3] = a, b, c, e
        s += 4
    while s < n:
        p, a = keys[slots[s], kh], np.float32(0)
        for i in range(d):
            a += head[i] * wide(p[i])
        scores[s] = a
        s += 1


@njit(fastmath=FAST, cache=True, inline="always")
def mix(shares: Array, values: Array, kh: int, slots: Array, mixed: Array, d: int) -> None:
    """mixed (d,) = sum over s of shares[s] * values[slots[s], kh], four rows at a time."""
    mixed[:] = np.float32(0)
    n, s = shares.size, 0
    while s + 4 <= n:
        p, q, r, t = values[slots[s], kh], values[slots[s + 1], kh], values[slots[s + 2], kh], values[slots[s + 3], kh]
        a, b, c, e = shares[s], shares[s + 1], shares[s + 2], shares[s + 3]
        for i in range(d):
            mixed[i] += a * wide(p[i]) + b * wide(q[i]) + c * wide(r[i]) + e * wide(t[i])
        s += 4
    while s < n:
        p = values[slots[s], kh]
        for i in range(d):
            mixed[i] += shares[s] * wide(p[i])
        s += 1


@njit(fastmath=FAST, cache=True, nogil=True)
def rescale(scores: Array, scales: Array, kh: int, slots: Array) -> None:
    """scores[s] *= scales[slots[s], kh]"""
    for s in range(scores.size):
        scores[s] *= wide(scales[slots[s], kh])


@njit(fastmath=FAST, error_model="numpy", cache=True, nogil=True)
def keep(head: Array, into: Array, scales: Array, slot: int, kh: int, top: float, d: int) -> None:
    """into[slot, kh] = head (d,), in codes up to `top` where there are scales."""
    row, over = into[slot, kh], np.float32(1)
    if scales.size:
        largest, strange = np.float32(0), np.int32(0)
        for i in range(d):
            largest = max(largest, abs(head[i]))
            strange += np.int32(head[i] != head[i])
        if strange:  # codes cannot hold it, and the largest may pass it over
            largest = np.float32(np.nan)
        scale = narrow(largest if strange else max(largest / np.float32(top), np.float32(TINY)), scales[slot, kh])
        scales[slot, kh] = scale
        over = np.float32(1) / wide(scale)
    for i in range(d):
        row[i] = narrow(head[i] * over, row[i])


@cache
def attend_kernels(d: int, G: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """(write, attend) for heads of d entries and G query heads to a key/value head; both numbers are compiled in."""
    with kernel_cache():
        return _write_kernel(d, G), _attend_kernel(d, G)


def _write_kernel(d: int, G: int) -> Callable[..., None]:

    @njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True, nogil=True)
    def write(
        qkv: Array, k_weight: Array, eps: float, cos: Array, sin: Array, positions: Array, into: Array, keys: Array, values: Array,
        k_scales: Array, v_scales: Array, top: float,
    ) -> None:
        """qkv (N, (H + 2K) d): k, normed and turned, and v go to the slots into (N,) of keys, values (slots, K, d)."""
        K = keys.shape[1]
        for pair in prange(qkv.shape[0] * K):
            n, kh = pair // K, pair % K
            row, p, head = qkv[n], positions[n], np.empty(d, np.float32)
            _read_head(row, (K * G + kh) * d, k_weight, eps, cos[p], sin[p], 1.0, head, d)
            keep(head, keys, k_scales, into[n], kh, top, d)
            for i in range(d):
                head[i] = wide(row[(K * G + K + kh) * d + i])
            keep(head, values, v_scales, into[n], kh, top, d)

    return write  # type: ignore[no-any-return]


def _attend_kernel(d: int, G: int) -> Callable[..., None]:

    @njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True, nogil=True)
    def attend(
        qkv: Array, q_weight: Array, eps: float, cos: Array, sin: Array, positions: Array, request: Array, slots: Array, window: int,
        scale: float, keys: Array, values: Array, k_scales: Array, v_scales: Array, out: Array,
    ) -> None:
        """out (N, H d): token n, of request[n], attends to slots[request[n], 0 .. positions[n]], the last `window` of them (0: all)."""
        K = keys.shape[1]
        for pair in prange(qkv.shape[0] * K):
            n, kh = pair // K, pair % K
            row, p = qkv[n], positions[n]
            start = 0 if window == 0 else max(0, p + 1 - window)
            mine = slots[request[n], start : p + 1]
            head, mixed, scores = np.empty(d, np.float32), np.empty(d, np.float32), np.empty(p + 1 - start, np.float32)
            for g in range(G):
                _read_head(row, (kh * G + g) * d, q_weight, eps, cos[p], sin[p], scale, head, d)
                dots(head, keys, kh, mine, scores, d)
                if k_scales.size:
                    rescale(scores, k_scales, kh, mine)
                total = exp_from_top(scores)
                if v_scales.size:
                    rescale(scores, v_scales, kh, mine)
                mix(scores, values, kh, mine, mixed, d)
                for i in range(d):
                    out[n, (kh * G + g) * d + i] = narrow(mixed[i] / total, out[n, i])

    return attend  # type: ignore[no-any-return]
