"""INT8 layers: the kernels against their definition in whole numbers, against PyTorch's own dynamic quantization, and
the model against its float32 form."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pellucid.errors import BadInput, PellucidError
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, KVCache, Layer, Rope, init_weights
from pellucid.quant import (
    Int8Linear,
    choose_kernel,
    int8_linear_reference,
    is_quantized,
    measure,
    quantize,
    quantize_rows,
    stored_bytes,
)
from pellucid.quant.kernels import Fbgemm, IntMM, Native, fault_of

KERNELS = [k for k in (Native(), Fbgemm(), Fbgemm(63), IntMM()) if fault_of(k) is None]


def tiny(tied: bool = True, bias: bool = False, qk_norm: bool = True, vocab: int = 97, dim: int = 48, layers: int = 2) -> Decoder:
    attn = Attn(4, 2, 12, Rope(12), qkv_bias=bias, qk_norm=qk_norm)
    spec = DecoderSpec(vocab, dim, (Layer(attn, MLP(2 * dim, bias=bias)),) * layers, tied=tied, context=64)
    return init_weights(Decoder(spec), seed=1).eval()


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 40), k=st.integers(1, 130), seed=st.integers(0, 2**31), spread=st.floats(0, 30))
def test_kernel_equals_the_definition_bit_for_bit(kernel, m: int, n: int, k: int, seed: int, spread: float):
    """Sums of whole numbers are exact, so only the few float32 factors are left, in the same order."""
    k = max(k, 2) if kernel == IntMM() else k
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) * torch.exp(spread * (torch.rand(n, 1, generator=g) - 0.5))
    x = torch.randn(m, k, generator=g) * torch.exp(spread * (torch.rand(m, 1, generator=g) - 0.5))
    x[0, : k // 2] = 0
    codes, scale = quantize_rows(w)
    layer = Int8Linear(codes, scale, kernel=kernel)
    assert torch.equal(layer(x), int8_linear_reference(x, codes, scale, limit=kernel.limit))


def test_the_definition_in_float64_without_any_kernel():
    """By loops over the formula in the docstring."""
    w, x, bias = rows(5, 7), rows(3, 7, seed=1), rows(5, seed=2)
    codes, scale = quantize_rows(w)
    y = int8_linear_reference(x, codes, scale, bias)
    for i in range(3):
        step = max(abs(v) for v in x[i].tolist()) / 127
        a = [round(v / step) for v in x[i].tolist()]
        for j in range(5):
            whole = sum(p * q for p, q in zip(a, codes[j].tolist()))
            assert float(y[i, j]) == pytest.approx(whole * float(scale[j]) * step + float(bias[j]), rel=1e-5, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 8), k=st.integers(1, 50), seed=st.integers(0, 2**31), size=st.floats(1e-20, 1e20))
def test_rounding_is_to_nearest_and_idempotent(n: int, k: int, seed: int, size: float):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * size
    codes, scale = quantize_rows(w)
    back = codes.float() * scale
    assert codes.abs().amax(1).eq(127).all()
    assert ((back - w).abs() <= scale * 0.5001).all(), "no value is further than half a step away"
    again, scale_again = quantize_rows(back)
    assert torch.equal(codes, again) and torch.equal(scale, scale_again)
    assert torch.equal(back.double(), codes.double() * scale.double()), "codes * scale is exact in float32"


def test_rows_of_zeros_and_one_outlier():
    w = torch.zeros(3, 8)
    w[1, 3], w[2] = -5.0, torch.linspace(-1, 1, 8)
    w[2, 0] = 1e6
    codes, scale = quantize_rows(w)
    assert codes[0].eq(0).all() and torch.isfinite(scale).all()
    assert codes[1].tolist() == [0, 0, 0, -127, 0, 0, 0, 0]
    assert codes[2].tolist() == [127] + [0] * 7, "an outlier eats its row and no other"
    x = torch.zeros(2, 8)
    assert Int8Linear(codes, scale)(x).eq(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_and_stays_visible(bad: float):
    w = rows(4, 8)
    layer = Int8Linear(*quantize_rows(w))
    x = rows(3, 8)
    x[1, 2] = bad
    y = layer(x)
    assert not torch.isfinite(y[1]).any() and torch.isfinite(y[[0, 2]]).all()
    w[0, 0] = bad
    with pytest.raises(PellucidError, match="infinite or not a number"):
        quantize_rows(w)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(kernel):
    layer = Int8Linear(*quantize_rows(rows(300, 200)), kernel=kernel)
    x = rows(64, 200, seed=3) * torch.logspace(-4, 4, 64)[:, None]
    together = layer(x)
    for i in (0, 1, 31, 63):
        assert torch.equal(layer(x[i : i + 1]), together[i : i + 1])
    assert torch.equal(layer(x.view(4, 16, 200)), together.view(4, 16, 300))


def test_one_scale_a_tensor_is_torch_own_dynamic_quantization():
    """Against `torch.ao.quantization.quantize_dynamic`, which rounds weights by an observer of its own."""
    if fault_of(Fbgemm()):
        pytest.fail("this processor has no exact 8-bit fbgemm; run this test on one that has")
    linear = nn.Linear(64, 32).requires_grad_(False)
    theirs = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig})
    codes, scale = quantize_rows(linear.weight)
    ours = Int8Linear(codes, scale, linear.bias, activations="tensor", kernel=Fbgemm())
    x = rows(8, 64)
    exact = linear(x)
    mine, reference = (float((y - exact).norm() / exact.norm()) for y in (ours(x), theirs(x)))
    assert mine < reference < 0.02, "theirs gives away a bit of the activations (reduce_range)"
    x[0] *= 1000  # one large row coarsens the others, which is why "token" is the default
    token = Int8Linear(codes, scale, linear.bias)
    exact = linear(x)
    error = {a: float((layer(x)[1:] - exact[1:]).norm() / exact[1:].norm()) for a, layer in (("tensor", ours), ("token", token))}
    assert error["token"] < 0.012 and error["tensor"] > 0.3, error


def test_relative_error_of_one_product():
    w, x = rows(512, 1024), rows(32, 1024, seed=5)
    y, exact = Int8Linear(*quantize_rows(w))(x), x @ w.mT
    assert 0.008 < float((y - exact).norm() / exact.norm()) < 0.012


def test_overflowing_kernels_are_found_and_passed_over():
    """With AVX2 only, fbgemm's 16-bit partial sums saturate: the probe must see it and take 7 bits."""
    code = ("from pellucid.quant.kernels import choose_kernel; c = choose_kernel('fbgemm'); print(c.value.name, c.value.limit, c.reason)\n"
            "from pellucid.quant import *; import torch\n"
            "w, x = torch.randn(64, 128), torch.randn(9, 128); codes, scale = quantize_rows(w)\n"
            "assert torch.equal(Int8Linear(codes, scale, kernel=c.value)(x), int8_linear_reference(x, codes, scale, limit=c.value.limit))")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                         env=os.environ | {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("fbgemm 63 ") and "overflow" in run.stdout


def test_choice_of_the_kernel(monkeypatch: pytest.MonkeyPatch):
    choice = choose_kernel()
    assert fault_of(choice.value) is None and "exactly" in choice.reason
    assert choose_kernel("int_mm").value == IntMM()
    with pytest.raises(BadInput, match="unknown INT8 kernel 'fast'"):
        choose_kernel("fast")

    def gone(*_: object) -> None:
        raise RuntimeError("no such operator\nmore")

    monkeypatch.setattr(Fbgemm, "pack", gone)
    monkeypatch.setattr(Native, "pack", gone)
    later = choose_kernel.__wrapped__("auto")
    assert later.value == IntMM() and "no such operator" in later.reason and "more" not in later.reason
    with pytest.raises(BadInput, match="does not work here"):
        choose_kernel.__wrapped__("fbgemm")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_quantized_model_follows_the_float_model(tied: bool, bias: bool):
    model = tiny(tied, bias)
    before = {n: p.clone() for n, p in model.named_parameters()}
    small = quantize(model)
    tokens = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(0))
    a, b = model(tokens).detach(), small(tokens)
    assert float((a - b).norm() / a.norm()) < 0.05
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "the model itself is left as it is"
    kinds = [type(m) for m in small.modules()]
    assert kinds.count(Int8Linear) == 4 * 2 + 1 and is_quantized(small) and not is_quantized(model)
    assert not any(p.requires_grad for p in small.parameters()) and not small.training
    head = small.head
    assert isinstance(head, Int8Linear) and torch.equal(head.weight, small.head_weight)
    assert torch.equal(head.weight, small.embed.weight) == tied


def test_cached_equals_uncached_and_batched_equals_alone():
    small = quantize(tiny())
    tokens = torch.randint(0, 97, (4, 12), generator=torch.Generator().manual_seed(2))
    whole = small(tokens)
    cache = KVCache(small.spec, 4, 12)
    steps = torch.cat([small(tokens[:, :5], cache=cache), *(small(tokens[:, t : t + 1], cache=cache) for t in range(5, 12))], 1)
    assert (whole - steps).abs().max() < 0.05 * whole.abs().max()  # a float rounding may move an activation to the next code
    assert torch.equal(steps.argmax(-1), whole.argmax(-1))


def test_greedy_agreement_after_training():
    """A model that has learned something keeps its greedy choices; 97 % of teacher-forced ones on held-out text."""
    torch.manual_seed(0)
    model = tiny(vocab=40)
    text = (torch.arange(4000) * 7 + (torch.arange(4000) // 11) ** 2) % 40
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        start = torch.arange(16) * 100 + step
        batch = torch.stack([text[s : s + 33] for s in start.tolist()])
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held = torch.stack([text[s : s + 32] for s in range(2000, 3900, 64)])
    small = quantize(model)
    with torch.no_grad():
        agreement = (model(held).argmax(-1) == small(held).argmax(-1)).float().mean()
    assert agreement > 0.97, agreement


def test_refusals():
    small = quantize(tiny())
    with pytest.raises(BadInput, match="already"):
        quantize(small)
    with pytest.raises(BadInput, match="unknown activations"):
        quantize(tiny(), activations="row")
    with pytest.raises(TypeError, match="float32"):
        small.head(rows(2, 48).bfloat16())
    with pytest.raises(BadInput, match="token"):
        quantize(tiny(), activations="tensor", kernel="int_mm")(torch.tensor([[1]]))


def test_a_copy_is_a_copy():
    small = quantize(tiny(bias=True))
    twin = copy.deepcopy(small)
    tokens = torch.arange(10)[None]
    assert torch.equal(small(tokens), twin(tokens))
    assert twin.layers[0].mixer.qkv.packed is not small.layers[0].mixer.qkv.packed


def test_bfloat16_and_training_state_are_left_behind():
    model = tiny().bfloat16()
    model.compute_dtype = torch.bfloat16
    small = quantize(model)
    assert small(torch.tensor([[1, 2]])).dtype == torch.float32 and model.embed.weight.dtype == torch.bfloat16


def test_measure_reports_plain_numbers():
    model = tiny(vocab=300, dim=96)
    report = measure(model, seconds=0.2, batches=(1, 3))
    assert report["bytes"]["float32"] == 4 * sum(p.numel() for p in model.parameters())
    assert report["size_ratio"] == report["bytes"]["int8"] / report["bytes"]["float32"] < 0.32
    assert set(report["tokens_per_second"]) == {"1", "3"} and set(report["tokens_per_second"]["1"]) == {"float32", "bfloat16", "int8"}
    assert all(v > 0 for speeds in report["tokens_per_second"].values() for v in speeds.values())
    assert 0.005 < report["relative_error"] < 0.02 and "exactly" in report["kernel"]
    assert stored_bytes(quantize(model)) == report["bytes"]["int8"]
