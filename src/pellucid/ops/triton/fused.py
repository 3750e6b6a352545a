"""What stands between the products of a step on a GPU, and the products of a step of one row: few kernels, each one pass over memory.

A small model's step is made of kernels that last some microseconds; what counts is how many there are, and that the memory never rests.
So the residual, norms, rotations and activations are one kernel each instead of ten, and a single row's products take the norm before
them and the sum or the gate behind them along (`row_product`). Sums and the residual are float32; results are rounded once, as the C++
step does (ops/native). The readable twin is the model itself (nn/block.py), which rounds more often.

Legend: N rows (tokens of a step), D model width, H query heads, K key/value heads, d head dim, r its rotated part (half-split), P slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.ops.triton.language import early, jit, let_next_begin, tl, wait_for_last, wider


@jit
def embed_kernel(tokens, sources, drawn, table, x, D, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[name-defined, no-untyped-def]
    """Program (n, part): a row's token, or the one that row `sources[n]` of the last step drew."""
    if EARLY:
        let_next_begin()
        wait_for_last()
    n, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + n)
    token = tl.load(tokens + n)
    if source >= 0:
        token = tl.maximum(tl.load(drawn + source), 0)  # -1: logits that were no numbers; who reads them says so
    tl.store(x + n * D + at, tl.load(table + token * D + at, mask=at < D).to(tl.float32), mask=at < D)


@jit
def add_norm_kernel(  # type: ignore[no-untyped-def]
    x, delta, weight, out, eps, D, BLOCK: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,  # type: ignore[name-defined]
):
    """Program n: x[n] += delta[n], out[n] = its norm."""
    if EARLY:
        let_next_begin()
    n, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    real = at < D
    w = tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
    if EARLY:
        wait_for_last()
    h = tl.load(x + n * D + at, mask=real, other=0.0)
    if ADD:
        h += tl.load(delta + n * D + at, mask=real, other=0.0).to(tl.float32)
        tl.store(x + n * D + at, h, mask=real)
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, 0) / D + eps)
    tl.store(out + n * D + at, h * rstd * w, mask=real)


@jit
def gate_kernel(gate_up, out, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[name-defined, no-untyped-def]
    """Program (n, part): out = silu(gate) up."""
    if EARLY:
        let_next_begin()
        wait_for_last()
    n, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + 2 * n * width + at, mask=at < width, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * n + 1) * width + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(out + n * width + at, gate / (1.0 + tl.exp(-gate)) * up, mask=at < width)


@jit
def turned(  # type: ignore[no-untyped-def]
    rows, real, at, weight, frequencies, position, factor, eps, d: tl.constexpr, r: tl.constexpr, NORM: tl.constexpr,  # type: ignore[name-defined]
):
    """Heads (R, D) float32 read from the pointers rows (R,), normed over d, their first r entries turned by a token's position."""
    half: tl.constexpr = r // 2
    other = tl.where(at < half, at + half, tl.where(at < r, at - half, at))
    x = tl.load(rows[:, None] + at[None, :], mask=real, other=0.0).to(tl.float32)
    y = tl.load(rows[:, None] + other[None, :], mask=real, other=0.0).to(tl.float32)
    if NORM:
        rstd = (1.0 / tl.sqrt(tl.sum(x * x, 1) / d + eps))[:, None]
        x = x * rstd * tl.load(weight + at, mask=at < d, other=0.0).to(tl.float32)[None, :]
        y = y * rstd * tl.load(weight + other, mask=at < d, other=0.0).to(tl.float32)[None, :]
    if r > 0:
        angle = position.to(tl.float32) * tl.load(frequencies + at % half, mask=at < r, other=0.0)
        cos = tl.where(at < r, tl.cos(angle) * factor, 1.0)
        sin = tl.where(at < r, tl.where(at < half, -tl.sin(angle), tl.sin(angle)) * factor, 0.0)
        x = x * cos[None, :] + y * sin[None, :]
    return x


@jit
def heads_kernel(  # type: ignore[no-untyped-def]
    qkv, q_weight, k_weight, frequencies, positions, request, slots, out, keys, values, factor, eps, stride, slots_stride,
    H: tl.constexpr, K: tl.constexpr, d: tl.constexpr, D: tl.constexpr, r: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,  # type: ignore[name-defined]
):
    """Program (n, tile): R of a token's heads: queries to `out`, keys and values to the token's slot."""
    if EARLY:
        let_next_begin()
        wait_for_last()
    n, tile, at = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, D)
    tiles: tl.constexpr = (H + R - 1) // R
    others: tl.constexpr = (K + R - 1) // R
    p = tl.load(positions + n)
    if tile < tiles:
        head = tile * R + tl.arange(0, R)
        real = (head < H)[:, None] & (at < d)[None, :]
        x = turned(qkv + n * stride + head * d, real, at, q_weight, frequencies, p, factor, eps, d, r, NORM)
        tl.store(out + (n * H + head)[:, None] * d + at[None, :], x, mask=real)
    else:
        slot = tl.load(slots + tl.load(request + n) * slots_stride + p)
        if tile < tiles + others:
            head = (tile - tiles) * R + tl.arange(0, R)
            real = (head < K)[:, None] & (at < d)[None, :]
            k = turned(qkv + n * stride + (H + head) * d, real, at, k_weight, frequencies, p, factor, eps, d, r, NORM)
            tl.store(keys + (slot * K + head)[:, None] * d + at[None, :], k, mask=real)
        else:
            head = (tile - tiles - others) * R + tl.arange(0, R)
            real = (head < K)[:, None] & (at < d)[None, :]
            v = tl.load(qkv + n * stride + ((H + K + head) * d)[:, None] + at[None, :], mask=real, other=0.0)
            tl.store(values + (slot * K + head)[:, None] * d + at[None, :], v, mask=real)


@jit
def row_product_kernel(  # type: ignore[no-untyped-def]
    x, norm, weight, bias, out, eps, I, O,
    OUT: tl.constexpr, IN: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,  # type: ignore[name-defined]
):
    """Program i: OUT entries of weight (O, I) times x (I,). Weights are asked for before what the last kernel makes is there, and always
    one tile ahead.  NORM: of norm(x): its factor is one number, by which the sums are multiplied.  GATE: weight holds 2 O rows, the
    result is silu of the first half's times the second's.  ADD: the result is added to what `out` holds."""
    if EARLY:
        let_next_begin()
    o, at = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, IN)
    rows = weight + o.to(tl.int64)[:, None] * I
    here = (o < O)[:, None] & (at < I)[None, :]
    w = tl.load(rows + at[None, :], mask=here, other=0.0, eviction_policy="evict_first")
    u = w
    if GATE:
        rows_up = rows + O.to(tl.int64) * I
        u = tl.load(rows_up + at[None, :], mask=here, other=0.0, eviction_policy="evict_first")
    n = tl.full((IN,), 1.0, tl.float32)
    if NORM:
        n = tl.load(norm + at, mask=at < I, other=0.0).to(tl.float32)
    if EARLY:
        wait_for_last()
    squares = tl.zeros((IN,), tl.float32)
    sums = tl.zeros((OUT, IN), tl.float32)
    sums_up = sums
    for start in range(0, I, IN):
        i = start + at
        v = tl.load(x + i, mask=i < I, other=0.0).to(tl.float32)
        if NORM:
            squares += v * v
            v *= n
            n = tl.load(norm + i + IN, mask=i + IN < I, other=0.0).to(tl.float32)
        then = (o < O)[:, None] & (i + IN < I)[None, :]
        sums += w.to(tl.float32) * v[None, :]
        w = tl.load(rows + (i + IN)[None, :], mask=then, other=0.0, eviction_policy="evict_first")
        if GATE:
            sums_up += u.to(tl.float32) * v[None, :]
            u = tl.load(rows_up + (i + IN)[None, :], mask=then, other=0.0, eviction_policy="evict_first")
    result = tl.sum(sums, 1)
    up = result
    if GATE:
        up = tl.sum(sums_up, 1)
    if NORM:
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) / I + eps)
        result, up = result * rstd, up * rstd
    if BIAS:
        result += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)
        if GATE:
            up += tl.load(bias + O + o, mask=o < O, other=0.0).to(tl.float32)
    if GATE:
        result = result / (1.0 + tl.exp(-result)) * up
    if ADD:
        result += tl.load(out + o, mask=o < O, other=0.0)
    tl.store(out + o, result, mask=o < O)


def embed(tokens: Tensor, sources: Tensor, drawn: Tensor, table: Tensor) -> Tensor:
    """tokens, sources (N,) int64, table (V, D) -> (N, D) float32; rows with a source >= 0 take the token drawn[source]."""
    N, D = len(tokens), table.shape[1]
    x = torch.empty(N, D, device=table.device)
    block = min(1024, wider(D))
    embed_kernel[N, -(-D // block)](tokens, sources, drawn, table, x, D, block, num_warps=4, **early(x.device))
    return x


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (N, D) float32, to which delta (N, D) is added in place -> its norm (N, D)."""
    N, D = x.shape
    out = torch.empty(N, D, dtype=dtype, device=x.device)
    add_norm_kernel[N,](x, x if delta is None else delta, weight, out, eps, D, wider(D), delta is not None,
                        num_warps=4 if D <= 2048 else 8, **early(x.device))
    return out


def gate(gate_up: Tensor) -> Tensor:
    """(N, 2 width) -> silu of the first half times the second (N, width)"""
    N, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(N, width)
    block = min(1024, wider(width))
    gate_kernel[N, -(-width // block)](gate_up, out, width, block, num_warps=4, **early(out.device))
    return out


def heads(
    qkv: Tensor, H: int, norms: tuple[Tensor, Tensor] | None, eps: float, frequencies: Tensor, factor: float, positions: Tensor,
    request: Tensor, slots: Tensor, keys: Tensor, values: Tensor,
) -> Tensor:
    """qkv (N, (H + 2K) d) -> queries (N, H, d); keys and values go to slots[request, positions] of keys, values (P, K, d).
    frequencies (r / 2,) float32, times `factor` (see ops/rope.py)."""
    N, (_, K, d) = qkv.shape[0], keys.shape
    out, R = qkv.new_empty(N, H, d), min(8, wider(K, 1))
    q_weight, k_weight = norms or (qkv, qkv)
    heads_kernel[N, -(-H // R) + 2 * -(-K // R)](
        qkv, q_weight, k_weight, frequencies, positions, request, slots, out, keys, values, factor, eps, qkv.stride(0), slots.stride(0),
        H, K, d, wider(d), 2 * len(frequencies), R, norms is not None, num_warps=4 if R * d >= 512 else 1, **early(qkv.device))
    return out


def row_product(
    x: Tensor, weight: Tensor, out: Tensor, norm: Tensor | None = None, eps: float = 0.0, bias: Tensor | None = None, gated: bool = False,
    add: bool = False,
) -> Tensor:
    """out (1, O) = weight (O, I) times x (1, I), or its norm; gated: of weight (2 O, I); add: to what `out` (float32) holds."""
    O, I = out.shape[1], x.shape[1]
    rows, wide = row_tile(O, I, gated)
    row_product_kernel[-(-O // rows),](
        x, x if norm is None else norm, weight, x if bias is None else bias, out, eps, I, O, rows, wide, norm is not None, gated, add,
        bias is not None, num_warps=4, **early(x.device))
    return out


def row_tile(O: int, I: int, gated: bool) -> tuple[int, int]:
    """Rows and columns that a program of four warps reads at a time: the fastest of those tried on an H200 for Qwen3-0.6B and 8B."""
    if I <= 1024 or gated:
        return 8, min(512, wider(I))
    return (2, 2048) if O <= 2048 else (4, 1024)
