"""The C++ step of the static batch against the model's own, and whole batches of both."""

from __future__ import annotations

import pytest
import torch
from test_native_step import SPECS, model_of

from pellucid.engine import Sample, SamplingParams, batch, run_all
from pellucid.engine.decode import CompiledStep, plain_step
from pellucid.engine.native_batch import BatchStep, choose_step
from pellucid.nn import KVCache
from pellucid.ops.native.library import choose_native
from pellucid.quant import quantize
from pellucid.runtime import Choice

pytestmark = pytest.mark.skipif(choose_native().value is None, reason=choose_native().reason)


def logits(model, step, first=None, rows=5, steps=40, keep=None):
    """Of `steps` tokens behind prompts of 4; after a third of them only the rows `keep` go on, after two thirds none is left out."""
    tokens = torch.randint(0, 97, (rows, 4 + steps), generator=torch.Generator().manual_seed(5))
    cache = KVCache(model.spec, rows, 4 + steps, dtype=model.embed.weight.dtype, first=first)
    found = []
    with torch.inference_mode():
        model.hidden(tokens[:, :4], cache=cache)
        for i in range(steps):
            if keep is not None and i == steps // 3:
                cache.keep(keep)
                tokens = tokens[keep]
            found.append(step(tokens[:, 4 + i].contiguous(), cache).float().clone())
    assert cache.length == 4 + steps
    return found


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("first", [None, [0, 3, 1, 2, 0]], ids=["even", "padded"])
@pytest.mark.parametrize("keep", [None, [4, 1, 1], [3, 2, 1, 0, 4]], ids=["all", "some twice", "another order"])
def test_it_is_the_models_step(name, first, keep):
    model = model_of(name)
    step = choose_step(model).value
    assert isinstance(step, BatchStep)
    first, keep = (None if x is None else torch.tensor(x) for x in (first, keep))
    for got, want in zip(*(logits(model, s, first, keep=keep) for s in (step, plain_step(model))), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_bfloat16_is_at_least_as_close_to_float32_as_the_model():
    half = model_of("grouped").bfloat16()
    full = model_of("grouped").bfloat16().float()
    want = torch.stack(logits(full, plain_step(full)))
    ours, twin = (torch.stack(logits(half, s)) for s in (choose_step(half).value, plain_step(half)))
    assert (ours - want).abs().mean() <= 1.1 * (twin - want).abs().mean()
    assert (ours - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_models(bits):
    model = quantize(model_of("grouped"), bits=bits)
    step = choose_step(model).value
    for got, want in zip(logits(model, step), logits(model, plain_step(model)), strict=True):
        assert (got - want).abs().max() < 0.03 * want.abs().max()  # a value next to a rounding step may fall to its other side


def test_one_step_serves_several_caches_and_weights_that_change():
    model = model_of("biases")
    step = choose_step(model).value
    before = logits(model, step)
    assert all(torch.equal(a, b) for a, b in zip(before, logits(model, step)))
    logits(model, step, rows=2, steps=9)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.2)
    after = logits(model, step)
    assert not torch.allclose(before[0], after[0])
    for got, want in zip(after, logits(model, plain_step(model)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    model.load_state_dict({k: v / 1.2 for k, v in model.state_dict().items()}, assign=True)  # they lie elsewhere now
    for got, want in zip(logits(model, step), before, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_whole_batches_give_the_same_tokens_and_logprobs(threads, monkeypatch):
    """Shrinking, growing cache, shared prompts, unequal lengths: as through the twin."""
    before, model = torch.get_num_threads(), model_of("windows")
    assert isinstance(batch.choose_step(model).value, BatchStep)
    torch.set_num_threads(threads)

    def answers() -> list[Sample]:
        made = [Sample([7, 8, 9, 10][: 1 + i % 4], SamplingParams(max_tokens=5 + 7 * (i % 5), temperature=i % 2, logprobs=True), i) for i in range(20)]
        run_all(model, made, [3])
        return made

    try:
        native = answers()
        monkeypatch.setattr("pellucid.engine.batch.choose_step", lambda m: Choice(plain_step(m), "twin"))
        for a, b in zip(native, answers(), strict=True):
            assert a.tokens == b.tokens
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    finally:
        torch.set_num_threads(before)


def test_where_it_cannot_run_another_does_and_says_why(monkeypatch):
    model = model_of("grouped")
    model.compute_dtype = torch.bfloat16
    choice = choose_step(model)
    assert not isinstance(choice.value, (BatchStep, CompiledStep)) and "bfloat16" in choice.reason
    monkeypatch.setattr("pellucid.engine.native_step.choose_native", lambda: Choice(None, "no compiler"))
    assert isinstance(choose_step(model_of("grouped")).value, CompiledStep)


def test_other_beginnings_in_a_cache_that_lies_where_it_lay():
    model = model_of("grouped")
    step, tokens, found = choose_step(model).value, torch.tensor([5, 6, 7]), []
    for run in (step, plain_step(model)):
        cache = KVCache(model.spec, 3, 12, first=torch.tensor([0, 1, 2]))
        with torch.inference_mode():
            model.hidden(torch.arange(12).view(3, 4), cache=cache)
            for first in ([0, 1, 2], [3, 0, 1]):
                cache.first = torch.tensor(first)
                found.append(run(tokens, cache).clone())
    for got, want in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
