"""The same numbers give the same bits wherever arrays lie: side by side in any order, or far apart.

LLVM decides at run time, by addresses, between a loop's vector and scalar form; a loop that sums and also writes elsewhere may add in
another order where its arrays are neighbours.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from pellucid.ops import choose_jit

pytestmark = pytest.mark.skipif(not choose_jit().value, reason="needs numba (pip install 'pellucid[fast]')")


def laid(arrays: list[Tensor], order: tuple[int, ...], gap: int) -> list[Tensor]:
    """Copies in one buffer in that order, with `gap` bytes between."""
    size = sum(t.nbytes + 8 + gap for t in arrays)
    memory, at, copies = torch.zeros(size + 64, dtype=torch.uint8), 0, list(arrays)
    for i in order:
        t = arrays[i]
        at = -(-at // t.itemsize) * t.itemsize
        copies[i] = memory[at : at + t.nbytes].view(t.dtype).view(t.shape)
        copies[i].copy_(t)
        at += t.nbytes + gap
    return copies


def check(kernel, arrays: list[Tensor], call) -> None:
    """call(kernel, arrays as numpy) for many placements: every array ends with the same bits."""
    from pellucid.ops.jit.lanes import array

    orders = list(itertools.permutations(range(len(arrays))))
    random.Random(0).shuffle(orders)
    first = None
    for order in orders[:30]:
        for gap in (0, 4, 64, 4096):
            copies = laid(arrays, order, gap)
            call(kernel, [array(t) for t in copies])
            if first is None:
                first = copies
            for a, b in zip(first, copies, strict=True):
                assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), (order, gap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [48, 70])
def test_norm_forward_and_backward(dtype, D):
    from pellucid.ops.jit import train

    x, g, w = torch.randn(40, D).to(dtype), torch.randn(40, D).to(dtype), torch.rand(1, D).to(dtype)
    check(train.norm, [x, w, torch.zeros_like(x), torch.zeros(40)], lambda k, a: k(a[0], a[1], 1e-6, a[2], a[3]))
    check(train.norm_backward, [g, x, w, torch.rand(40), torch.zeros_like(x), torch.zeros(train.CHUNKS, 1, D)], lambda k, a: k(*a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_forward_and_backward(dtype):
    from pellucid.ops.jit import train

    N, H, K, d = 20, 3, 1, 24
    qkv, cos, sin, weight = torch.randn(N, H + 2 * K, d).to(dtype), torch.randn(N, d).to(dtype), torch.randn(N, d).to(dtype), torch.rand(H + K, d)
    out, rstd = torch.zeros(N, H + K, d).to(dtype), torch.zeros(N, H + K)
    check(train.heads, [qkv, cos, sin, weight, out, rstd], lambda k, a: k(*a[:4], 1e-6, *a[4:]))
    gq, gk, gv = torch.randn(N, H, d).to(dtype), torch.randn(N, K, d).to(dtype), torch.randn(N, K, d).to(dtype)
    arrays = [gq, gk, gv, qkv, cos, sin, weight, torch.rand(N, H + K), torch.zeros_like(qkv), torch.zeros(train.CHUNKS, H + K, d)]
    check(train.heads_backward, arrays, lambda k, a: k(*a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_losses_and_log_probabilities(dtype):
    from pellucid.ops.jit import decode, train

    x, delta, w = torch.randn(9, 70), torch.randn(9, 70).to(dtype), torch.rand(70).to(dtype)
    check(decode.add_and_norm, [x, delta, w, torch.zeros(9, 70).to(dtype)], lambda k, a: k(a[0], a[1], a[2], 1e-6, a[3]))
    logits, labels = torch.randn(9, 131).to(dtype), torch.arange(9)
    check(train.cross_entropy, [logits, labels, torch.zeros(9)], lambda k, a: k(*a))
    check(train.log_probability, [logits, labels, torch.zeros(9), torch.zeros(9)], lambda k, a: k(a[0], a[1], 0.7, *a[2:]))


@pytest.mark.parametrize("V", [131, 272])
def test_draws(V):
    """The kernel's own weights lie where the allocator puts them: right behind the logits where the hole there is just large enough."""
    from pellucid.ops.jit.draw import draw
    from pellucid.ops.jit.lanes import array

    rng, kept, first = random.Random(0), [], {}
    logits, heat, seeds, steps = torch.randn(12, V), torch.full((12,), 0.9), torch.arange(12), torch.zeros(12, dtype=torch.int64)
    for _ in range(2000):
        rows = rng.choice([1, 2, 4, 9, 12])
        tokens, logprobs = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
        kept = [*kept[-20:], torch.empty(rng.randrange(1, 64))]
        hole = torch.empty(rows * V + V + rng.randrange(8, 80))
        wall = torch.empty(rng.randrange(1, 64))
        del hole
        mine = torch.empty(rows, V).copy_(logits[:rows])
        draw(array(mine), array(heat[:rows]), array(seeds[:rows]), array(steps[:rows]), array(tokens), array(logprobs))
        del wall
        for row, found in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
            assert first.setdefault(row, found) == found
