"""The Triton kernels of a paged cache against PyTorch's own attention over each request's gathered entries.

Without a GPU they run in Triton's interpreter, where Triton is installed (it is no part of the development set: some hundred megabytes,
of which only this needs anything); with a GPU, compiled:

    PELLUCID_TRITON=interpret pytest tests/ops/test_triton_paged.py
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("PELLUCID_TRITON", "interpret")

from pellucid.ops.triton import paged
from pellucid.ops.triton.language import choose_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHOICE = choose_triton(DEVICE)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHOICE.value, reason=CHOICE.reason)]

P = 96  # slots


def step(parts: list[tuple[int, int]], H: int, K: int, d: int, dtype: torch.dtype, seed: int = 0):
    """A step of requests (tokens before, new tokens): everything that the kernels are given, and what must be in the cache."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(parts) + 1, generator=g)[: len(parts)]
    where, slots = torch.randperm(P, generator=g), torch.full((len(parts) + 1, 64), P - 1)
    for row, (start, count) in zip(rows.tolist(), parts):
        slots[row, : start + count], where = where[: start + count], where[start + count :]
    request = torch.cat([row.expand(count) for row, (_, count) in zip(rows, parts)])
    positions = torch.cat([torch.arange(start, start + count) for start, count in parts])
    N = len(positions)
    qkv = torch.randn(N, H + 2 * K, d, generator=g).to(dtype)
    keys, values = torch.randn(2, P, K, d, generator=g).to(dtype)
    return [t.to(DEVICE) for t in (qkv, keys, values, slots, request, positions)]


def tiles_of(parts: list[tuple[int, int]], most: int) -> list[paged.Tiles]:
    firsts, counts, at = [], [], 0
    for _, count in parts:
        for begin in range(0, count, most):
            firsts.append(at + begin)
            counts.append(min(most, count - begin))
        at += count
    return [paged.Tiles(torch.tensor(firsts, device=DEVICE), torch.tensor(counts, device=DEVICE), most)]


def want(parts, q, keys, values, slots, request, window, scale, sinks):
    """PyTorch's attention in float64, a request at a time."""
    out, at, G = [], 0, q.shape[1] // keys.shape[1]
    for start, count in parts:
        mine = slots[request[at], : start + count]
        k, v = (t[mine].double().repeat_interleave(G, 1).transpose(0, 1) for t in (keys, values))
        i, j = torch.arange(start, start + count, device=DEVICE)[:, None], torch.arange(start + count, device=DEVICE)[None]
        seen = (j <= i) & (j > i - (window or 10**6))
        x = q[at : at + count].double().transpose(0, 1)
        if sinks is None:
            y = F.scaled_dot_product_attention(x, k, v, seen, scale=scale)
        else:
            scores = (x @ k.mT * (scale or q.shape[2] ** -0.5)).masked_fill(~seen, -torch.inf)
            y = torch.cat((scores, sinks.double()[:, None, None].expand(-1, count, 1)), -1).softmax(-1)[..., :-1] @ v
        out.append(y.transpose(0, 1))
        at += count
    return torch.cat(out)


DECODING = [(40, 1), (0, 1), (7, 1)]
MIXED = [(33, 1), (5, 12), (0, 17)]
CASES = {
    "decoding": (DECODING, 1, 8, 2, 32, {}), "one key head": (DECODING, 1, 3, 1, 16, {}), "28 to 4": (DECODING[:2], 1, 14, 2, 80, {}),
    "each its own": (DECODING, 1, 2, 2, 10, {}), "decoding, window": (DECODING, 1, 4, 2, 16, {"window": 9}),
    "unsplit": (DECODING, 1, 4, 2, 16, {"splits": 1}), "more splits than keys": (DECODING, 1, 4, 2, 16, {"splits": 8, "window": 3}),
    "sinks": (DECODING, 1, 4, 2, 16, {"sinks": True}), "sinks, window": (MIXED, 8, 4, 2, 16, {"sinks": True, "window": 4}),
    "mixed": (MIXED, 8, 4, 2, 32, {}), "chunks, window": (MIXED, 5 + 3, 4, 2, 24, {"window": 3}), "scale": (MIXED, 16, 2, 1, 16, {"scale": 0.7}),
    "256 wide": ([(30, 5)], 4, 2, 1, 256, {}), "16 wide": ([(30, 5)], 4, 2, 1, 16, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_attention_over_pages_is_pytorchs(name, dtype):
    parts, most, H, K, d, options = CASES[name]
    qkv, keys, values, slots, request, positions = step(parts, H, K, d, dtype)
    q, k, v = qkv.split((H, K, K), 1)
    sinks = torch.linspace(-1, 2, H, device=DEVICE) if options.get("sinks") else None
    before = keys.clone(), values.clone()
    into = slots[request, positions]
    paged.write(k, v, into, keys, values)
    for held, old, new in ((keys, before[0], k), (values, before[1], v)):
        assert torch.equal(held[into], new)
        others = torch.ones(P, dtype=torch.bool, device=DEVICE)
        others[into] = False
        assert torch.equal(held[others], old[others])
    got = paged.attend(q, keys, values, slots, request, positions, tiles_of(parts, most), **{**options, "sinks": sinks})
    exact = want(parts, q, keys, values, slots, request, options.get("window"), options.get("scale"), sinks)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7  # one step of bfloat16: the interpreter cuts off where a GPU rounds
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


def test_rows_that_fill_a_batch_up_write_and_read_nothing():
    qkv, keys, values, slots, request, positions = step([(9, 1), (0, 1)], 4, 2, 16, torch.float32)
    q, k, v = qkv.split((4, 2, 2), 1)
    tiles = [paged.Tiles(torch.tensor([0, 1], device=DEVICE), torch.tensor([1, 0], device=DEVICE), 1)]
    before, into = keys.clone(), slots[request, positions]
    into[1] = -1
    paged.write(k, v, into, keys, values)
    assert (keys != before).any(-1).any(-1).nonzero().flatten().tolist() == [into[0]]
    got = paged.attend(q, keys, values, slots, request, positions, tiles)
    torch.testing.assert_close(got[:1].double(), want([(9, 1)], q, keys, values, slots, request, None, None, None), rtol=2e-6, atol=2e-6)
