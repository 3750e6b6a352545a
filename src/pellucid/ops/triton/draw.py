"""The next token of every row in one kernel on a GPU: temperature, top-k, top-p, min-p and a seeded draw, without a wait.

The readable twin, and the meaning of every cut: engine/sampler.py. Sorting a vocabulary is slow on a GPU; the least weight that is
kept is found by bisection instead: non-negative floats are ordered as their bits are, so that 30 sums over the row find it exactly.
Of equal weights the earlier tokens are kept, as by a stable sort. A row's draw never depends on other rows.

Run so far: by Triton's interpreter, and compiled ahead of time; on no GPU yet.
Legend: B rows, V vocabulary. weights: exp of (logit - largest) / temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.ops.triton.language import jit, tl, wider


@jit
def weights_at(row, start, V, top, scale, BLOCK: tl.constexpr):  # type: ignore[name-defined, no-untyped-def]
    """The places start .. start + BLOCK of a row, and their weights (0 behind its end)."""
    at = start + tl.arange(0, BLOCK)
    x = tl.load(row + at, mask=at < V, other=-float("inf")).to(tl.float32)
    return at, tl.exp((x - top) * scale)


@jit
def above(row, V, top, scale, cut, COUNT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[name-defined, no-untyped-def]
    """How many weights are larger than `cut`, or their sum."""
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        _, w = weights_at(row, start, V, top, scale, BLOCK)
        found += tl.where(w > cut, 1.0 if COUNT else w, 0.0)
    return tl.sum(found, 0)


@jit
def least_kept(row, V, top, scale, low, limit, COUNT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[name-defined, no-untyped-def]
    """The smallest weight, from `low` on, above which there are fewer than `limit` (or less): found among the bits of 0 .. 1."""
    under, over = low.to(tl.int32, bitcast=True) - 1, low.to(tl.int32, bitcast=True) * 0 + 0x3F800000
    for _ in range(31):
        if over - under > 1:
            middle = under + (over - under) // 2
            fits = above(row, V, top, scale, middle.to(tl.float32, bitcast=True), COUNT, BLOCK) < limit
            under, over = tl.where(fits, under, middle), tl.where(fits, middle, over)
    return over.to(tl.float32, bitcast=True)


@jit
def draw_kernel(
    logits, temperature, top_k, top_p, min_p, uniform, tokens, logprobs, stride, V, BLOCK: tl.constexpr,  # type: ignore[name-defined, no-untyped-def]
):
    """Program b: row b."""
    b = tl.program_id(0).to(tl.int64)
    row, heat = logits + b * stride, tl.load(temperature + b)

    top, strange = heat * 0 - float("inf"), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < V, other=-float("inf")).to(tl.float32)
        strange += (x != x).to(tl.int32)
        top = tl.maximum(top, tl.max(tl.where(x != x, -float("inf"), x), 0))
    number = tl.where(tl.sum(strange, 0) == 0, tl.abs(top), float("inf")) < float("inf")
    top = tl.where(number, top, 0.0)
    scale = tl.where(heat == 0.0, 1.0, 1.0 / tl.maximum(heat, 1e-30))

    # What is kept: weights above `cut`, of those that equal it the first `ties`, none below the floor.
    whole = above(row, V, top, scale, -1.0, False, BLOCK)
    k, p, floor = tl.load(top_k + b), tl.load(top_p + b), tl.load(min_p + b)
    cut, ties, mass = heat * 0, heat * 0 + V, whole
    if (heat > 0.0) & (k > 0) & (k < V):
        cut = least_kept(row, V, top, scale, cut, k.to(tl.float32), True, BLOCK)
        ties = k - above(row, V, top, scale, cut, True, BLOCK)
        mass = above(row, V, top, scale, cut, False, BLOCK) + ties * cut
    if (heat > 0.0) & (p < 1.0):
        low = cut
        cut = least_kept(row, V, top, scale, low, p * mass, False, BLOCK)
        left = p * mass - above(row, V, top, scale, cut, False, BLOCK)
        most = tl.ceil(left / tl.maximum(cut, 1e-38))
        ties = tl.where(cut > low, most, tl.minimum(ties, most))

    # Its sum, then the place where the running sum passes a uniform share of it; the largest logit's first place beside.
    kept, equal, best = heat * 0, heat * 0, V
    for start in range(0, V, BLOCK):
        at, w = weights_at(row, start, V, top, scale, BLOCK)
        same = tl.where(w == cut, 1.0, 0.0)
        order = equal + tl.cumsum(same, 0) - same
        w0 = tl.where(w > cut, w, tl.where(same * (order < ties) > 0, w, 0.0))
        kept += tl.sum(tl.where(w0 >= floor, w0, 0.0), 0)
        equal += tl.sum(same, 0)
        x = tl.load(row + at, mask=at < V, other=-float("inf")).to(tl.float32)
        best = tl.minimum(best, tl.min(tl.where(x == top, at, V), 0))
    point, before, equal = tl.load(uniform + b) * kept, heat * 0, heat * 0
    token, last = best * 0 + V, best * 0
    for start in range(0, V, BLOCK):
        at, w = weights_at(row, start, V, top, scale, BLOCK)
        same = tl.where(w == cut, 1.0, 0.0)
        order = equal + tl.cumsum(same, 0) - same
        w0 = tl.where(w > cut, w, tl.where(same * (order < ties) > 0, w, 0.0))
        w0 = tl.where(w0 >= floor, w0, 0.0)
        running = before + tl.cumsum(w0, 0)
        token = tl.minimum(token, tl.min(tl.where((running > point) & (w0 > 0.0), at, V), 0))
        last = tl.maximum(last, tl.max(tl.where(w0 > 0.0, at, 0), 0))
        before += tl.sum(w0, 0)
        equal += tl.sum(same, 0)
    token = tl.where(heat == 0.0, best, tl.where(token < V, token, last))  # rounding may lead past the last one
    x = tl.load(row + token, mask=token < V, other=0.0).to(tl.float32)
    tl.store(logprobs + b, (x - top) * scale - tl.log(whole))
    tl.store(tokens + b, tl.where(number, token, -1).to(tl.int64))


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, V), settings (B,), uniform (B,) in [0, 1) -> tokens (B,) int64 (-1: logits that are no numbers), and their
    log-probabilities (B,) at the temperature (greedy: at 1) before any cut."""
    (B, V), logits = logits.shape, logits if logits.stride(1) == 1 else logits.contiguous()
    tokens, logprobs = torch.empty(B, dtype=torch.int64, device=logits.device), torch.empty(B, device=logits.device)
    draw_kernel[B,](logits, temperature, top_k, top_p, min_p, uniform.float(), tokens, logprobs, logits.stride(0), V, min(4096, wider(V)), num_warps=8)
    return tokens, logprobs
