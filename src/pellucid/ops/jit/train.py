"""Norm, rotation, gate and loss, forward and backward: one pass over each row while it stays in the cache.

Legend: N rows, D their length, R rows of a norm's weight (row n uses n % R), B batch, T tokens, H query heads, K key/value
heads, d head dim, V vocabulary. Arrays are C-contiguous, float32 or bfloat16 as bits; statistics and sums are float32.
Sums over rows (the gradient of a weight) are made chunk by chunk, at the same borders for any number of threads: the
same numbers give the same bits. Kernels run without the interpreter's lock (nogil): another thread may sample meanwhile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from pellucid.ops.jit.lanes import FAST, exp, largest, narrow, sigmoid, wide

Array = np.ndarray[Any, Any]
CHUNKS = 32  # partial sums of a weight's gradient


@njit(parallel=True, cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def norm(x: Array, weight: Array, eps: float, y: Array, rstd: Array) -> None:
    """y = w * (x r), r = rstd = 1 / sqrt(mean(x^2) + eps): x, y (N, D), weight (R, D), rstd (N,). x r is rounded to x's
    precision before it meets the weight, as Llama does."""
    N, D = x.shape
    for n in prange(N):
        w, total = n % len(weight), np.float32(0)
        for i in range(D):
            total += wide(x[n, i]) * wide(x[n, i])
        r = np.float32(1) / np.sqrt(total / np.float32(D) + np.float32(eps))
        for i in range(D):
            y[n, i] = narrow(wide(narrow(wide(x[n, i]) * r, x[n, i])) * wide(weight[w, i]), x[n, i])
        rstd[n] = r


@njit(parallel=True, cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def norm_backward(g: Array, x: Array, weight: Array, rstd: Array, dx: Array, dw: Array) -> None:
    """dx = r (g w - n mean(g w n)) with n = x r;  dw (CHUNKS, R, D) float32: sums of g n over the rows of each chunk."""
    N, D = x.shape
    step = (N + CHUNKS - 1) // CHUNKS
    for c in prange(CHUNKS):
        for n in range(c * step, min(N, c * step + step)):
            w, r, dot = n % len(weight), rstd[n], np.float32(0)
            sums = dw[c, w]
            for i in range(D):
                gn = wide(g[n, i]) * (wide(x[n, i]) * r)
                dot += gn * wide(weight[w, i])
                sums[i] += gn
            dot = dot * r / np.float32(D)
            for i in range(D):
                dx[n, i] = narrow(r * (wide(g[n, i]) * wide(weight[w, i]) - wide(x[n, i]) * dot), x[n, i])


@njit(parallel=True, cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def gate(gate_up: Array, out: Array) -> None:
    """out (N, D) = silu(gate) * up, gate_up (N, 2D)."""
    N, D = out.shape
    for n in prange(N):
        up = gate_up[n, D:]  # an index D + i might be negative for all that the compiler knows: no vector lanes
        for i in range(D):
            x = wide(gate_up[n, i])
            out[n, i] = narrow(x * sigmoid(x) * wide(up[i]), out[n, i])


@njit(parallel=True, cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def gate_backward(g: Array, gate_up: Array, d_gate_up: Array) -> None:
    """d gate = g up s (1 + gate (1 - s)) with s = sigmoid(gate);  d up = g gate s."""
    N, D = g.shape
    for n in prange(N):
        up, d_gate, d_up = gate_up[n, D:], d_gate_up[n, :D], d_gate_up[n, D:]
        for i in range(D):  # one target a loop: with two, the compiler gives up proving that they do not overlap
            x = wide(gate_up[n, i])
            s = sigmoid(x)
            d_gate[i] = narrow(wide(g[n, i]) * wide(up[i]) * s * (np.float32(1) + x * (np.float32(1) - s)), g[n, i])
        for i in range(D):
            x = wide(gate_up[n, i])
            d_up[i] = narrow(wide(g[n, i]) * x * sigmoid(x), g[n, i])


@njit(cache=True, fastmath=FAST, inline="always")
def _turn(row: Array, cos: Array, sin: Array, sign: float) -> None:
    """row (d,) float32, in place: pair (j, j + r/2) turned by its angle, or back by it with sign = -1."""
    half = len(cos) // 2
    for j in range(half):
        a, b = row[j], row[j + half]
        row[j] = a * wide(cos[j]) - sign * b * wide(sin[j])
        row[j + half] = b * wide(cos[j + half]) + sign * a * wide(sin[j + half])


@njit(parallel=True, cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def heads(qkv: Array, cos: Array, sin: Array, weight: Array, eps: float, qk: Array, rstd: Array) -> None:
    """qk (B T, H + K, d) = rope(norm(q and k)), out of qkv (B T, H + 2K, d). cos, sin (B T or T, r), weight (H + K, d)
    float32, or (0, d) for no norm; rstd (B T, H + K)."""
    N, count, d = qk.shape
    for n in prange(N):
        head, at = np.empty(d, np.float32), n % len(cos)
        for h in range(count):
            total = np.float32(0)
            for i in range(d):
                head[i] = wide(qkv[n, h, i])
                total += head[i] * head[i]
            if len(weight):
                rstd[n, h] = np.float32(1) / np.sqrt(total / np.float32(d) + np.float32(eps))
                for i in range(d):
                    head[i] *= rstd[n, h] * weight[h, i]
            _turn(head, cos[at], sin[at], np.float32(1))
            for i in range(d):
                qk[n, h, i] = narrow(head[i], qk[n, h, i])


@njit(parallel=True, cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def heads_backward(
    gq: Array, gk: Array, gv: Array, qkv: Array, cos: Array, sin: Array, weight: Array, rstd: Array, d_qkv: Array, dw: Array,
) -> None:
    """d_qkv (B T, H + 2K, d) from the gradients gq (B T, H, d), gk, gv (B T, K, d): turned back, through the norm; that
    of v is copied. dw (CHUNKS, H + K, d) float32, summed over each chunk."""
    (N, H, d), K = gq.shape, gk.shape[1]
    step = (N + CHUNKS - 1) // CHUNKS
    for c in prange(CHUNKS):
        g = np.empty(d, np.float32)
        for n in range(c * step, min(N, c * step + step)):
            at = n % len(cos)
            for h in range(H + K):
                source = gq[n, h] if h < H else gk[n, h - H]
                for i in range(d):
                    g[i] = wide(source[i])
                _turn(g, cos[at], sin[at], np.float32(-1))
                if len(weight):
                    r, dot, sums = rstd[n, h], np.float32(0), dw[c, h]
                    for i in range(d):
                        gn = g[i] * (wide(qkv[n, h, i]) * r)
                        dot += gn * weight[h, i]
                        sums[i] += gn
                    dot = dot * r / np.float32(d)
                    for i in range(d):
                        g[i] = r * (g[i] * weight[h, i] - wide(qkv[n, h, i]) * dot)
                for i in range(d):
                    d_qkv[n, h, i] = narrow(g[i], d_qkv[n, h, i])
            for h in range(K):
                d_qkv[n, H + K + h] = gv[n, h]


@njit(parallel=True, cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def cross_entropy(logits: Array, labels: Array, losses: Array) -> None:
    """losses (N,) = log sum exp(logits - max) - (logits[label] - max);  logits (N, V) become their gradient, softmax - onehot."""
    N, V = logits.shape
    for n in prange(N):
        top, total = largest(logits[n]), np.float32(0)
        for i in range(V):
            total += exp(wide(logits[n, i]) - top)
        label, share = labels[n], np.float32(1) / total
        below = np.float64(top) - np.float64(wide(logits[n, label]))
        losses[n] = np.log(np.float64(total)) + below  # in float64: FAST may add `top` to the small logarithm first
        for i in range(V):
            logits[n, i] = narrow(exp(wide(logits[n, i]) - top) * share, logits[n, i])
        logits[n, label] = narrow(np.float32(np.expm1(-losses[n])), logits[n, label])  # p - 1, exact where p is near 1


@njit(parallel=True, cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def log_probability(logits: Array, labels: Array, scale: float, logps: Array, entropies: Array) -> None:
    """logps (N,) of the labels under softmax(scale * logits), logits (N, V) as they are, and the entropies of that, both from one pass:
    with y = scale (logits - max) and Z = sum exp(y), log p = y[label] - log Z and H = log Z - sum exp(y) y / Z."""
    N, V = logits.shape
    factor = np.float32(scale)
    for n in prange(N):
        row, top, total, dot = logits[n], largest(logits[n]), np.float32(0), np.float32(0)
        for i in range(V):
            y = (wide(row[i]) - top) * factor
            e = np.float32(0) if y <= np.float32(-87) else exp(y)  # NaN stays NaN
            total += e
            dot += e * max(y, np.float32(-87))
        log_total = np.log(np.float64(total))
        logps[n] = (np.float64(wide(row[labels[n]])) - np.float64(top)) * scale - log_total
        entropies[n] = log_total - np.float64(dot) / np.float64(total)
