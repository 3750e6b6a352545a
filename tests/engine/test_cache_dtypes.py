"""Every cache dtype against transformers with its own cache: logits within a stated tolerance, greedy tokens, how well they agree.

TOLERANCE: largest difference of log-probabilities from transformers in float32, in shares of their standard deviation over the
vocabulary, with everything (prompt and output) read from a cache of that format. These models are tiny and random: their
heads of 8 to 16 entries round worse than heads of 128 do.
"""

import pytest
import torch
from tiny_caches import CASES, DTYPES, checkpoint, forced, greedy

from pellucid import events
from pellucid.engine.config import EngineConfig, choose_room
from pellucid.engine.core import Engine
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.errors import BadInput
from pellucid.nn.count import cache_bytes
from pellucid.ops.cache_codes import cache_codes
from pellucid.plan.inspect import kinds_of

TOLERANCE = {"f32": 1e-4, "bf16": 0.05, "fp8": 0.5, "int8": 0.12}
AGREE = {"f32": 1.0, "bf16": 0.95, "fp8": 0.85, "int8": 0.95}
"""Share of places where, given the same tokens before, the most probable token is transformers'."""


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    return checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def engine_of(model, name: str, **options) -> Engine:
    engine = Engine(model, config=EngineConfig(**{"cache_tokens": 400, "block": 4, "cache_dtype": name, **options}))
    assert engine.runner.path.reason and (engine.runner.path.value == "compiled") == (engine.runner.compiled is not None)
    return engine


SLOW = [pytest.param(n, True, marks=pytest.mark.slow) for n in ("f32", "bf16")]  # compiled anew for each format; two stand for all


@pytest.mark.parametrize(("name", "compiled"), [*((n, False) for n in DTYPES), ("fp8", True), ("int8", True), *SLOW])
def test_logits_are_those_of_transformers(pair, name, compiled):
    """Of the tokens of prompts, in chunks of 7 and beside each other."""
    model, theirs = pair
    engine = engine_of(model, name, chunk=7)
    if engine.runner.compiled is None and compiled:
        assert "kernel" in engine.runner.path.reason or "its own" in engine.runner.path.reason
        return
    if not compiled:
        engine.runner.compiled = None
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(5))
    got, most = forced(engine, ids)
    with torch.inference_mode():
        want = theirs(ids).logits.float()[:, :-1]
    wrong = (got - want.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]).abs() / want.std(-1)
    same = (most == want.argmax(-1)).float().mean().item()
    assert wrong.max() < TOLERANCE[name] and same >= AGREE[name]
    if name in ("fp8", "int8"):
        assert wrong.max() > 1e-4, "nothing was rounded"


@pytest.mark.parametrize("name", DTYPES)
def test_tokens_do_not_depend_on_schedule_or_hits(pair, name):
    """Within a dtype: chunks of 1, 7 and 512, prefix cache on (chain, radix) and off, preemption and swapping; f32 gives transformers'."""
    model, theirs = pair
    prompts = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (21, 9)]
    prompts.append([*prompts[0][:16], 7, 8])
    windows = any(getattr(layer.mixer, "window", None) for layer in model.spec.layers)
    want, tight = None, {"cache_tokens": 24, "budget": 8} if windows else {"cache_tokens": 48}
    for options in ({"prefix": "none", "chunk": 512}, {"chunk": 1}, {"chunk": 7, "prefix": "radix"}, {"chunk": 512},
                    tight, {**tight, "swap": True}):
        engine = engine_of(model, name, **options)
        if engine.runner.compiled is not None and name != "int8":
            engine.runner.compiled = None  # each format is compiled anew: one stands for all
        got = greedy(engine, prompts, 12)
        want = want or got
        assert got == want, options
        if "cache_tokens" in options:
            assert engine.totals["preemptions"] > 0
        elif options.get("prefix") != "none" and "chunk" in options:
            assert engine.totals["hit_tokens"] >= 12
    if name == "f32":
        assert want == [theirs.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False)[0, len(p) :].tolist() for p in prompts]


@pytest.mark.parametrize(("name", "more"), [("bf16", 2), ("fp8", 2.6), ("int8", 2.6)])
def test_the_same_memory_holds_more_tokens(pair, name, more, monkeypatch):
    """By default half of the free memory: 4 bytes a number become 2, or 1 and a scale of 2 for a head (of 8 entries in these models)."""
    model, _ = pair
    monkeypatch.setattr("pellucid.engine.config.available_memory_bytes", lambda: 2**20)
    room = {n: choose_room(model, EngineConfig(cache_dtype=n, running=2**10)).value for n in ("f32", name)}
    assert room[name] >= more * room["f32"]
    engine = engine_of(model, name)
    memory = sum(t.nbytes for layer in engine.runner.pages.entries for kept in layer for t in kept.tensors)
    assert memory == 400 * sum(cache_bytes(layer.mixer, cache_codes(name)) for layer in model.spec.layers)
    assert memory == 100 * engine.runner.pages.bytes_per_block
    assert sum(kind.cache_bytes for kind in kinds_of(model.spec, cache_codes(name))) * 400 == memory


def test_heads_of_128_take_a_quarter():
    from pellucid.nn import Attn, Rope

    wide = Attn(8, 2, 128, Rope(128))
    ratios = {n: cache_bytes(wide, cache_codes("f32")) / cache_bytes(wide, cache_codes(n)) for n in DTYPES}
    assert ratios["bf16"] == 2 and 3.9 < ratios["fp8"] == ratios["int8"] < 4


def test_states_of_linear_attention_stay_in_f32(tmp_path):
    """Beside INT8 entries of its full layers."""
    model, _ = checkpoint("qwen3.5", tmp_path)
    engine = engine_of(model, "int8")
    prompt = list(range(5, 25))
    greedy(engine, [prompt], 3)
    memories = [layer["memory"] for layer in engine.runner.pages.states if layer]
    assert memories and all(m.dtype == torch.float32 for m in memories)
    assert any(kept.codes.dtype == torch.int8 for layer in engine.runner.pages.entries for kept in layer)


def test_the_path_and_its_reason_are_told(pair):
    model, _ = pair
    engine = engine_of(model, "fp8")
    shown = engine.snapshot()
    assert shown["cache_dtype"] == "fp8" and (shown["path"], shown["path_reason"]) == (engine.runner.path.value, engine.runner.path.reason)
    half = Engine(model, config=EngineConfig(cache_tokens=64, cache_dtype="float16"))
    assert half.runner.path.value == "flat" and half.runner.path.reason


def test_unknown_formats_are_refused(pair):
    with pytest.raises(BadInput, match="int3"):
        Engine(pair[0], config=EngineConfig(cache_tokens=64, cache_dtype="int3"))


def test_swapped_requests_come_back_as_they_were(pair):
    """Codes and scales, bit for bit."""
    model, _ = pair
    engine = engine_of(model, "int8", swap=True)
    r = Request(list(range(3, 20)), SamplingParams(max_tokens=8))
    engine.add(r)
    engine.step()
    pages = engine.runner.pages
    saved = pages.copy_out(r.tables, r.computed, None)
    other = [b for b in range(engine.cache.blocks) if b not in r.blocks][: len(r.blocks)]
    pages.copy_in([other], 0, saved)
    again = pages.copy_out([other], r.computed, None)
    for a, b in zip(saved.entries, again.entries, strict=True):
        assert a and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert saved.entries[0][0].dtype == torch.int8


def test_serve_tells_room_format_and_path(pair):
    from pellucid.cli.serve import Serve, tell_cache

    seen = []
    with events.subscribed(seen.append):
        tell_cache("mine", engine_of(pair[0], "int8"))
    (note,) = [e for e in seen if e.kind == "note"]
    assert all(word in note.text for word in ("mine", "400", "int8", "as asked"))
    assert Serve(models=("x",), cache_dtype="int8").proposing()["cache_dtype"] == "int8"
