"""INT4 layers: codes and kernels against the definition, against PyTorch's and gguf-like arithmetic of our own, folders, the engine."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pellucid.engine import LLM, SamplingParams
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.opening import open_model
from pellucid.engine.request import Request
from pellucid.errors import BadInput, PellucidError
from pellucid.models import load, save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, KVCache, Layer, Rope, init_weights
from pellucid.ops.int4 import int4_decode, int4_pack, int4_unpack
from pellucid.quant import (
    Int4Linear,
    Int8Linear,
    choose_int4,
    compress,
    int4_linear_reference,
    is_quantized,
    measure,
    quantize,
    quantize_groups,
    quantize_rows,
    stored_bytes,
)
from pellucid.quant.int4 import GROUP, Int4Pack, NativeInt4, Plain, fault_of
from pellucid.tokenizers import train_bpe

KERNELS = [k for k in (NativeInt4(), Int4Pack(64), Int4Pack(32), Plain()) if fault_of(k) is None]


def tiny(tied: bool = True, bias: bool = False, vocab: int = 97, dim: int = 64, hidden: int = 96, family: str = "qwen3") -> Decoder:
    attn = Attn(4, 2, 16, Rope(16), qkv_bias=bias, qk_norm=family == "qwen3", out_bias=bias)
    spec = DecoderSpec(vocab, dim, (Layer(attn, MLP(hidden)),) * 2, tied=tied, context=64, family=family)
    return init_weights(Decoder(spec), seed=1).eval()


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(y: Tensor, exact: Tensor) -> float:
    return float((y - exact).norm() / exact.norm())


def test_bytes_hold_two_codes():
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 1)
    assert int4_pack(codes)[0].tolist() == [16 * (k + 1) + k for k in range(0, 16, 2)]
    assert torch.equal(int4_unpack(int4_pack(codes)), codes)


def test_decoding_by_loops():
    codes, scale = torch.randint(0, 16, (5, 64), dtype=torch.uint8), rows(5, 2).bfloat16()
    w = int4_decode(codes, scale)
    for n in range(5):
        for k in range(64):
            assert float(w[n, k]) == (int(codes[n, k]) - 8) * float(scale[n, k // 32])


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 6), groups=st.integers(1, 3), seed=st.integers(0, 2**31), size=st.floats(1e-20, 1e20), flat=st.booleans())
def test_rounding_is_idempotent_and_no_worse_than_the_plain_one(n: int, groups: int, seed: int, size: float, flat: bool):
    g = torch.Generator().manual_seed(seed)
    w = (torch.rand(n, 32 * groups, generator=g) - 0.5 if flat else torch.randn(n, 32 * groups, generator=g)) * size
    codes, scale = quantize_groups(w)
    assert codes.dtype == torch.uint8 and codes.max() <= 15
    back = int4_decode(codes, scale)
    assert torch.equal(back, int4_decode(*quantize_groups(back))), "bit for bit"
    parts = w.view(n, groups, 32).double()
    peak = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    step = (peak / -8).float().bfloat16().double()  # Q4_0: the largest value gets the code -8
    plain = (parts / step).round().clamp(-8, 7) * step
    lost, lost_plainly = ((t.double() - parts).square().sum(-1) for t in (back.view(parts.shape), plain))
    assert (lost <= lost_plainly * (1 + 1e-5)).all()


def test_zeros_outliers_and_what_is_not_finite():
    w = torch.zeros(2, 64)
    w[1, 40] = -3.0
    codes, scale = quantize_groups(w)
    back = int4_decode(codes, scale)
    assert back[0].eq(0).all() and back[1, 40] == -3.0 and back[1].count_nonzero() == 1
    w[0, 0] = float("nan")
    with pytest.raises(PellucidError, match="not a number"):
        quantize_groups(w)
    with pytest.raises(BadInput, match="do not divide"):
        quantize_groups(torch.zeros(2, 48))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("m", [1, 3, 23, 24, 70])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (64, 64), (83, 96), (200, 160)])
def test_kernel_against_the_dequantized_product(kernel, m: int, n: int, k: int):
    """bfloat16 keeps 8 bits of activations, and of the result: half a percent of the definition; 8 bits by groups lose as
    much, and more where only a few numbers were summed."""
    codes, scale = quantize_groups(rows(n, k))
    x, bias = rows(m, k, seed=2), rows(n, seed=3)
    exact = int4_linear_reference(x, codes, scale, bias)
    layer = Int4Linear(codes, scale, bias, kernel=kernel)
    y = layer(x)
    assert y.dtype == torch.float32 and y.shape == (m, n)
    assert error(y, exact) < (1e-5 if kernel == Plain() else 0.02 if n == 1 else 0.007)
    assert torch.equal(layer.weight, int4_decode(codes, scale)), "it keeps the weights as they are"
    assert torch.equal(layer(x[None])[0], y)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(kernel):
    layer = Int4Linear(*quantize_groups(rows(128, 64)), kernel=kernel)
    x = rows(16, 64, seed=3) * torch.logspace(-4, 4, 16)[:, None]
    together = layer(x)
    for i in (0, 1, 7, 15):
        assert error(layer(x[i : i + 1]), together[i : i + 1]) < 1e-6


def test_relative_error_of_one_product():
    """0.096 is what reference tables give for torch's 4-bit product with min-max groups of 32 on normal weights."""
    w, x = rows(512, 1024), rows(8, 1024, seed=5)
    assert 0.07 < error(Int4Linear(*quantize_groups(w))(x), x @ w.mT) < 0.096


def test_choice_of_the_kernel(monkeypatch: pytest.MonkeyPatch):
    assert fault_of(choose_int4().value) is None
    right = Int4Pack.product
    monkeypatch.setattr(Int4Pack, "product", lambda self, x, packed: right(self, x, packed) * 1.1)
    monkeypatch.setattr(NativeInt4, "product", lambda self, x, packed: x @ x.new_zeros(x.shape[1], packed.shape[0]))
    later = choose_int4.__wrapped__()
    assert later.value == Plain() and "products are wrong" in later.reason

    def gone(*_: object) -> None:
        raise RuntimeError("no such operator\nmore")

    monkeypatch.setattr(Int4Pack, "pack", gone)
    monkeypatch.setattr(NativeInt4, "pack", gone)
    later = choose_int4.__wrapped__()
    assert later.value == Plain() and "no such operator" in later.reason and "more" not in later.reason


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_which_layers_become_what(tied: bool, bias: bool):
    model = tiny(tied, bias, hidden=80)  # rows of 80 do not divide into groups of 32
    small = quantize(model, bits=4)
    kinds = {name: type(m) for name, m in small.named_modules()}
    assert kinds["layers.0.mixer.qkv"] is kinds["layers.1.ffn.gate_up"] is Int4Linear
    assert kinds["layers.0.ffn.down"] is kinds["head"] is Int8Linear
    assert is_quantized(small) and not is_quantized(model)
    tokens = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(0))
    assert error(small(tokens), model(tokens).detach()) < 0.3
    codes, scale = quantize_rows(model.embed.weight)
    assert torch.equal(small.embed.weight, codes.float() * scale)
    twin = copy.deepcopy(small)
    assert torch.equal(twin(tokens), small(tokens))


def test_refusals():
    with pytest.raises(BadInput, match="5 bits"):
        quantize(tiny(), bits=5)
    small = quantize(tiny(), bits=4)
    with pytest.raises(BadInput, match="already"):
        quantize(small)
    with pytest.raises(TypeError, match="float32"):
        small.layers[0].mixer.qkv(rows(2, 64).bfloat16())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_folder_and_the_model_are_the_same(tmp_path: Path, family: str, tied: bool):
    model = tiny(tied, family == "llama", vocab=400, family=family)
    save(model, tmp_path / "float")
    told = compress(tmp_path / "float", tmp_path / "int4", bits=4)
    small, opened = quantize(model, bits=4), open_model(tmp_path / "int4")
    assert any(isinstance(m, Int4Linear) for m in opened.modules())
    tokens = torch.randint(0, 400, (3, 17), generator=torch.Generator().manual_seed(0))
    assert torch.equal(opened(tokens), small(tokens)), "bit for bit"
    assert told.size == stored_bytes(small) == stored_bytes(opened)
    on_disk = (tmp_path / "int4" / "model.safetensors").stat().st_size
    assert told.size < on_disk < told.size + 10_000
    tensors = load_file(tmp_path / "int4" / "model.safetensors")
    q = "model.layers.1.self_attn.q_proj.weight"
    assert tensors[q].dtype == torch.uint8 and tensors[q].shape == (64, 32) and tensors[f"{q}_scale"].shape == (64, 64 // GROUP)
    assert tensors["model.embed_tokens.weight"].dtype == torch.int8
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "pellucid-int4" and config["quantization_config"]["bits"] == 4
    as_float = load(tmp_path / "int4")
    assert not is_quantized(as_float)
    assert torch.equal(as_float.layers[1].mixer.qkv.weight, small.layers[1].mixer.qkv.weight)
    with pytest.raises(BadInput, match="quantized already"):
        compress(tmp_path / "int4", tmp_path / "again", bits=8)


def test_damaged_folders_are_refused(tmp_path: Path):
    save(tiny(), tmp_path / "float")
    compress(tmp_path / "float", tmp_path / "int4", bits=4)
    path = tmp_path / "int4" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    for change in ("missing", "flat", "other rows", "other groups", "whole"):
        broken = dict(tensors)
        scale = broken.pop(f"{name}_scale")
        if change != "missing":
            broken[f"{name}_scale"] = {"flat": scale.flatten(), "other rows": scale[:1].clone(), "whole": scale.int(),
                                       "other groups": torch.ones(64, 5)}[change]
        save_file(broken, path)
        with pytest.raises(BadInput, match=r"down_proj.weight"):
            load(tmp_path / "int4")


@pytest.mark.parametrize("bits", [4, 8])
def test_the_engine_runs_quantized_models_as_their_own_forward_does(bits: int):
    """Greedy through paged blocks, chunks and a mixed batch, against one contiguous cache."""
    small = quantize(tiny(vocab=300), bits=bits)
    g = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 300, (n,), generator=g).tolist() for n in (3, 11, 20)]

    def alone(prompt: list[int]) -> tuple[list[int], list[float]]:
        cache, tokens, gaps = KVCache(small.spec, 1, 64), list(prompt), []
        feed = tokens
        for _ in range(8):
            top = small(torch.tensor([feed]), cache=cache)[0, -1].topk(2)
            gaps.append(float(top.values[0] - top.values[1]))
            feed = [int(top.indices[0])]
            tokens += feed
        return tokens[len(prompt) :], gaps

    expected = [alone(p) for p in prompts]
    for config in (EngineConfig(cache_tokens=256, block=4, chunk=7), EngineConfig(cache_tokens=256, prefix="radix", budget=16)):
        engine = Engine(small, config=config)
        assert engine.runner.compiled is not None, "by the compiled step"
        requests = [Request(p, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)) for p in prompts]
        for r in requests:
            engine.add(r)
        while engine.busy:
            engine.step()
        for r, (tokens, gaps) in zip(requests, expected, strict=True):
            differs = next((i for i, (a, b) in enumerate(zip(r.output, tokens)) if a != b), None)
            assert differs is None or gaps[differs] < 0.02, "rounding may only decide between equals"


def test_llm_runs_the_folder(tmp_path: Path):
    tokenizer = train_bpe(["one two three four " * 50, "hello world " * 50, "".join(map(chr, range(32, 400)))], 400)
    save(tiny(vocab=400), tmp_path / "float", tokenizer=tokenizer)
    compress(tmp_path / "float", tmp_path / "int4", bits=4)
    llm = LLM(tmp_path / "int4")
    assert any(isinstance(m, Int4Linear) for m in llm.model.modules())
    assert len(llm.generate("hello", SamplingParams(max_tokens=4))[0].outputs[0].token_ids) > 0


def test_measure_names_it():
    model = tiny(vocab=300)
    report = measure(model, quantize(model, bits=4), seconds=0.1, batches=(1,))
    assert set(report["bytes"]) == {"float32", "int4"} and report["size_ratio"] < 0.26 and "4-bit" in report["kernel"]
    assert 0.03 < report["relative_error"] < 0.12
