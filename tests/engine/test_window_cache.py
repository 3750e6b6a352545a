"""Layers with a window give their blocks back: memory is bounded, hits stay right, tokens are transformers'."""

from dataclasses import replace

import pytest
import torch
from tiny_caches import MIXED, checkpoint, greedy, run

from pellucid.engine.config import EngineConfig, choose_room
from pellucid.engine.core import Engine
from pellucid.engine.hash_chain import HashChain
from pellucid.engine.layer_groups import Group, layer_groups, windows_of
from pellucid.engine.params import SamplingParams
from pellucid.engine.prefix_cache import NoReuse, held
from pellucid.engine.request import GONE, Request
from pellucid.engine.scheduler import Scheduler
from pellucid.errors import BadInput
from pellucid.models.hub import spec_of
from pellucid.models.known import find_config
from pellucid.nn import MLP, Attn, DecoderSpec, Layer, Rope

NEW, WINDOW = 40, 9
LENGTHS = (70, 21, 9, 5)


@pytest.fixture(scope="module", params=["window", *MIXED])
def opened(request, tmp_path_factory):
    model, theirs = checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    prompts = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]
    prompts.append([*prompts[0][:61], 7, 8])
    want = [theirs.generate(torch.tensor([p]), max_new_tokens=NEW, do_sample=False)[0, len(p) :].tolist() for p in prompts]
    return request.param, model, prompts, want


CONFIGS = {
    "chunks of 1": {"chunk": 1}, "chunks of 7": {"chunk": 7}, "whole prompts": {"chunk": 512}, "none": {"prefix": "none", "chunk": 16},
    "pressure": {"cache_tokens": 0}, "swap": {"cache_tokens": 0, "swap": True}, "pressure, none": {"cache_tokens": 0, "prefix": "none"},
    "speculation": {"drafts": 3, "cache_tokens": 300},
    "block of 1": {"block": 1, "chunk": 7}, "radix": {"prefix": "radix"}, "kept": {"reuse_windows": False},
    "radix, pressure": {"cache_tokens": 0, "prefix": "radix-cost"}, "radix, swap, drafts": {"cache_tokens": 0, "prefix": "radix", "swap": True, "drafts": 2},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_several_windows_long(opened, name):
    which, model, prompts, want = opened
    config = EngineConfig(**{"cache_tokens": 1000, "block": 4, "budget": 512, **CONFIGS[name]})
    if not config.cache_tokens:  # hardly more than the longest needs; trees let go of some tokens at a time
        config = replace(config, cache_tokens={"window": 24, "gemma3": 64, "gpt-oss": 84, "qwen2-window": 84}[which] + 8 * config.prefix.startswith("radix"),
                         budget=8 if which == "window" else 16)
    engine = Engine(model, config=config)
    if name not in ("whole prompts", "chunks of 7", "swap"):  # kernels are compiled for a few
        engine.runner.compiled = None
    assert greedy(engine, prompts, NEW) == want, which
    shared = name == "kept"
    assert (len(engine.groups.value) > 1 or engine.groups.value[0].window == WINDOW) != shared
    assert ("keep all tokens" in engine.groups.reason) == shared == (engine.cache.windows == (None,))
    if config.cache_tokens < 100:
        assert engine.totals["preemptions"] > 0
    elif name in ("chunks of 7", "whole prompts", "radix", "kept", "chunks of 1"):
        assert engine.totals["hit_tokens"] >= 60


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_with_codes_the_tokens_are_those_of_a_cache_that_keeps_all(opened, name):
    _, model, prompts, _ = opened
    kept, back = (Engine(model, config=EngineConfig(cache_tokens=1000, block=4, chunk=7, cache_dtype=name, reuse_windows=r)) for r in (False, True))
    kept.runner.compiled = back.runner.compiled = None
    assert greedy(kept, prompts, NEW) == greedy(back, prompts, NEW)


def test_blocks_that_are_held_do_not_grow_with_the_context(opened):
    _, model, _, _ = opened
    engine = Engine(model, config=EngineConfig(cache_tokens=400, block=4, chunk=8))
    r = Request(list(range(3, 13)), SamplingParams(max_tokens=180))
    engine.add(r)
    most = [0] * len(r.tables or engine.cache.windows)
    while engine.busy:
        engine.step()
        for i, table in enumerate(r.tables):
            most[i] = max(most[i], len(table) - table.count(GONE))
    for window, held_blocks in zip(engine.cache.windows, most, strict=True):
        assert held_blocks >= 47 if window is None else held_blocks <= -(-WINDOW // 4) + 1


@pytest.mark.parametrize("prefix", ["chain", "radix"])
def test_more_talks_are_found_again_in_the_same_memory(opened, prefix):
    """Talks of 60 tokens, of which one after the other is had; then they go on, the latest first. Figures of these models, in the memory
    of 300 tokens in every layer: the tree keeps the windows' blocks where hits end, and loses those in between."""
    which, model, _, _ = opened
    hits = []
    for reuse in (False, True):
        engine = Engine(model, config=EngineConfig(cache_tokens=300, block=4, budget=64, prefix=prefix, reuse_windows=reuse))
        engine.runner.compiled = None
        talks = [Request([5 + i, *range(6, 57)], SamplingParams(max_tokens=9)) for i in range(16)]
        for r in talks:
            run(engine, [r])
        again = [Request([*r.tokens, 4], SamplingParams(max_tokens=1)) for r in talks]
        for r in reversed(again):
            run(engine, [r])
        hits.append(sum(r.hit >= 52 for r in again))
    kept, back = hits
    assert 3 <= kept <= 5
    if prefix == "radix":
        assert back >= {"window": 15, "gemma3": 9, "gpt-oss": 6, "qwen2-window": 6}[which], hits
    else:
        assert back >= kept - 1, hits


def fits(model, **options) -> int:
    """Requests of 100 tokens that run at a time in the memory of 240 tokens in every layer."""
    engine = Engine(model, config=EngineConfig(cache_tokens=240, block=4, budget=24, chunk=12, running=100, **options))
    engine.runner.compiled = None
    for i in range(20):
        engine.add(Request([5 + i, *range(6, 65)], SamplingParams(max_tokens=40)))
    most = 0
    for _ in range(120):  # by then the cache is full
        engine.step()
        most = max(most, sum(r.computed for r in engine.scheduler.running))
    return most


def test_more_tokens_fit_in_the_same_memory(opened):
    """Figures of these models: window 9, blocks of 4. Tokens of running requests when the cache is full, which holds 240 in every layer."""
    which, model, _, _ = opened
    before, after = fits(model, reuse_windows=False), fits(model)
    assert 200 < before <= 240
    assert after >= {"window": 1000, "gemma3": 800, "gpt-oss": 400, "qwen2-window": 500}[which], (before, after)


def test_what_only_fits_with_a_window_is_taken(opened):
    _, model, _, _ = opened
    long = Request(list(range(3, 50)), SamplingParams(max_tokens=100))
    small = {"cache_tokens": 100, "block": 4, "budget": 16}
    with pytest.raises(BadInput, match="blocks"):
        Engine(model, config=EngineConfig(**small, reuse_windows=False)).add(long)
    engine = Engine(model, config=EngineConfig(**small))
    run(engine, [long])
    assert len(long.output) == 100
    with pytest.raises(BadInput, match="blocks"):
        tiny = Engine(model, config=EngineConfig(cache_tokens=8, block=4, budget=16))
        tiny.add(Request([1, 2, 3], SamplingParams(max_tokens=100)))


def match(cache: HashChain, tokens: list[int]) -> tuple[int, list[int]]:
    found = cache.match(Request(tokens, SamplingParams()))
    return len(found), [b for row in found for b in row if b != GONE]


def served(cache: HashChain, tokens: list[int], new: int = 1) -> Request:
    s, r = Scheduler(cache, chunk=2), Request(tokens, SamplingParams(max_tokens=new))
    s.add(r)
    while s.running or s.waiting:
        plan = s.plan()
        done = [p.request for p in plan.parts if p.samples]
        r.tokens += [1] * len(done)
        s.done(plan)
        if r.generated == new:
            s.finish(r, "length")
    return r


def test_a_hit_shrinks_to_where_the_window_is_there():
    """Blocks of 1 token, window 3: a prefix of n tokens needs the entries of tokens n - 2 and n - 1."""
    cache = HashChain(20, 1, windows=(3,))
    served(cache, list(range(10, 20)))
    assert match(cache, [*range(10, 20), 5])[0] == 10 and len(match(cache, [*range(10, 20), 5])[1]) == 2
    assert match(cache, [*range(10, 15), 5])[0] == 5
    cache.claim(range(20))
    cache.release([b for b in range(20) if b not in match(cache, [*range(10, 20)])[1]])
    forgotten = cache.allocate(18)  # all but the last two of the prompt
    assert match(cache, [*range(10, 20), 5])[0] == 10 and match(cache, [*range(10, 19), 5])[0] == 0
    cache.release(forgotten)


def test_what_was_generated_can_be_found_behind_the_window():
    """An answer that is taken up again from its middle: its blocks were told of before they were given back."""
    cache = HashChain(40, 1, windows=(3,))
    r = served(cache, list(range(10, 20)), new=9)
    assert match(cache, [*r.tokens[:14], 5])[0] == 14 and match(cache, [*r.tokens[:18], 5])[0] == 18


def test_all_groups_must_have_theirs():
    """A full group and a window of 3: what the full one still has is of use only where the window's is there too."""
    cache = HashChain(40, 1, windows=(None, 3))
    served(cache, list(range(10, 20)))
    found = cache.match(Request([*range(10, 20), 5], SamplingParams()))
    assert len(found) == 10 and [row[1] for row in found[:8]] == [GONE] * 8 and all(row[0] != GONE for row in found)
    window = found[9][1]
    group, key = cache.key_of[window]
    assert group == 1
    cache.key_of[window] = None
    del cache.block_of[1][key]
    cache.check()
    assert len(cache.match(Request([*range(10, 20), 5], SamplingParams()))) == 9
    full = found[4][0]
    group, key = cache.key_of[full]
    cache.key_of[full] = None
    del cache.block_of[group][key]
    assert group == 0 and len(cache.match(Request([*range(10, 20), 5], SamplingParams()))) == 4


def test_groups_of_known_models():
    def groups(name: str) -> list[tuple[int | None, int]]:
        return [(g.window, len(g.layers)) for g in layer_groups(spec_of(find_config(name))).value]

    assert groups("gemma-3-1b") == [(512, 4)] * 5 + [(512, 2), (None, 4)]
    assert groups("gpt-oss-20b") == [(128, 12), (None, 12)] and groups("mistral-7b") == [(4096, 32)]
    gemma = layer_groups(spec_of(find_config("gemma-3-1b"))).value
    most = Scheduler(NoReuse(1, 16, windows_of(gemma)), budget=512)._most_blocks(32768)
    assert 5 * most < 32768 // 16 * len(gemma), "a full context in less than a fifth of the memory"
    for name in ("gemma-3-27b", "gpt-oss-120b", "qwen3-8b", "deepseek-v3"):
        spec = spec_of(find_config(name))
        found = layer_groups(spec)
        assert sorted(i for g in found.value for i in g.layers) == list(range(len(spec.layers))) and found.reason
    assert layer_groups(spec_of(find_config("qwen3-8b"))).value == [Group(None, tuple(range(36)))]


def test_layers_of_different_shapes_keep_all_tokens_and_say_so():
    a = Attn(2, 2, 8, Rope(8))
    spec = DecoderSpec(40, 16, (Layer(a, MLP(16)), Layer(Attn(2, 1, 8, Rope(8), window=4), MLP(16))), context=64)
    found = layer_groups(spec)
    assert [g.window for g in found.value] == [None] and "shape" in found.reason
    long = DecoderSpec(40, 16, (Layer(Attn(2, 2, 8, Rope(8), window=64), MLP(16)),), context=64)
    assert [g.window for g in layer_groups(long).value] == [None]


def test_room_is_counted_by_what_contexts_need(opened, monkeypatch):
    _, model, _, _ = opened
    monkeypatch.setattr("pellucid.engine.config.available_memory_bytes", lambda: 2**40)
    config = {"running": 3, "budget": 16}
    kept, back = (choose_room(model, EngineConfig(**config, reuse_windows=r)).value for r in (False, True))
    assert kept == 3 * model.spec.context and back < kept
    engine = Engine(model, config=EngineConfig(**config, block=4))
    assert engine.cache.blocks >= 3 * engine.scheduler._most_blocks(model.spec.context)


def test_the_snapshot_shows_groups_and_blocks(opened):
    _, model, prompts, _ = opened
    engine = Engine(model, config=EngineConfig(cache_tokens=400, block=4))
    r = Request(prompts[0], SamplingParams(max_tokens=4))
    engine.add(r)
    engine.step()
    shown = engine.snapshot()
    assert shown["running"][0]["blocks"] == held(r.tables) and GONE not in held(r.tables)
    assert sorted(i for g in shown["groups"] for i in g) == list(range(len(model.spec.layers))) and shown["groups_reason"]
