"""Quantized experts: each as a layer of its own would be, from files of every layout, in memory, in folders and in the engine."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny_checkpoints import CASES, written

from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.opening import open_model
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.models import load
from pellucid.models.hub import matrices_of
from pellucid.nn import Decoder, Linear
from pellucid.nn.experts import ExpertLinear, Experts
from pellucid.ops.dispatch import Pairs
from pellucid.ops.experts import experts, gated
from pellucid.plan import inspect
from pellucid.quant import Int4Linear, Int8Linear, compress, left_float, measure, quantize, stored_bytes

FAMILIES = ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "deepseek-v3", "qwen3.5-moe", "gpt2", "qwen3-next"]


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name in CASES])
def folder(request, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    written(wide(request.param), place)
    return place


def wide(name: str) -> PreTrainedConfig:
    """With rows that divide into groups of 32."""
    config = deepcopy(CASES[name])
    for field, value in {"hidden_size": 64, "n_embd": 64, "intermediate_size": 64, "moe_intermediate_size": 32}.items():
        if field in config.to_dict():
            setattr(config, field, value)
    return config


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (3, 17), generator=torch.Generator().manual_seed(seed))


def one_by_one(layer: Experts, x: Tensor, pairs: Pairs, bits: int) -> Tensor:
    """Each expert as two quantized `Linear`s: a model of one layer is quantized for it."""
    def alone(m: ExpertLinear, e: int) -> nn.Module:
        linear = Linear(m.weight.shape[2], m.parts, m.bias is not None)
        linear.weight = nn.Parameter(m.weight[e])
        if m.bias is not None:
            linear.bias = nn.Parameter(m.bias[e])
        holder = nn.Module()
        holder.embed, holder.head, holder.linear = nn.Embedding(4, 4), Linear(4, 4), linear
        nn.init.ones_(holder.head.weight)
        return quantize(holder, bits=bits).linear  # type: ignore[arg-type]

    out, at = torch.zeros_like(x), 0
    for e, count in enumerate(pairs.counts):
        for token, weight in zip(pairs.tokens[at : at + count].tolist(), pairs.weights[at : at + count]):
            h = gated(alone(layer.experts["gate_up"], e)(x[token : token + 1]), layer.spec.act, layer.spec.clamp)
            out[token] += weight * alone(layer.experts["down"], e)(h)[0]
        at += count
    return out


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])  # without and with biases
def test_each_expert_is_what_a_layer_of_its_own_would_be(name, bits, tmp_path):
    written(wide(name), tmp_path)
    model = load(tmp_path)
    number, layer = next((i, b.ffn) for i, b in enumerate(model.layers) if isinstance(b.ffn, Experts))
    small = quantize(model, bits=bits).layers[number].ffn
    kinds = {type(m) for m in small.experts.modules() if not isinstance(m, (nn.ModuleDict, nn.ModuleList))}
    assert kinds == {Int8Linear if bits == 8 else Int4Linear}
    x = torch.randn(9, model.spec.dim, generator=torch.Generator().manual_seed(1))
    pairs, _ = layer.dispatch(layer.router(x), None)
    found, exact = experts(x, pairs, small.weights), experts(x, pairs, layer.weights).detach()
    assert torch.allclose(found, one_by_one(layer, x, pairs, bits), atol=1e-5 * float(exact.abs().max()))
    assert 0.001 < float((found - exact).norm() / exact.norm()) < (0.03 if bits == 8 else 0.25)


@pytest.mark.parametrize("bits", [8, 4])
def test_folder_and_model_are_the_same_for_every_family(folder, bits, tmp_path):
    model = load(folder)
    told = compress(folder, tmp_path / "small", bits, matrices_of(folder))
    opened, small, direct = open_model(tmp_path / "small"), quantize(model, bits=bits), open_model(folder, bits=bits)
    want = small(tokens())
    assert torch.equal(opened(tokens()), want) and torch.equal(direct(tokens()), want), "bit for bit"
    exact = model(tokens()).detach()
    assert 0 < float((want - exact).norm() / exact.norm()) < (0.6 if bits == 8 else 1.2)  # a token may be sent to another expert
    assert any(isinstance(m, Int4Linear) for m in small.modules()) == (bits == 4)
    assert not any(isinstance(m, (Linear, ExpertLinear)) for m in small.modules()), "no product is left in float"
    if not told.kept:
        assert told.size == stored_bytes(small)
    assert all("transposed" in why for why in told.kept.values())
    assert bool(told.kept) == (bits == 4 and any(kind == "columns" for kind in matrices_of(folder).values()))
    assert all(any(word in name for word in ("router", "conv", "positions", "A_log")) for name in left_float(small))
    assert inspect(tmp_path / "small").parameters == inspect(folder).parameters


def test_experts_take_less_room_in_the_file(tmp_path):
    written("qwen3-moe", tmp_path / "float")
    told = compress(tmp_path / "float", tmp_path / "small", 8, matrices_of(tmp_path / "float"))
    total = sum(f.stat().st_size for f in (tmp_path / "float").glob("*.safetensors"))
    assert told.size < 0.35 * total


def test_the_engine_and_the_measure_run_them(tmp_path):
    written("qwen3-moe", tmp_path)
    model = load(tmp_path)
    small = quantize(model)
    engine = Engine(small, config=EngineConfig(cache_tokens=256, block=4, chunk=7))
    prompts = [tokens(n)[0].tolist() for n in range(3)]
    requests = [Request(p, SamplingParams(max_tokens=6, ignore_eos=True)) for p in prompts]
    for r in requests:
        engine.add(r)
    while engine.busy:
        engine.step()
    for r, p in zip(requests, prompts):
        for i, token in enumerate(r.output):
            logits = small(torch.tensor([p + r.output[:i]]))[0, -1]
            assert logits.max() - logits[token] < 0.05 * logits.abs().max()
    report = measure(model, small, seconds=0.1, batches=(1,))
    assert 0.003 < report["relative_error"] < 0.03


def test_matrices_given_up_while_rounding(tmp_path):
    written("qwen3-moe", tmp_path)
    model = load(tmp_path)
    want = quantize(model)(tokens())
    assert torch.equal(quantize(model, consume=True)(tokens()), want)
    assert not any(m.weight.numel() for m in model.modules() if isinstance(m, (Linear, ExpertLinear)))
    assert isinstance(model, Decoder)
