"""The step in C++ against its twins: the model's own flat pass, and PyTorch's INT8 products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.native_step import NativeStep
from pellucid.engine.paged_step import PagedBatch
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.errors import PellucidError
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.ops.native.library import Library, choose_native
from pellucid.quant import quantize

pytestmark = pytest.mark.skipif(choose_native().value is None, reason=choose_native().reason)


def spec(*mixers: Attn, hidden: int = 64, bias: bool = False, **fields) -> DecoderSpec:
    layers = tuple(Layer(a, MLP(hidden, bias=bias)) for a in mixers)
    return DecoderSpec(97, 64, layers, **{"tied": True, "context": 400, "family": "qwen3", **fields})


ROPE = Rope(16, 1000.0)
SPECS = {
    "grouped": spec(*(Attn(6, 2, 16, ROPE, qk_norm=True),) * 2),
    "biases": spec(*(Attn(2, 2, 16, ROPE, qkv_bias=True, out_bias=True),) * 2, bias=True, family="llama", hidden=96),
    "windows": spec(Attn(4, 2, 8, Rope(8), window=5), Attn(2, 1, 8, Rope(8), qk_norm=True), Attn(2, 2, 10, Rope(10), window=33)),
    "given-back": spec(*(Attn(4, 2, 16, ROPE, qk_norm=True, window=w) for w in (9, None, 9, 33))),  # several tables of blocks
    "partly-turned": spec(*(Attn(3, 1, 20, Rope(8)),) * 2, tied=False, hidden=23, eps=1e-3),
    "wide-heads": spec(Attn(2, 1, 72, Rope(72), qk_norm=True)),
}


def model_of(name: str) -> Decoder:
    """Random weights, norms and biases included: ones would hide a norm that is left out."""
    model, g = init_weights(Decoder(SPECS[name]), seed=3), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.copy_(torch.rand(p.shape, generator=g) + 0.5)
    return model.eval()


def answers(model: Decoder, flat: bool = False, **config) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy answers to prompts of 3 to 240 tokens, mixed in one batch, and all logits."""
    engine = Engine(model, config=EngineConfig(**{"budget": 90, "cache_tokens": 1200, **config}))
    assert isinstance(engine.runner.compiled, NativeStep), engine.runner.path
    if flat:
        engine.runner.compiled = None
    seen: list[Tensor] = []
    inner = engine.runner.step

    def step(plan):
        found = inner(plan)
        seen.extend(t.float().clone() for t in found.values())
        return found

    engine.runner.step = step
    requests = [Request([3 + i, 5, 7] * (1 + 20 * i * i // 2), SamplingParams(max_tokens=12, temperature=0.0)) for i in range(4)]
    for r in requests:
        engine.add(r)
    while engine.busy:
        engine.step()
    return [r.output for r in requests], seen


@pytest.fixture(params=["avx512", "avx2", "base"])
def variant(request):
    library: Library = choose_native().value
    before = library.variant
    try:
        library.use(request.param)
    except LookupError as error:
        pytest.xfail(str(error))
    yield request.param
    library.use(before)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_is_the_models_step(name: str, threads: int, variant: str):
    model, before = model_of(name), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (ours, logits), (twin, exact) = answers(model), answers(model, flat=True)
    finally:
        torch.set_num_threads(before)
    assert ours == twin
    largest = max(float(t.abs().max()) for t in exact)
    assert max(float((a - b).abs().max()) for a, b in zip(logits, exact, strict=True)) < 1e-5 * largest


def test_windows_that_give_blocks_back_have_tables_of_their_own():
    engine = Engine(model_of("given-back"), config=EngineConfig(cache_tokens=1200))
    assert len(engine.groups.value) > 1 and isinstance(engine.runner.compiled, NativeStep)


@pytest.mark.parametrize("name", ["grouped", "biases"])
def test_bfloat16_is_at_least_as_close_to_float32_as_the_twin(name: str):
    half, full = Decoder(SPECS[name]).bfloat16().eval(), model_of(name)
    half.load_state_dict(full.state_dict())
    full.load_state_dict(half.state_dict())
    want, ours, twin = answers(full, flat=True)[1][0], answers(half)[1][0], answers(half, flat=True)[1][0]
    assert (ours - want).abs().mean() <= 1.1 * (twin - want).abs().mean()
    assert (ours - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("name", ["grouped", "biases", "partly-turned"])
def test_int8_answers_are_those_of_pytorchs_products(name: str, variant: str):
    """The same integers through fbgemm (or int_mm) and the model's own pass."""
    model = model_of(name)
    ours, _ = answers(quantize(model))
    other = Engine(quantize(model, kernel="int_mm"), config=EngineConfig(cache_tokens=1200))
    assert not isinstance(other.runner.compiled, NativeStep) and "packed for int_mm" in other.runner.path.reason
    other.runner.compiled = None
    requests = [Request([3 + i, 5, 7] * (1 + 20 * i * i // 2), SamplingParams(max_tokens=12, temperature=0.0)) for i in range(4)]
    for r in requests:
        other.add(r)
    while other.busy:
        other.step()
    assert ours == [r.output for r in requests]


@pytest.mark.parametrize("name", ["grouped", "biases", "windows"])
def test_int4_answers_are_those_of_the_flat_pass(name: str, variant: str):
    model = quantize(model_of(name), bits=4)
    (ours, logits), (twin, exact) = answers(model), answers(model, flat=True)
    assert ours == twin
    assert max(float((a - b).abs().max()) for a, b in zip(logits, exact, strict=True)) < 0.02 * max(float(t.abs().max()) for t in exact)


@pytest.mark.parametrize("config", [{"budget": 7}, {"chunk": 1}, {"budget": 512, "prefix": "radix"}, {"cache_tokens": 512, "swap": True},
                                    {"cache_dtype": "bf16"}])
def test_chunks_prefixes_and_swapping_change_nothing(config: dict):
    model = model_of("windows")
    assert answers(model, **config)[0] == answers(model, flat=True, **config)[0]


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_a_request_gives_the_same_bits_in_any_batch(bits: int):
    """A decoding row is computed from its own numbers in an order of its own: alone, and beside fifteen others."""
    model = quantize(model_of("grouped"), bits=bits) if bits else model_of("grouped")

    def logits(count: int) -> list[Tensor]:
        engine = Engine(model, config=EngineConfig(cache_tokens=2000))
        requests = [Request([9, 4, 2, 7 + i], SamplingParams(max_tokens=8, temperature=0.0)) for i in range(count)]
        seen, inner = [], engine.runner.step

        def step(plan):
            found = inner(plan)
            seen.append(found[requests[0]].clone())
            return found

        engine.runner.step = step
        for r in requests:
            engine.add(r)
        while engine.busy:
            engine.step()
        return seen

    assert all(torch.equal(a, b) for a, b in zip(logits(1), logits(16), strict=True))


def test_weights_that_change_or_move_are_seen():
    model = model_of("grouped")
    engine = Engine(model, config=EngineConfig(cache_tokens=600, prefix="none"))

    def first() -> Tensor:
        r = Request([3, 5, 7], SamplingParams(max_tokens=1, temperature=0.0))
        inner, seen = engine.runner.step, []
        engine.runner.step = lambda plan: seen.append(inner(plan)) or seen[-1]
        engine.add(r)
        engine.step()
        engine.runner.step = inner
        return seen[0][r].clone()

    before = first()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
        changed = first()
        for p in model.parameters():
            p.data = p.data * 0.9
    moved = first()
    assert not torch.allclose(before, changed) and not torch.allclose(changed, moved)
    torch.testing.assert_close(moved, model(torch.tensor([[3, 5, 7]]))[:, -1], rtol=1e-5, atol=1e-6)


def test_indices_outside_are_refused_before_anything_is_written():
    engine = Engine(model_of("grouped"), config=EngineConfig(cache_tokens=64))
    step, pages = engine.runner.compiled, engine.runner.pages
    assert isinstance(step, NativeStep)

    def batch(slot: int = 1, position: int = 0, request: int = 0) -> PagedBatch:
        b = PagedBatch.__new__(PagedBatch)
        b.slots, b.positions, b.request = torch.tensor([[slot]]), torch.tensor([position]), torch.tensor([request])
        b.every_slots, b.every_into = [b.slots], [torch.tensor([slot])]
        return b

    step.hidden(torch.tensor([96]), batch())
    held = pages.entries[0][0].codes.clone()
    for tokens, wrong, word in (([97], {}, "vocabulary"), ([-1], {}, "vocabulary"), ([1], {"slot": len(held)}, "cache"), ([1], {"slot": -1}, "cache"),
                                ([1], {"position": 1}, "context"), ([1], {"position": -1}, "context"), ([1], {"request": 1}, "context")):
        with pytest.raises(PellucidError) as error:
            step.hidden(torch.tensor(tokens), batch(**wrong))
        assert word in str(error.value.why)
    assert torch.equal(pages.entries[0][0].codes, held)


@pytest.mark.parametrize(("change", "why"), [
    (lambda m: setattr(m.layers[0].norm1, "forward", lambda x: x), "of its own"),
    (lambda m: setattr(m, "compute_dtype", torch.bfloat16), "computed in"),
    (lambda m: m.layers[0].norm1.bfloat16(), "where the embedding is"),
    (lambda m: setattr(m.layers[0].mixer.o, "weight", torch.nn.Parameter(torch.randn(96, 64).t())), "contiguous"),
])
def test_what_it_cannot_run_takes_another_path_and_says_why(change, why):
    model = model_of("grouped")
    change(model)
    runner = Engine(model, config=EngineConfig(cache_tokens=64)).runner
    assert not isinstance(runner.compiled, NativeStep) and why in runner.path.reason, runner.path


def test_a_cache_of_codes_takes_another_path():
    runner = Engine(model_of("grouped"), config=EngineConfig(cache_tokens=64, cache_dtype="int8")).runner
    assert not isinstance(runner.compiled, NativeStep) and "do not read a cache of int8" in runner.path.reason
