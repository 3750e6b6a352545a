"""What only a CUDA GPU can show: recorded steps (CUDA graphs). On a machine with one, this and the kernels' own tests are one command:

    pytest tests/gpu tests/ops/test_triton_paged.py tests/ops/test_triton_draw.py tests/engine/test_gpu_step.py

Last run on an NVIDIA H200 with PyTorch 2.11 and Triton 3.6: all pass.
"""

from __future__ import annotations

import pytest
import torch

from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.gpu_step import GpuStep
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.ops.triton.language import choose_triton

pytestmark = pytest.mark.gpu

SPEC = DecoderSpec(vocab=320, dim=256, layers=(Layer(Attn(8, 2, 64, Rope(64), qk_norm=True), MLP(512)),) * 3, context=4096, embed_scale=2.0)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request) -> Decoder:
    assert choose_triton(torch.device("cuda")).value, choose_triton(torch.device("cuda")).reason
    made = init_weights(Decoder(SPEC), 0).eval()
    with torch.no_grad():
        made.embed.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    return made.to("cuda", request.param)


def hidden(model: Decoder, way: str, lengths: list[int], new: int = 8) -> list[torch.Tensor]:
    """Every step's last hidden states, with tokens that do not depend on them: a bias draws the same ones in every way."""
    engine, seen = Engine(model, config=EngineConfig(cache_tokens=20_000, budget=512)), list[torch.Tensor]()
    step = engine.runner.gpu
    assert isinstance(step, GpuStep) and step.graphs.value
    if way == "eager":
        step.graphs = type(step.graphs)(False, "to compare")
    if way == "flat":
        engine.runner.gpu = None
    engine.runner.observer = lambda order, states: seen.append(states.float().clone())
    for n in lengths:
        engine.add(Request([i % 300 for i in range(n)], SamplingParams(max_tokens=new, ignore_eos=True, logit_bias={n % 300: 1e4}), 0))
    while engine.busy:
        engine.step()
    assert bool(step.recorded) == (way == "graphs")
    return seen


@pytest.mark.parametrize("lengths", [[5], [40, 3, 700], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1020, 1500]], ids=["one", "three", "nine", "the table grows"])
def test_recorded_steps_are_the_twins(model, lengths):
    graphs, eager, flat = (hidden(model, way, lengths) for way in ("graphs", "eager", "flat"))
    tolerance = 1e-3 if model.embed.weight.dtype == torch.float32 else 0.06
    for a, b, c in zip(graphs, eager, flat, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)  # padded products may add in another order
        torch.testing.assert_close(a, c, rtol=tolerance, atol=tolerance)


def test_a_step_is_drawn_with_one_wait(model):
    from pellucid.engine.sampler import Sampler

    sampler = Sampler([SamplingParams(temperature=1.0, top_k=40, top_p=0.9)] * 8, range(8), "cuda")
    logits, steps = torch.randn(8, 50_000, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
    sampler(logits, steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler._draw_fused(logits, steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
