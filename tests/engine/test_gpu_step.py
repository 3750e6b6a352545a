"""The engine's steps by Triton kernels against the flat pass, its readable twin: whole generations, token by token.

Without a GPU, in Triton's interpreter, where Triton is installed; with one, compiled, and recorded as CUDA graphs:

    PELLUCID_TRITON=interpret pytest tests/engine/test_gpu_step.py
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("PELLUCID_TRITON", "interpret")

from tiny_decoders import decoder

from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.gpu_step import GpuStep, choose_gpu_step, rows_recorded
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.nn import MLP, Attn, DecoderSpec, Layer, MoE, Rope
from pellucid.ops.triton.language import choose_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHOICE = choose_triton(DEVICE)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHOICE.value, reason=CHOICE.reason)]

ROPE = Rope(16)
SPECS = {
    "grouped": (Layer(Attn(4, 2, 16, ROPE, qk_norm=True), MLP(32)),),
    "windows": (Layer(Attn(4, 2, 16, ROPE, window=7), MLP(32)), Layer(Attn(4, 2, 16, ROPE), MLP(32))),
    "sinks, gate, experts": (Layer(Attn(4, 1, 16, ROPE, sinks=True, gate=True), MoE(experts=4, top_k=2, hidden=16)),),
}


def generations(model, twin: bool, **config) -> tuple[list[list[int]], Engine]:
    """A few requests, the later ones added while the first run: steps of one token each, of chunks, and of both."""
    engine = Engine(model, config=EngineConfig(**{"cache_tokens": 300, "block": 4, "chunk": 11, "budget": 24, **config}))
    if twin:
        engine.runner.gpu = None
    lengths, new = ((1, 17, 5, 9), 6) if config.get("swap") else ((1, 17, 5), 3)
    requests = [Request(torch.randint(3, 280, (n,), generator=torch.Generator().manual_seed(n)).tolist(), SamplingParams(max_tokens=new), 0)
                for n in lengths]
    requests.append(Request([*requests[1].prompt[:13], 5], SamplingParams(max_tokens=new - 1), 0))
    for i, r in enumerate(requests):
        engine.add(r)
        if i % 2:
            engine.step()
    while engine.busy:
        engine.step()
    return [r.output for r in requests], engine


@pytest.mark.parametrize("name, config", [
    ("windows", {}), ("sinks, gate, experts", {}), ("grouped", {"cache_tokens": 32, "swap": True}), ("windows", {"drafts": 2, "proposer": "lookup"}),
    ("windows", {"prefix": "radix"})])
def test_greedy_generations_are_the_twins(name, config):
    model = decoder(DecoderSpec(vocab=280, dim=32, layers=SPECS[name], context=96)).to(DEVICE)
    got, engine = generations(model, False, **config)
    assert isinstance(engine.runner.gpu, GpuStep) and engine.runner.path.value == "triton"
    want, plain = generations(model, True, **config)
    assert got == want and len(set(map(tuple, got))) > 1
    assert bool(engine.runner.gpu.recorded) == ("experts" not in name) == (engine.runner.gpu.fused is not None)
    if config.get("swap"):
        assert engine.totals["preemptions"] > 0 and plain.totals["preemptions"] > 0


def test_a_step_begins_before_the_last_ones_tokens_are_read():
    """Seeded draws with log-probabilities, ends by a stop token and by length, somebody cancelled in flight: all as step by step."""
    model = decoder(DecoderSpec(vocab=280, dim=32, layers=SPECS["grouped"], context=96)).to(DEVICE)
    found = []
    for ahead in (True, False):
        engine = Engine(model, eos=[7, 9, 11], config=EngineConfig(cache_tokens=400, block=4))
        engine.ahead.possible &= ahead
        requests = [Request([3 + i, 5], SamplingParams(max_tokens=4 + i, temperature=1.0, logprobs=0, stop_token_ids=(20 + i, 40)), seed=i) for i in range(6)]
        flights = 0
        for i, r in enumerate(requests):
            engine.add(r)
            if i % 2:
                engine.step()
        engine.cancel(requests[4])
        while engine.busy:
            engine.step()
            flights += engine.ahead.flight is not None
        assert (flights > 0) == ahead and engine.ahead.flight is None and not engine.ahead.special
        engine.cache.check()
        assert engine.cache.available() == engine.cache.blocks
        found.append([(r.output, [round(x, 3) for x in r.logprobs], r.finish_reason) for r in requests if r is not requests[4]])
    assert found[0] == found[1] and len({reason for _, _, reason in found[0]}) == 2


def test_steps_wait_for_tokens_that_the_host_must_see():
    model = decoder(DecoderSpec(vocab=280, dim=32, layers=SPECS["grouped"], context=96)).to(DEVICE)
    outputs = []
    for twin in (False, True):
        engine = Engine(model, config=EngineConfig(cache_tokens=400, block=4))
        engine.runner.gpu = None if twin else engine.runner.gpu
        plain, penalised = (Request([3, 5], SamplingParams(max_tokens=8, logit_bias=b)) for b in (None, {77: -100.0}))
        engine.add(plain)
        engine.step()
        assert (engine.ahead.flight is None) == twin
        engine.add(penalised)
        engine.step()  # lands what was on its way
        assert engine.ahead.flight is None and engine.ahead.special == {penalised}
        while engine.busy:
            engine.step()
        outputs.append((plain.output, penalised.output))
    assert outputs[0] == outputs[1] and outputs[0][0] != outputs[0][1]


@pytest.mark.parametrize("ahead", [True, False])
def test_logits_that_are_no_numbers_end_their_request_alone(ahead):
    """Also where its next step is on its way already."""
    model = decoder(DecoderSpec(vocab=280, dim=32, layers=SPECS["grouped"], context=96)).to(DEVICE)
    with torch.no_grad():
        model.embed.weight[277], model.head_weight[277] = torch.nan, 0.0
    found = []
    for poison in (True, False):
        engine = Engine(model, config=EngineConfig(cache_tokens=400, block=4, chunk=8))
        engine.ahead.possible &= ahead
        some = [Request([3 + i, 5], SamplingParams(max_tokens=8, temperature=1.0, top_k=20, logprobs=0), seed=i) for i in range(3)]
        lost = [Request([*range(30, 40), 277, 6], SamplingParams(max_tokens=8)), Request([277], SamplingParams(max_tokens=8, logprobs=0))] if poison else []
        for r in (some[0], *lost, *some[1:]):
            engine.add(r)
            engine.step()
        while engine.busy:
            engine.step()
        engine.cache.check()
        assert engine.cache.available() == engine.cache.blocks
        assert all((r.output, r.finish_reason, r.fault) == ([], "error", "not_numbers") for r in lost)
        assert all(engine.cache.match(Request(list(r.prompt), r.params)) == [] for r in lost)
        found.append([(r.output, [round(x, 3) for x in r.logprobs], r.finish_reason) for r in some])
    assert found[0] == found[1] and {reason for _, _, reason in found[0]} == {"length"}


def test_logits_are_the_twins():
    model = decoder(DecoderSpec(vocab=280, dim=32, layers=SPECS["windows"], context=96)).to(DEVICE)
    seen: list[list[torch.Tensor]] = []
    for twin in (False, True):
        seen.append([])
        engine = Engine(model, config=EngineConfig(cache_tokens=300, block=4, chunk=11, budget=24))
        engine.runner.gpu = None if twin else engine.runner.gpu
        engine.runner.observer = lambda order, hidden: seen[-1].append(hidden.clone())
        for n in (1, 17, 5):
            engine.add(Request(list(range(3, 3 + n)), SamplingParams(max_tokens=4), 0))
        while engine.busy:
            engine.step()
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_few_numbers_of_rows_are_recorded():
    assert [rows_recorded(n) for n in (1, 2, 3, 4, 5, 8, 9, 64)] == [1, 2, 4, 4, 8, 8, 16, 64]


@pytest.mark.parametrize("change, why", [
    ({"cache_dtype": "int8"}, "int8"), ({"layers": (Layer(Attn(2, 2, 8, Rope(8, scaling=(("factor", 2.0), ("original_max_position_embeddings", 32),
                                                    ("rope_type", "dynamic")))), MLP(16)),)}, "length")])
def test_what_the_kernels_cannot_do_runs_flat_and_says_why(change, why):
    layers = change.pop("layers", SPECS["grouped"])
    model = decoder(DecoderSpec(vocab=280, dim=32, layers=layers, context=96)).to(DEVICE)
    engine = Engine(model, config=EngineConfig(cache_tokens=64, **change))
    assert engine.runner.gpu is None and why in choose_gpu_step(model, engine.runner.pages).reason
