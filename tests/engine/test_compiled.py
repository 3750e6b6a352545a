"""The compiled step and the compiled draw against their readable twins."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import pellucid.engine.sampler as sampler_module
from pellucid.engine import Sample, SamplingParams, run_all
from pellucid.engine.decode import CompiledStep, choose_step, plain_step
from pellucid.engine.sampler import Sampler
from pellucid.errors import PellucidError
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, KVCache, Layer, Linear, Rope, init_weights
from pellucid.ops import choose_jit
from pellucid.quant import quantize
from pellucid.runtime import Choice

pytestmark = pytest.mark.skipif(not choose_jit().value, reason=choose_jit().reason)


def spec(*mixers: Attn, hidden: int = 24, bias: bool = False, **fields) -> DecoderSpec:
    layers = tuple(Layer(a, MLP(hidden, bias=bias)) for a in mixers)
    return DecoderSpec(61, 20, layers, **{"tied": True, "context": 200, "family": "qwen3", **fields})


ROPE = Rope(8, 1000.0)
SPECS = {
    "grouped": spec(*(Attn(6, 2, 8, ROPE, qk_norm=True),) * 2),
    "one-kv-head": spec(*(Attn(4, 1, 6, Rope(6, 500.0)),) * 2, tied=False, eps=1e-3),
    "biases": spec(*(Attn(2, 2, 8, ROPE, qkv_bias=True, out_bias=True),) * 2, bias=True, family="llama"),
    "windows": spec(Attn(4, 2, 8, ROPE, window=5), Attn(2, 1, 8, ROPE, qk_norm=True), Attn(2, 2, 10, Rope(10), window=2)),
    "partly-turned": spec(*(Attn(2, 2, 12, Rope(8)),) * 2),
    "odd-widths": spec(*(Attn(3, 3, 10, Rope(10), qk_norm=True),) * 2, hidden=23),
}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """Random weights, norms included: ones would hide a norm that is left out."""
    model = init_weights(Decoder(SPECS[name]), seed=3)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.copy_(torch.rand(p.shape, generator=g) + 0.5)
    return model.to(dtype).eval()


def last_logits(model: Decoder, step, rows: int, first: torch.Tensor | None, steps: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 61, (rows, 4 + steps), generator=g)
    cache = KVCache(model.spec, rows, 4 + steps, dtype=model.embed.weight.dtype, first=first)
    with torch.inference_mode():
        model.hidden(tokens[:, :4], cache=cache)
        return torch.stack([step(tokens[:, 4 + i].contiguous(), cache).clone() for i in range(steps)])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_compiled_step_is_the_models_step(name, padded):
    model = model_of(name)
    step = choose_step(model).value
    assert isinstance(step, CompiledStep)
    first = torch.tensor([0, 3, 1]) if padded else None
    got, want = (last_logits(model, s, 3, first, 25) for s in (step, plain_step(model)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["grouped", "biases"])
def test_bfloat16_is_at_least_as_close_to_float32_as_the_twin(name):
    half, full = model_of(name, torch.bfloat16), model_of(name, torch.bfloat16).float()
    want = last_logits(full, plain_step(full), 3, None, 25)
    ours, twin = (last_logits(half, s, 3, None, 25).float() for s in (choose_step(half).value, plain_step(half)))
    assert (ours - want).abs().mean() <= 1.1 * (twin - want).abs().mean()
    assert (ours - want).abs().max() < 0.05 * want.abs().max()


def test_int8_models_run_compiled_around_their_own_products():
    model = quantize(model_of("grouped"))
    step = choose_step(model).value
    assert isinstance(step, CompiledStep)
    got, want = (last_logits(model, s, 2, None, 12) for s in (step, plain_step(model)))
    assert (got - want).abs().max() < 0.02 * want.abs().max()  # a value next to a rounding step may fall to its other side


def test_weights_that_change_in_place_are_seen():
    model = model_of("grouped")
    step = choose_step(model).value
    before = last_logits(model, step, 2, None, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    after = last_logits(model, step, 2, None, 3)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, last_logits(model, plain_step(model), 2, None, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_whole_batches_give_the_same_tokens(threads, monkeypatch):
    """Shrinking, growing cache, shared prompts, unequal lengths: as through the twin."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = model_of("grouped")

        def answers() -> list[list[int]]:
            made = [Sample([7, 8, 9, 10][: 1 + i % 4], SamplingParams(max_tokens=5 + 7 * (i % 5), temperature=i % 2), i) for i in range(20)]
            run_all(model, made, [3])
            return [s.tokens for s in made]

        compiled = answers()
        monkeypatch.setattr("pellucid.engine.batch.choose_step", lambda m: Choice(plain_step(m), "twin"))
        assert compiled == answers()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("why, change", [
    ("compute", lambda m: setattr(m, "compute_dtype", torch.bfloat16)),
    ("float64", lambda m: m.double()),
])
def test_what_the_kernels_cannot_do_runs_plain_and_says_why(why, change):
    model = model_of("grouped")
    change(model)
    choice = choose_step(model)
    assert not isinstance(choice.value, CompiledStep) and why in choice.reason


def test_other_activations_and_layouts_run_plain():
    s = SPECS["grouped"]
    gelu = replace(s, layers=tuple(replace(layer, ffn=MLP(24, "gelu")) for layer in s.layers))
    pairs = replace(s, layers=(Layer(Attn(2, 2, 8, Rope(8, interleaved=True)), MLP(24)),))
    for other in (gelu, pairs):
        assert not isinstance(choose_step(init_weights(Decoder(other))).value, CompiledStep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 5, 64, 65, 1000, 2048])
def test_compiled_draws_are_the_twins(dtype, V, monkeypatch):
    logits = (3 * torch.randn(400, V, generator=torch.Generator().manual_seed(V))).to(dtype)
    params = [SamplingParams(temperature=t, logprobs=True) for t in (0.0, 0.3, 1.0, 2.5)] * 100
    sampler = Sampler(params, [2**62 - i * 10**15 for i in range(400)])
    tokens, logprobs = sampler(logits, 17)
    monkeypatch.setattr(sampler_module, "choose_jit", lambda: Choice(False, "twin"))
    want, want_logprobs = sampler(logits, 17)
    same = tokens == want
    assert same.float().mean() >= 0.99  # a draw on the very border of two tokens may fall to either
    torch.testing.assert_close(logprobs[same], want_logprobs[same], rtol=1e-4, atol=2e-5)
    greedy = torch.arange(400) % 4 == 0
    assert torch.equal(tokens[greedy], want[greedy])


def test_hidden_logits_are_never_drawn_and_a_tiny_temperature_is_greedy():
    logits = torch.full((2, 70), -torch.inf)
    logits[0, 66] = 0.0
    logits[1] = torch.arange(70.0)
    sampler = Sampler([SamplingParams(temperature=t) for t in (1.0, 1e-30)], [1, 3])
    for step in range(200):
        assert sampler(logits, step)[0].tolist() == [66, 69]


PATHS = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "twin"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@PATHS
@DTYPES
@pytest.mark.parametrize("asked", [False, True], ids=["", "logprobs"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_told(temperature, asked, dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(sampler_module, "choose_jit", lambda: Choice(False, "twin"))
    sampler = Sampler([SamplingParams(temperature=temperature, logprobs=asked)] * 3, [1, 2, 3])
    good = torch.randn(3, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    good[0, 5], good[1, :-1] = -torch.inf, -torch.inf  # hidden tokens are no fault
    assert sampler(good, 0)[0][1] == 69
    for where, value in ((slice(None), torch.nan), (66, torch.nan), (2, -torch.nan), (slice(None), -torch.inf), (3, torch.inf)):
        bad = good.clone()
        bad[1, where] = value
        with pytest.raises(PellucidError, match="not numbers"):
            sampler(bad, 0)


@PATHS
@DTYPES
@pytest.mark.parametrize("asked", [False, True], ids=["", "logprobs"])
@pytest.mark.parametrize("V", [1, 2, 63, 64, 65, 200, 2049])
def test_greedy_takes_the_first_of_the_largest(V, asked, dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(sampler_module, "choose_jit", lambda: Choice(False, "twin"))
    logits = torch.randint(-9, 0, (50, V), generator=torch.Generator().manual_seed(V)).to(dtype)  # many ties
    want = [row.index(max(row)) for row in logits.tolist()]
    tokens, logprobs = Sampler([SamplingParams(logprobs=asked)] * 50, range(50))(logits, 0)
    assert tokens.tolist() == want and (logprobs is not None) == asked
    if logprobs is not None:
        exact = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs.double(), exact, rtol=1e-4, atol=2e-5)


def test_a_model_with_hooks_or_layers_of_its_own_runs_plain():
    hooked, replaced = model_of("grouped"), model_of("grouped")
    hooked.layers[0].mixer.register_forward_hook(lambda module, args, out: out * 0)

    class Adapted(Linear):
        def forward(self, x):
            return super().forward(x) + 1

    replaced.layers[1].ffn.down.__class__ = Adapted
    for model, word in ((hooked, "hooks"), (replaced, "Adapted")):
        choice = choose_step(model)
        assert not isinstance(choice.value, CompiledStep) and word in choice.reason


RUN = """
import torch
from pellucid.engine.decode import choose_step
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, KVCache, Layer, Rope, init_weights
from pellucid.ops import choose_jit
model = init_weights(Decoder(DecoderSpec(32, 16, (Layer(Attn(2, 2, 8, Rope(8)), MLP(16)),)))).eval()
choice = choose_step(model)
with torch.inference_mode():
    logits = choice.value(torch.tensor([1]), KVCache(model.spec, 1, 4))
print(type(choice.value).__name__, choose_jit().reason)
if choose_jit().value:
    from pellucid.ops.jit.decode import attend_kernel
    stats = attend_kernel(8, 1).stats
    print("hits", sum(stats.cache_hits.values()), "misses", sum(stats.cache_misses.values()))
"""


def in_a_process(**variables: str) -> str:
    done = subprocess.run([sys.executable, "-c", RUN], env={**os.environ, **variables}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_second_process_compiles_nothing(tmp_path):
    first, second = (in_a_process(NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert "hits 0 misses 1" in first and "hits 1 misses 0" in second


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{"PELLUCID_JIT": "0"}, {"NUMBA_DISABLE_JIT": "1"}, {"NUMBA_THREADING_LAYER": "nonsense"}], ids=lambda v: next(iter(v)))
def test_where_numba_cannot_run_the_twin_does_and_says_why(variables):
    said = in_a_process(**variables)
    assert "CompiledStep" not in said and ("turned off" in said or "cannot be used" in said), said


def test_a_point_past_the_end_falls_to_the_last_token_with_weight():
    from pellucid.ops.jit.draw import chosen

    weights = np.zeros(130, np.float32)
    weights[[3, 70]] = 0.5
    sums = np.array([0.5, 0.5, 0.0])  # of 64 tokens each
    assert [chosen(weights, sums, point) for point in (0.0, 0.49, 0.5, 0.99, 1.0, 1.1)] == [3, 3, 70, 70, 70, 70]


def test_draws_follow_the_distribution():
    p = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    sampler = Sampler([SamplingParams(temperature=1.0)] * 20000, range(20000))
    tokens, _ = sampler(p.log().expand(20000, 5).contiguous(), 0)
    torch.testing.assert_close(tokens.bincount(minlength=5) / 20000, p, atol=0.015, rtol=0)
