"""The fused draw against the sampler's readable twin in PyTorch: the same uniform numbers must give the same tokens."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("PELLUCID_TRITON", "interpret")

from pellucid.engine.params import SamplingParams
from pellucid.engine.sampler import Sampler
from pellucid.ops.triton.draw import draw
from pellucid.ops.triton.language import choose_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHOICE = choose_triton(DEVICE)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHOICE.value, reason=CHOICE.reason)]

SETTINGS = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.4}, {"temperature": 1.0, "top_k": 1}, {"temperature": 2.0, "top_k": 7},
            {"temperature": 1.0, "top_p": 0.6}, {"temperature": 1.5, "top_k": 20, "top_p": 0.8}, {"temperature": 1.0, "min_p": 0.2},
            {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "min_p": 0.05}, {"temperature": 0.0, "top_k": 3, "top_p": 0.5}]


@pytest.mark.parametrize("vocab", [300, 9000], ids=["one block", "three blocks"])
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_draws_are_the_twins(dtype, ties, vocab):
    B = 4 * len(SETTINGS)
    logits = (3 * torch.randn(B, vocab, generator=torch.Generator().manual_seed(1))).to(dtype).to(DEVICE)
    logits = logits.round() if ties else logits
    sampler = Sampler([SamplingParams(**s, logprobs=True) for s in SETTINGS] * 4, range(B), DEVICE)
    steps = torch.full((B,), 5, device=DEVICE)
    want, want_logprobs = sampler._draw(logits, steps, slice(None))
    tokens, logprobs = draw(logits, sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p, sampler.seeds, steps)
    same = tokens == want
    assert same.sum() >= B - 1  # a draw on the very border of two tokens may fall to either
    torch.testing.assert_close(logprobs[same], want_logprobs[same], rtol=1e-4, atol=1e-4)


def test_rows_that_are_no_numbers_give_no_token():
    logits = torch.zeros(4, 40, device=DEVICE)
    logits[0, 7], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, :39] = -torch.inf
    ones, none = torch.ones(4, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    assert draw(logits, ones, none, ones, 0 * ones, none, none)[0].tolist() == [-1, -1, -1, 39]
