"""Experts between and instead of matrix products: the weighted gate both ways, and both products for few rows an expert.

Legend: N tokens, D model width, P pairs (token, expert) sorted by expert, E experts, I their width. Weight arrays are
float32 or bfloat16 as bits; the weights of pairs, and all that `hidden` and `results` read and write beside them, float32.
alpha 0: silu(gate) * up; else gpt-oss's clamped gate, (up + 1) * gate * sigmoid(alpha gate) with gate <= limit, |up| <= limit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from pellucid.ops.jit.lanes import FAST, narrow, sigmoid, wide

Array = np.ndarray[Any, Any]
ROWS = 32  # of a weight matrix that one task works on


@njit(fastmath=FAST, cache=True, inline="always")
def _act(gate: float, up: float, alpha: float, limit: float) -> float:
    if alpha == 0:
        return gate * sigmoid(gate) * up
    g, u = min(gate, limit), min(max(up, -limit), limit)
    return (u + np.float32(1)) * g * sigmoid(alpha * g)


@njit(parallel=True, cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def gate(gate_up: Array, weights: Array, alpha: float, limit: float, out: Array) -> None:
    """out (P, I) = weight * act(gate, up), gate_up (P, 2I)."""
    P, width = out.shape
    slope, top = np.float32(alpha), np.float32(limit)
    for p in prange(P):
        up, w = gate_up[p, width:], weights[p]
        for i in range(width):
            out[p, i] = narrow(w * _act(wide(gate_up[p, i]), wide(up[i]), slope, top), out[p, i])


@njit(parallel=True, cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def gate_backward(g: Array, gate_up: Array, weights: Array, alpha: float, limit: float, out: Array, d_gate_up: Array,
                  d_weights: Array) -> None:
    """g (P, I): the gradient at weight * act(gate, up).  out as in `gate`, d_gate_up (P, 2I), d_weights (P,) += g . act."""
    P, width = out.shape
    slope, top = np.float32(alpha), np.float32(limit)
    one = np.float32(1)
    for p in prange(P):
        up, d_up, w = gate_up[p, width:], d_gate_up[p, width:], weights[p]
        total = np.float32(0)
        if slope == 0:
            for i in range(width):
                x, u, d = wide(gate_up[p, i]), wide(up[i]), wide(g[p, i])
                s = sigmoid(x)
                silu = x * s
                total += d * (silu * u)
                out[p, i] = narrow(w * (silu * u), out[p, i])
                d_gate_up[p, i] = narrow(w * d * u * s * (one + x * (one - s)), d_gate_up[p, i])
                d_up[i] = narrow(w * d * silu, d_up[i])
        else:
            for i in range(width):
                x, u, d = wide(gate_up[p, i]), wide(up[i]), wide(g[p, i])
                c, v = min(x, top), min(max(u, -top), top)
                s = sigmoid(slope * c)
                total += d * ((v + one) * c * s)
                out[p, i] = narrow(w * ((v + one) * c * s), out[p, i])
                rise = (v + one) * s * (one + slope * c * (one - s))
                d_gate_up[p, i] = narrow(w * d * (rise if x <= top else np.float32(0)), d_gate_up[p, i])
                d_up[i] = narrow(w * d * (c * s if abs(u) <= top else np.float32(0)), d_up[i])
        d_weights[p] += total


@njit(parallel=True, cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def add_rows(y: Array, tokens: Array, out: Array) -> None:
    """out[tokens[p]] += y[p]: y (P, D), out (N, D) float32. Threads share the columns, so a token may come twice."""
    D = y.shape[1]
    parts = (D + 63) // 64
    for c in prange(parts):
        a, b = c * 64, min(D, c * 64 + 64)
        for p in range(len(tokens)):
            row, new = out[tokens[p], a:b], y[p, a:b]
            for i in range(b - a):
                row[i] += wide(new[i])


@njit(fastmath=FAST, cache=True, nogil=True, error_model="numpy")
def _dots(w: tuple[Array, Array, Array, Array], x: Array, n: int) -> tuple[float, float, float, float]:
    """The products of four rows of weights with one row x (float32)."""
    w0, w1, w2, w3 = w
    a = b = c = d = np.float32(0)
    for j in range(n):
        v = x[j]
        a += v * wide(w0[j])
        b += v * wide(w1[j])
        c += v * wide(w2[j])
        d += v * wide(w3[j])
    return a, b, c, d


@njit(fastmath=FAST, cache=True, nogil=True, error_model="numpy")
def _tile(w: tuple[Array, Array, Array, Array], x0: Array, x1: Array, x2: Array, x3: Array, n: int) -> Any:
    """The products of four rows of weights with four rows of x: sixteen sums in registers, each number read once for four."""
    w0, w1, w2, w3 = w
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
    for j in range(n):
        u0, u1, u2, u3 = wide(w0[j]), wide(w1[j]), wide(w2[j]), wide(w3[j])
        v = x0[j]
        a0, a1, a2, a3 = a0 + v * u0, a1 + v * u1, a2 + v * u2, a3 + v * u3
        v = x1[j]
        b0, b1, b2, b3 = b0 + v * u0, b1 + v * u1, b2 + v * u2, b3 + v * u3
        v = x2[j]
        c0, c1, c2, c3 = c0 + v * u0, c1 + v * u1, c2 + v * u2, c3 + v * u3
        v = x3[j]
        d0, d1, d2, d3 = d0 + v * u0, d1 + v * u1, d2 + v * u2, d3 + v * u3
    return (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3)


@njit(fastmath=FAST, cache=True, nogil=True, error_model="numpy")
def _keep(sums: tuple[float, float, float, float], p: int, i: int, k: int, weight: float, bias: Array, alpha: float, limit: float,
          out: Array) -> None:
    """sums: gate and up of columns i and k of pair p, still without their biases."""
    g0, u0, g1, u1 = sums
    width = out.shape[1]
    if bias.size:
        g0, u0, g1, u1 = g0 + wide(bias[i]), u0 + wide(bias[width + i]), g1 + wide(bias[k]), u1 + wide(bias[width + k])
    out[p, i] = weight * _act(g0, u0, alpha, limit)
    out[p, k] = weight * _act(g1, u1, alpha, limit)


@njit(parallel=True, cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def hidden(x: Array, tokens: Array, weights: Array, experts: Array, starts: Array, gate_up: Array, bias: Array, alpha: float,
           limit: float, out: Array) -> None:
    """out (P, I) = weight * act(gate_up[e] x + bias): x (N, D) float32, gate_up (E, 2I, D), bias (E, 2I) or (E, 0).

    The pairs of experts[s] stand from starts[s] to starts[s + 1]: each row of weights is read once, for all of them.
    """
    D, width = x.shape[1], out.shape[1]
    slope, top = np.float32(alpha), np.float32(limit)
    blocks = (width + ROWS - 1) // ROWS
    for task in prange(len(experts) * blocks):
        s, block = task // blocks, task % blocks
        matrix, shift = gate_up[experts[s]], bias[experts[s]]
        first, stop = starts[s], starts[s + 1]
        whole = first + (stop - first) // 4 * 4
        for i in range(block * ROWS, min(width, block * ROWS + ROWS), 2):
            k = min(i + 1, width - 1)  # an odd last column is done twice
            w = (matrix[i], matrix[width + i], matrix[k], matrix[width + k])
            for p in range(first, whole, 4):
                four = _tile(w, x[tokens[p]], x[tokens[p + 1]], x[tokens[p + 2]], x[tokens[p + 3]], D)
                _keep(four[0], p, i, k, weights[p], shift, slope, top, out)
                _keep(four[1], p + 1, i, k, weights[p + 1], shift, slope, top, out)
                _keep(four[2], p + 2, i, k, weights[p + 2], shift, slope, top, out)
                _keep(four[3], p + 3, i, k, weights[p + 3], shift, slope, top, out)
            for p in range(whole, stop):
                _keep(_dots(w, x[tokens[p]], D), p, i, k, weights[p], shift, slope, top, out)


@njit(parallel=True, cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def results(hidden: Array, weights: Array, experts: Array, starts: Array, down: Array, bias: Array, out: Array) -> None:
    """out (P, D) = down[e] hidden + weight * bias: hidden (P, I) float32, down (E, D, I), bias (E, D) or (E, 0)."""
    D, width = out.shape[1], hidden.shape[1]
    blocks = (D + ROWS - 1) // ROWS
    for task in prange(len(experts) * blocks):
        s, block = task // blocks, task % blocks
        matrix, shift = down[experts[s]], bias[experts[s]]
        first, stop = starts[s], starts[s + 1]
        whole = first + (stop - first) // 4 * 4
        for i in range(block * ROWS, min(D, block * ROWS + ROWS), 4):
            i1, i2, i3 = min(i + 1, D - 1), min(i + 2, D - 1), min(i + 3, D - 1)
            w = (matrix[i], matrix[i1], matrix[i2], matrix[i3])
            for p in range(first, whole, 4):
                four = _tile(w, hidden[p], hidden[p + 1], hidden[p + 2], hidden[p + 3], width)
                out[p, i], out[p, i1], out[p, i2], out[p, i3] = four[0]
                out[p + 1, i], out[p + 1, i1], out[p + 1, i2], out[p + 1, i3] = four[1]
                out[p + 2, i], out[p + 2, i1], out[p + 2, i2], out[p + 2, i3] = four[2]
                out[p + 3, i], out[p + 3, i1], out[p + 3, i2], out[p + 3, i3] = four[3]
            for p in range(whole, stop):
                out[p, i], out[p, i1], out[p, i2], out[p, i3] = _dots(w, hidden[p], width)
            if shift.size:
                for p in range(first, stop):
                    for d in range(i, i3 + 1):
                        out[p, d] += weights[p] * wide(shift[d])
