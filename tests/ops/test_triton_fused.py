"""The fused kernels of a GPU step against the operators that the model is written with.

    PELLUCID_TRITON=interpret pytest tests/ops/test_triton_fused.py
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("PELLUCID_TRITON", "interpret")

from pellucid.ops.activation import swiglu_reference
from pellucid.ops.heads import qkv_heads_reference
from pellucid.ops.norm import rms_norm_reference
from pellucid.ops.rope import rope_angles, rope_frequencies
from pellucid.ops.triton import fused, paged
from pellucid.ops.triton.language import choose_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHOICE = choose_triton(DEVICE)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHOICE.value, reason=CHOICE.reason)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_rows_norms_and_gates():
    table, drawn = normal(20, 70), torch.tensor([4, 5, -1], device=DEVICE)
    tokens, sources = (torch.tensor(t, device=DEVICE) for t in ([3, 9, 1, 7], [-1, 1, 0, 2]))
    x = fused.embed(tokens, sources, drawn, table)
    close(x, table[torch.tensor([3, 5, 4, 0], device=DEVICE)])  # -1, logits that were no numbers, reads some row
    delta, weight, before = normal(4, 70, seed=1), 1 + normal(70, seed=2), x.clone()
    close(fused.add_norm(x, delta, weight, 1e-5, torch.float32), rms_norm_reference(before + delta, weight, 1e-5))
    close(x, before + delta)
    close(fused.add_norm(x, None, weight, 1e-5, torch.float32), rms_norm_reference(x, weight, 1e-5))
    close(fused.gate(normal(3, 2 * 50)), swiglu_reference(normal(3, 2 * 50)))


@pytest.mark.parametrize("inputs, outputs", [(40, 13), (1030, 6), (1200, 2051)])
@pytest.mark.parametrize("kind", ["plain", "normed", "gated", "added"])
def test_a_rows_product(kind, inputs, outputs):
    rows = 2 * outputs if kind == "gated" else outputs
    x, weight, bias, norm = 3 * normal(1, inputs), normal(rows, inputs, seed=1) / inputs**0.5, normal(rows, seed=2), 1 + normal(inputs, seed=3)
    h = rms_norm_reference(x, norm, 1e-5) if kind in ("normed", "gated") else x
    want, out = F.linear(h, weight, bias), torch.full((1, outputs), 0.5, device=DEVICE)
    want = swiglu_reference(want) if kind == "gated" else want + 0.5 if kind == "added" else want
    got = fused.row_product(x, weight, out, norm if h is not x else None, 1e-5, bias, kind == "gated", kind == "added")
    assert got is out
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("H, K, d, r, normed", [(4, 2, 16, 16, True), (6, 2, 24, 16, False), (3, 1, 10, 0, True), (9, 9, 16, 8, True)])
@pytest.mark.parametrize("splits, window", [(1, None), (4, None), (2, 5)])
def test_heads_and_attention_of_raw_projections(H, K, d, r, normed, splits, window):
    """Both ways, heads apart and within the attention, against the operators and each other."""
    N, P = 4, 64
    qkv, keys, values = normal(N, H + 2 * K, d), normal(P, K, d, seed=1), normal(P, K, d, seed=2)
    lengths = [0, 5, 13, 9]
    slots = torch.randperm(P, generator=torch.Generator().manual_seed(3)).view(N, 16).to(DEVICE)
    request, positions = torch.tensor([2, 0, 3, 1], device=DEVICE), torch.tensor(lengths, device=DEVICE)
    norms = (1 + normal(d, seed=4), 1 + normal(d, seed=5)) if normed else None
    frequencies, factor = rope_frequencies(r, 100.0).to(DEVICE) if r else torch.empty(0, device=DEVICE), 1.3
    cos, sin = rope_angles(positions[:, None], frequencies, factor=factor) if r else (None, None)
    q, k, v = (t[:, :, 0] for t in qkv_heads_reference(qkv[:, None], H, cos, sin, norms, 1e-5))
    into = slots[request, positions]

    k1, v1, k2, v2 = keys.clone(), values.clone(), keys.clone(), values.clone()
    close(fused.heads(qkv.flatten(1), H, norms, 1e-5, frequencies, factor, positions, request, slots, k1, v1), q)
    close(k1[into], k)
    assert torch.equal(v1[into], v)
    tiles = [paged.Tiles(torch.arange(N, device=DEVICE), torch.tensor([1, 1, 1, 0], device=DEVICE), 1)]
    want = paged.attend(q, k1, v1, slots, request, positions, tiles, window, splits=splits)
    got = paged.attend(qkv, k2, v2, slots, request, positions, tiles, window, splits=splits, raw=paged.Raw(norms, 1e-5, frequencies, factor))
    close(got[:3], want[:3])
    close(k2[into[:3]], k1[into[:3]])
    others = torch.ones(P, dtype=torch.bool, device=DEVICE)
    others[into[:3]] = False  # the last row only fills up: it writes nothing
    assert torch.equal(k2[others], keys[others]) and torch.equal(v2[others], values[others])
