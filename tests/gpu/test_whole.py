"""All layers of a step of one row in one kernel (ops/cuda/whole.cu), on a Hopper GPU, against the chain of kernels and the model.

    pytest tests/gpu/test_whole.py

Last run on an NVIDIA H200 with PyTorch 2.11 (experiments/LOG.md says which of them).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.gpu_pass import FusedPass, WholePass
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.ops.cuda import whole
from pellucid.ops.triton import paged

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and torch.cuda.get_device_properties(0).multi_processor_count >= 128
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="the kernel is for Hopper")]

SPECS = {
    "Qwen3-0.6B's layers": (Layer(Attn(16, 8, 128, Rope(128), qk_norm=True), MLP(3072)),) * 3,
    "windows, half turned": (Layer(Attn(8, 4, 64, Rope(32), window=40), MLP(1024)), Layer(Attn(8, 4, 64, Rope(32)), MLP(1024))),
    "Qwen3-1.7B's layers": (Layer(Attn(16, 8, 128, Rope(128), qk_norm=True), MLP(6144)),) * 2,
}


@pytest.fixture(params=SPECS)
def engine(request) -> Engine:
    layers = SPECS[request.param]
    model = init_weights(Decoder(DecoderSpec(vocab=8192, dim=2048 if "1.7B" in request.param else 1024, layers=layers, context=4096)), 0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.embed.weight.normal_(0, 1, generator=generator)
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    made = Engine(model.to("cuda", torch.bfloat16), config=EngineConfig(running=2, cache_tokens=4400, budget=512))
    pages = made.runner.pages
    mixed = torch.randperm(pages.entries[0][0].codes.shape[0], generator=generator)
    for n, slots in enumerate(pages.table.slots):  # layers of different groups may share one memory: no slot twice
        slots[0] = mixed[n * slots.shape[1] : (n + 1) * slots.shape[1]].cuda()
    for pair in pages.entries:
        for entries in pair:
            entries.codes.copy_(torch.randn(entries.codes.shape, generator=generator))
    fused = made.runner.gpu.fused
    if "1.7B" in request.param:  # larger than what it is chosen for
        assert fused.whole is None and "long enough" in fused.reason
        fused.whole = with_plan(made)
    assert fused.whole is not None, fused.reason
    return made


def with_plan(engine: Engine) -> WholePass:
    plan = whole.plan_for(whole.Sizes(2048, 6144, 16, 8, 128, 128, True), torch.cuda.get_device_properties(0).multi_processor_count)
    assert plan is not None
    return WholePass(engine.runner.model, engine.runner.pages, plan)


def step(fused: FusedPass, way: Any, token: int, position: int, source: int = -1) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The hidden state, and the cache, which is as before afterwards."""
    entries = [e.codes for pair in fused.pages.entries for e in pair]
    before, fused.whole = [e.clone() for e in entries], way
    numbers, drawn = torch.tensor([[token], [0], [position], [1], [source]], device="cuda"), torch.tensor([3, 77], device="cuda")
    out = fused.hidden(numbers, [paged.Tiles(torch.zeros(1, dtype=torch.int64, device="cuda"), numbers[3], 1)], drawn).float()
    after = [e.clone() for e in entries]
    for e, b in zip(entries, before, strict=True):
        e.copy_(b)
    return out, after


def test_a_row_through_all_layers_is_that_of_the_chain(engine):
    fused = engine.runner.gpu.fused
    one, longest = fused.whole, min(slots.shape[1] for slots in fused.pages.table.slots) - 1
    for token, position, source in ((5, 0, -1), (9, 1, 1), (9, 15, -1), (9, 16, -1), (200, 90, 0), (8, min(700, longest), -1), (8, min(2900, longest), -1)):
        want, kept = step(fused, None, token, position, source)
        got, mine = step(fused, one, token, position, source)
        assert torch.isfinite(got).all() and ((got - want).norm() / want.norm()).item() < 0.02
        for a, b in zip(mine, kept, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=0.03, atol=0.06)
            changed = (a != b).any(-1).any(-1)
            assert changed.sum() <= len(fused.pages.table.slots)  # the token's own, one a group, if last bits differ
        assert torch.equal(step(fused, one, token, position, source)[0], got)


def test_the_same_bits_beside_other_work(engine):
    """An error that moves would be a race."""
    fused = engine.runner.gpu.fused
    one = fused.whole
    numbers, drawn = torch.tensor([[9], [0], [90], [1], [-1]], device="cuda"), torch.tensor([3], device="cuda")
    first = one.hidden(numbers, drawn).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = one.hidden(numbers, drawn)
    other, busy, differ = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(2000):
        graph.replay()
        differ += (out != first).any()
        if i % 10 == 0:
            with torch.cuda.stream(other):
                busy = (busy @ busy).clamp(-1, 1)
    torch.cuda.synchronize()
    assert differ.item() == 0


def test_generations_are_recorded_and_those_of_the_chain(engine):
    outputs = []
    for way in ("one kernel", "chain"):
        mine = Engine(engine.runner.model, config=EngineConfig(running=2, cache_tokens=1000, budget=512))
        gpu = mine.runner.gpu
        if way == "chain":
            gpu.fused.whole = None
        elif engine.runner.model.spec.dim == 2048:
            gpu.fused.whole = with_plan(mine)
        request = Request([5, 6, 7, 8], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True), 0)
        mine.add(request)
        while mine.busy:
            mine.step()
        assert any(rows == 1 for rows, _ in gpu.recorded)
        outputs.append(request.output)
    agree = next((i for i, (a, b) in enumerate(zip(*outputs, strict=True)) if a != b), 40)
    assert agree >= 8  # bfloat16 sums of another order part at a near tie, sooner or later
