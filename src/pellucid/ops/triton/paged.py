"""Attention over a paged cache on a GPU: new keys and values go where the table says, and queries read them there.

Every token of a step is a row, whatever request it belongs to; decoding and chunks of prompts run by one kernel. It reads the
cache block by block with an online softmax (arXiv 1805.02867, 2205.14135). What makes it fast: a tile's rows are consecutive tokens
times the G query heads that share a key/value head, so that keys are read once for all of them (arXiv 2511.11581); and where tiles
are few (decoding), several programs share the keys of one, and a second kernel joins their results (flash-decoding). The readable
twin is the flat pass of engine/runner.py, which gathers.

Run so far: on an H200 (tests/gpu; 256 requests read their pages at 3.3 TB/s of 4.3), in Triton's interpreter, and compiled ahead of
time for sm_80, sm_90 and gfx942.

Legend: N tokens of the step, H query heads, K key/value heads, G = H / K, d head dim, D the power of two that holds it, P slots.
Token n, of table row b = request[n] at positions[n] = p, reads slots[b, s] for s = 0 .. p, or the last `window` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.ops.triton.fused import turned
from pellucid.ops.triton.language import INTERPRETED, early, jit, let_next_begin, tl, wait_for_last, wider

LOG2_E = 1.4426950408889634
"""Scores are multiplied by it: the kernels' softmax is one of powers of two, which is one instruction."""
MOST_SPLITS = 16
SHORT = 64
"""Keys up to which one program reads them all: sharing them costs a second kernel."""


@dataclass(frozen=True)
class Tiles:
    """Tile i: the counts[i] rows of the step from firsts[i] on, consecutive tokens of one request, at most `most` (0: an empty tile).
    long: whether any tile reads `SHORT` keys or more."""

    firsts: Tensor  # (tiles,) int64
    counts: Tensor  # (tiles,) int64
    most: int
    long: bool = True


@dataclass(frozen=True)
class Raw:
    """What turns a projection's heads into queries and keys: weights (d,) of their norms, or none, and rotations (see `fused.heads`)."""

    norms: tuple[Tensor, Tensor] | None
    eps: float
    frequencies: Tensor  # (r / 2,) float32
    factor: float


@jit
def write_kernel(
    k, v, into, keys, values, k_stride, v_stride, K: tl.constexpr, d: tl.constexpr, D: tl.constexpr,  # type: ignore[name-defined, no-untyped-def]
):
    """Program (n, kh): one token's entry in one head."""
    n, kh = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(into + n)
    at = tl.arange(0, D)
    real = at < tl.where(slot >= 0, d, 0)  # a row that only fills a batch up has no slot
    to = (slot * K + kh) * d + at
    tl.store(keys + to, tl.load(k + n * k_stride + kh * d + at, mask=real), mask=real)
    tl.store(values + to, tl.load(v + n * v_stride + kh * d + at, mask=real), mask=real)


@jit
def attend_kernel(
    q, keys, values, slots, request, positions, sinks, firsts, counts, out, norms, q_stride, slots_stride, out_stride, scale,  # type: ignore[no-untyped-def]
    q_weight, k_weight, frequencies, factor, eps,
    K: tl.constexpr, G: tl.constexpr, d: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,  # type: ignore[name-defined]
    HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, PRODUCT: tl.constexpr,  # type: ignore[name-defined]
    RAW: tl.constexpr, NORM: tl.constexpr, r: tl.constexpr, EARLY: tl.constexpr,  # type: ignore[name-defined]
):
    """Program (tile, kh, split): a part of the keys for the tile's tokens and the query heads of one key/value head.

    HEADS: room for G.  ROWS: tokens x HEADS.  KEYS: read at a time.  PRODUCT: the dtype that products read.
    out (splits, N, H, d), norms (splits, N, H): log2 of the sum of weights, where there are several splits.
    RAW: q is the projection's (N, (H + 2K) d), of tiles of one token: its heads are normed (NORM) and turned here (see `fused.turned`),
    and its own key and value, which the first split begins with, are written by that one.
    """
    if EARLY:
        let_next_begin()
        wait_for_last()
    tile, kh, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, count = tl.load(firsts + tile), tl.load(counts + tile)
    p0, table = tl.load(positions + first), slots + tl.load(request + first) * slots_stride
    row, at = tl.arange(0, ROWS), tl.arange(0, D)
    token, g = row // HEADS, row % HEADS
    real = ((token < count) & (g < G))[:, None] & (at < d)[None, :]
    head, p = kh * G + g, p0 + token
    if RAW:
        raw = q + first * q_stride
        wide = turned(raw + head * d, real & (token == 0)[:, None], at, q_weight, frequencies, p0, factor, eps, d, r, NORM)
        queries = wide.to(q.dtype.element_ty).to(PRODUCT)
    else:
        queries = tl.load(q + ((first + token) * q_stride + head * d)[:, None] + at[None, :], mask=real, other=0.0).to(PRODUCT)

    # This program's share of the keys that any token of the tile sees, its own key apart where that is not in the cache yet.
    begin, end = p0 * 0, p0 + count
    if RAW:
        end = p0
    if WINDOW:
        begin = tl.maximum(p0 - WINDOW + 1, 0)
    share = tl.cdiv(tl.cdiv(end - begin, KEYS), SPLITS) * KEYS
    begin += split * share
    end = tl.minimum(end, begin + share)

    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SINKS:  # one more score, without a value: the first split's
        top = tl.where(split == 0, tl.load(sinks + head, mask=g < G, other=0.0).to(tl.float32) * 1.4426950408889634, top)
        total = tl.where(split == 0, 1.0, total)
    mixed = tl.zeros((ROWS, D), tl.float32)
    if RAW:
        if split == 0:
            one = tl.arange(0, 1)
            mine = (one < count)[:, None] & (at < d)[None, :]
            k_new = turned(raw + (K * G + kh) * d + one * 0, mine, at, k_weight, frequencies, p0, factor, eps, d, r, NORM)
            v_new = tl.load(raw + (K * G + K + kh) * d + at[None, :] + (one * 0)[:, None], mask=mine, other=0.0)
            to = (tl.load(table + p0) * K + kh) * d + at[None, :] + (one * 0)[:, None]
            tl.store(keys + to, k_new, mask=mine)
            tl.store(values + to, v_new, mask=mine)
            kept_key = tl.sum(k_new.to(keys.dtype.element_ty).to(tl.float32), 0)  # as others will read it
            own = tl.sum(queries.to(tl.float32) * kept_key[None, :], 1) * scale
            first_top = tl.maximum(top, own)
            safe0 = tl.where(first_top == -float("inf"), 0.0, first_top)
            weight = tl.exp2(own - safe0)
            total = total * tl.exp2(top - safe0) + weight
            mixed = weight[:, None] * tl.sum(v_new.to(tl.float32), 0)[None, :]
            top = first_top
    for s0 in range(begin, end, KEYS):
        s = s0 + tl.arange(0, KEYS)
        slot = tl.load(table + s, mask=s < end, other=0)
        entry = (slot * K + kh) * d
        k = tl.load(keys + entry[None, :] + at[:, None], mask=(s < end)[None, :] & (at < d)[:, None], other=0.0).to(PRODUCT)
        scores = tl.dot(queries, k, input_precision="ieee") * scale
        seen = (s[None, :] <= p[:, None]) & (s < end)[None, :]
        if WINDOW:
            seen = seen & (s[None, :] > p[:, None] - WINDOW)
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)  # nothing seen yet: -inf - -inf is no number
        weights, kept = tl.exp2(scores - safe[:, None]), tl.exp2(top - safe)
        total = total * kept + tl.sum(weights, 1)
        v = tl.load(values + entry[:, None] + at[None, :], mask=(s < end)[:, None] & (at < d)[None, :], other=0.0).to(PRODUCT)
        mixed = mixed * kept[:, None] + tl.dot(weights.to(PRODUCT), v, input_precision="ieee")
        top = higher

    result = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    to = split * out_stride + ((first + token) * (K * G) + head) * d
    tl.store(out + to[:, None] + at[None, :], result, mask=real)
    if SPLITS > 1:
        norm = tl.where(total == 0.0, -float("inf"), top + tl.log2(total))
        tl.store(norms + split * (out_stride // d) + (first + token) * (K * G) + head, norm, mask=(token < count) & (g < G))


@jit
def join_kernel(
    parts, norms, out, stride, d: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,  # type: ignore[name-defined, no-untyped-def]
):
    """Program i of N x H: out[i] (d,) = the mean of parts[:, i] by their sums of weights."""
    if EARLY:
        let_next_begin()
        wait_for_last()
    i, split, at = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, D)
    norm = tl.load(norms + split * (stride // d) + i)
    weights = tl.exp2(norm - tl.max(norm, 0))
    each = tl.load(parts + (split * stride)[:, None] + i * d + at[None, :], mask=(at < d)[None, :], other=0.0)
    tl.store(out + i * d + at, tl.sum(each * weights[:, None], 0) / tl.sum(weights, 0), mask=at < d)


def write(k: Tensor, v: Tensor, into: Tensor, keys: Tensor, values: Tensor) -> None:
    """k, v (N, K, d) to the slots into (N,) int64 of keys, values (P, K, d); rows of a negative slot nowhere."""
    (N, K, d), k, v = k.shape, _rows(k.to(keys.dtype)), _rows(v.to(values.dtype))
    write_kernel[N, K](k, v, into, keys, values, k.stride(0), v.stride(0), K, d, wider(d), num_warps=1)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, request: Tensor, positions: Tensor, tiles: Sequence[Tiles],
    window: int | None = None, scale: float | None = None, sinks: Tensor | None = None, splits: int | None = None, raw: Raw | None = None,
) -> Tensor:
    """q (N, H, d) -> (N, H, d), of the rows in `tiles`; what it reads is in the legend.  slots (rows, longest) int64.
    splits: programs that share the keys of a tile of one token; by default so many that the GPU is busy.
    raw: q is what the projection made, (N, H + 2K, d), all tiles are of one token, and `write` is done here."""
    (N, H, d), K, q = q.shape, keys.shape[1], _rows(q)
    H -= 0 if raw is None else 2 * K
    out = torch.empty(N, H, d, dtype=q.dtype, device=q.device)
    norms = None if raw is None else raw.norms
    q_weight, k_weight = norms or (q, q)
    frequencies, factor, eps = (q, 1.0, 0.0) if raw is None else (raw.frequencies, raw.factor, raw.eps)
    turned_width = 0 if raw is None else 2 * len(raw.frequencies)
    for some in tiles:
        S = 1 if some.most > 1 or not some.long else splits or splits_for(len(some.firsts) * K, q.device)
        heads, rows, read, warps = sides(H // K, d, some.most, S)
        parts, sums = (out, out) if S == 1 else (out.new_empty(S, N, H, d, dtype=torch.float32), out.new_empty(S, N, H, dtype=torch.float32))
        attend_kernel[len(some.firsts), K, S](
            q, keys, values, slots, request, positions, q if sinks is None else sinks, some.firsts, some.counts, parts, sums,
            q.stride(0), slots.stride(0), N * H * d, (d**-0.5 if scale is None else scale) * LOG2_E, q_weight, k_weight, frequencies, factor, eps,
            K, H // K, d, wider(d), window or 0, sinks is not None, heads, rows, read, S, product_dtype(q, keys),
            raw is not None, norms is not None, turned_width, num_warps=warps, **early(q.device))
        if S > 1:
            join_kernel[some.firsts.shape[0] * H,](parts, sums, out, N * H * d, d, wider(d), S, num_warps=1, **early(q.device))
    return out


def sides(G: int, d: int, tokens: int, splits: int = 1) -> tuple[int, int, int, int]:
    """HEADS, ROWS, KEYS and warps of a tile of so many tokens: a fixed table, so that nothing is tried out while people wait. Many tiles
    of one token are read fastest by many single warps (H200, 256 requests: 3.3 TB/s, with four warps 2.8), few ones by four warps each."""
    heads = wider(G, 1)
    if heads * tokens < 16:  # the least side of a product
        heads = 16 // tokens
    rows = heads * tokens
    if rows == 16 and tokens == splits == 1 and wider(d) <= 128:
        return heads, rows, 32, 1
    return heads, rows, 64 if wider(d) < 256 else 32, 8 if rows * wider(d) > 64 * 128 else 4


def chunk_rows(G: int) -> int:
    """Tokens of a tile of a prompt: 64 rows of a product."""
    return max(1, 64 // wider(G, 1))


def splits_for(programs: int, device: torch.device) -> int:
    """A power of two: two programs for each of the GPU's processors, as far as splitting goes."""
    if device.type == "cpu":
        return 2
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(MOST_SPLITS, wider(-(-2 * processors // programs), 1))


def product_dtype(q: Tensor, keys: Tensor) -> object:
    """bfloat16 where queries and cache are; the interpreter's bfloat16 products are wrong (it has no such numbers)."""
    half = q.dtype == keys.dtype == torch.bfloat16 and not INTERPRETED
    return tl.bfloat16 if half else tl.float32


def _rows(t: Tensor) -> Tensor:
    """(N, heads, d) whose rows may lie apart, their entries not."""
    return t if t.stride(2) == 1 and t.stride(1) == t.shape[2] else t.contiguous()
