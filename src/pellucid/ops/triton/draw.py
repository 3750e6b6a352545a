"""The next token of every row in two kernels on a GPU: temperature, top-k, top-p, min-p and a seeded draw, without a wait.

The readable twin, and the meaning of every cut: engine/sampler.py. Sorting a vocabulary is slow on a GPU; the least weight that is
kept is found by bisection instead: non-negative floats are ordered as their bits are, so that 30 sums over the row find it exactly.
Of equal weights the earlier tokens are kept, as by a stable sort. A row's draw never depends on other rows.

Run so far: on an H200, in Triton's interpreter, and compiled ahead of time for sm_80, sm_90 and gfx942.
Legend: B rows, V vocabulary. weights: exp of (logit - largest) / temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.ops.triton.language import early, jit, let_next_begin, tl, wait_for_last, wider


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
def survey_kernel(  # type: ignore[no-untyped-def]
    logits, temperature, tops, sums, firsts, stride, parts, V, BLOCK: tl.constexpr, EARLY: tl.constexpr,  # type: ignore[name-defined]
):
    """Program (b, i): of the i-th BLOCK of row b the largest logit (NaN: there is one), its first place, and the sum of weights below it."""
    if EARLY:
        let_next_begin()
        wait_for_last()
    b, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat, at = tl.load(temperature + b), i * BLOCK + tl.arange(0, BLOCK)
    scale = tl.where(heat == 0.0, 1.0, 1.0 / tl.maximum(heat, 1e-30))
    x = tl.load(logits + b * stride + at, mask=at < V, other=-float("inf")).to(tl.float32)
    strange = tl.sum((x != x).to(tl.int32), 0) > 0
    top = tl.max(tl.where(x != x, -float("inf"), x), 0)
    base = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    tl.store(sums + b * parts + i, tl.sum(tl.exp((x - base) * scale), 0))
    tl.store(firsts + b * parts + i, tl.min(tl.where(x == top, at, V), 0))
    tl.store(tops + b * parts + i, tl.where(strange, float("nan"), top))


@jit
def mixed(z):  # type: ignore[no-untyped-def]
    """One round of splitmix64 (see `sampler.uniform`), in signed numbers."""
    z += -7046029254386353131
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@jit
def draw_kernel(  # type: ignore[no-untyped-def]
    logits, temperature, top_k, top_p, min_p, seeds, steps, tops, sums, firsts, tokens, logprobs, stride, parts, V,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,  # type: ignore[name-defined]
):
    """Program b: row b. Rows that cut nothing off read one block of their logits, others the whole row some dozen times."""
    if EARLY:
        let_next_begin()
        wait_for_last()
    b, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    row, heat = logits + b * stride, tl.load(temperature + b)
    scale = tl.where(heat == 0.0, 1.0, 1.0 / tl.maximum(heat, 1e-30))
    highest = tl.load(tops + b * parts + part, mask=part < parts, other=-float("inf"))
    known = highest == highest
    top = tl.max(tl.where(known, highest, -float("inf")), 0)
    number = tl.where(tl.sum(tl.where(known, 0, 1), 0) == 0, tl.abs(top), float("inf")) < float("inf")
    top = tl.where(number, top, 0.0)
    best = tl.min(tl.where(highest == top, tl.load(firsts + b * parts + part, mask=part < parts, other=V), V), 0)
    base = tl.where(tl.abs(highest) < float("inf"), highest, 0.0)
    shares = tl.load(sums + b * parts + part, mask=part < parts, other=0.0) * tl.exp(tl.where(number, (base - top) * scale, 0.0))
    whole = tl.sum(shares, 0)
    seed, step = tl.load(seeds + b), tl.load(steps + b)
    share = (((mixed(mixed(seed) + step) >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16).to(tl.float32)
    k, p, floor = tl.load(top_k + b), tl.load(top_p + b), tl.load(min_p + b)
    cuts = ((k > 0) & (k < V)) | (p < 1.0) | (floor > 0.0)

    token, last = best * 0 + V, best * 0
    if (heat > 0.0) & number:
        if cuts:
            # What is kept: weights above `cut`, of those that equal it the first `ties`, none below the floor.
            cut, ties, mass = heat * 0, heat * 0 + V, whole
            if (k > 0) & (k < V):
                cut = least_kept(row, V, top, scale, cut, k.to(tl.float32), True, BLOCK)
                ties = k.to(tl.float32) - above(row, V, top, scale, cut, True, BLOCK)
                mass = above(row, V, top, scale, cut, False, BLOCK) + ties * cut
            if p < 1.0:
                low = cut
                cut = least_kept(row, V, top, scale, low, p * mass, False, BLOCK)
                left = p * mass - above(row, V, top, scale, cut, False, BLOCK)
                most = tl.ceil(left / tl.maximum(cut, 1e-37))
                ties = tl.where(cut > low, most, tl.minimum(ties, most))
            # Its sum, then the place where the running sum passes a uniform share of it.
            kept, equal = heat * 0, heat * 0
            for start in range(0, V, BLOCK):
                _, w = weights_at(row, start, V, top, scale, BLOCK)
                same = tl.where(w == cut, 1.0, 0.0)
                order = equal + tl.cumsum(same, 0) - same
                w0 = tl.where(w > cut, w, tl.where(same * tl.where(order < ties, 1.0, 0.0) > 0, w, 0.0))
                kept += tl.sum(tl.where(w0 >= floor, w0, 0.0), 0)
                equal += tl.sum(same, 0)
            point, before, equal = share * kept, heat * 0, heat * 0
            for start in range(0, V, BLOCK):
                at, w = weights_at(row, start, V, top, scale, BLOCK)
                same = tl.where(w == cut, 1.0, 0.0)
                order = equal + tl.cumsum(same, 0) - same
                w0 = tl.where(w > cut, w, tl.where(same * tl.where(order < ties, 1.0, 0.0) > 0, w, 0.0))
                w0 = tl.where(w0 >= floor, w0, 0.0)
                running = before + tl.cumsum(w0, 0)
                token = tl.minimum(token, tl.min(tl.where((running > point) & (w0 > 0.0), at, V), 0))
                last = tl.maximum(last, tl.max(tl.where(w0 > 0.0, at, 0), 0))
                before += tl.sum(w0, 0)
                equal += tl.sum(same, 0)
        else:  # the block whose share of the sum holds the point, then the place in it
            point, running = share * whole, tl.cumsum(shares, 0)
            passed = (running > point) & (shares > 0.0)
            final = tl.max(tl.where(shares > 0.0, part, 0), 0)
            block = tl.minimum(tl.min(tl.where(passed, part, PARTS), 0), final)
            before = tl.sum(tl.where(part < block, shares, 0.0), 0)
            at, w = weights_at(row, block * BLOCK, V, top, scale, BLOCK)
            token = tl.min(tl.where((before + tl.cumsum(w, 0) > point) & (w > 0.0), at, V), 0)
            last = tl.max(tl.where(w > 0.0, at, 0), 0)
    token = tl.where(heat == 0.0, best, tl.where(token < V, token, last))  # rounding may lead past the last one
    x = tl.load(row + token, mask=token < V, other=0.0).to(tl.float32)
    tl.store(logprobs + b, (x - top) * scale - tl.log(whole))
    tl.store(tokens + b, tl.where(number, token, -1).to(tl.int64))


def draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, steps: Tensor,
) -> tuple[Tensor, Tensor]:
    """logits (B, V), settings (B,), seeds and steps (B,) int64, of which `sampler.uniform` says what they mean -> tokens (B,) int64 (-1:
    logits that are no numbers), and their log-probabilities (B,) at the temperature (greedy: at 1) before any cut."""
    (B, V), device, logits = logits.shape, logits.device, logits if logits.stride(1) == 1 else logits.contiguous()
    block = min(4096, wider(V))
    parts, options = -(-V // block), early(device)
    tops, sums = torch.empty(2, B, parts, device=device)
    firsts = torch.empty(B, parts, dtype=torch.int32, device=device)
    tokens, logprobs = torch.empty(B, dtype=torch.int64, device=device), torch.empty(B, device=device)
    survey_kernel[B, parts](logits, temperature, tops, sums, firsts, logits.stride(0), parts, V, block, num_warps=8, **options)
    draw_kernel[B,](logits, temperature, top_k, top_p, min_p, seeds, steps, tops, sums, firsts, tokens, logprobs, logits.stride(0), parts, V,
                    block, wider(parts), num_warps=8, **options)
    return tokens, logprobs
