"""One request whose logits are no numbers ends by itself; the others are answered as if it had never been there.

The poison is real: the embedding of one token is NaN, so that whoever reads it computes NaN from there on, in its cache entries too.
"""

from __future__ import annotations

import asyncio
import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from several import run
from tiny_decoders import decoder
from tiny_splits import tokenizer

from pellucid.engine import LLM, AsyncLLM
from pellucid.engine.beam import Search, run_searches
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.hash_chain import HashChain
from pellucid.engine.opening import open_model
from pellucid.engine.params import SamplingParams
from pellucid.engine.radix_tree import RadixTree
from pellucid.engine.request import Request
from pellucid.engine.runner import segments_of
from pellucid.errors import PellucidError
from pellucid.nn import Decoder

POISON = 277
PROMPTS = [[5, 6, 7], list(range(20, 41)), [9] * 12, [30, 31]]
SETTINGS = [{}, {"temperature": 1.0, "logprobs": 2}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}, {"repetition_penalty": 1.3, "logprobs": 0}]


@pytest.fixture(scope="module")
def poisoned() -> Decoder:
    model = decoder()
    assert model.head is not None, "the head must not be the table that holds NaN"
    with torch.no_grad():
        model.embed.weight[POISON] = torch.nan
        model.head_weight[POISON] = 0.0
    return model


def good() -> list[Request]:
    """Requests that never see the poison; nor do they draw it."""
    never = {POISON: -100.0}
    return [Request(list(prompt), SamplingParams(max_tokens=12, logit_bias=never, **s), seed=i) for i, (prompt, s) in enumerate(zip(PROMPTS, SETTINGS))]


def bad() -> list[Request]:
    """One reads it in its prompt, over several chunks; one draws it as its first token; one asks for all that is told beside."""
    return [Request([*range(50, 63), POISON, *range(70, 80)], SamplingParams(max_tokens=9)),
            Request([11, 12], SamplingParams(max_tokens=9, logit_bias={POISON: 100.0}, logprobs=3)),
            Request([POISON, 4], SamplingParams(max_tokens=9, logprobs=2, frequency_penalty=0.5, temperature=0.7, prompt_logprobs=1))]


def told(requests: list[Request]) -> list[object]:
    return [(r.output, [round(x, 3) for x in r.logprobs], [[t for t, _ in top] for top in r.tops], r.finish_reason, r.fault) for r in requests]


CONFIGS = {
    "compiled": {}, "flat": {}, "radix": {"prefix": "radix"}, "no-reuse": {"prefix": "none"}, "lookup": {"drafts": 3},
    "int8": {"cache_dtype": "int8"}, "tight": {"cache_tokens": 64}, "swap": {"cache_tokens": 48, "swap": True}}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_others_go_on(poisoned: Decoder, name: str):
    def engine() -> Engine:
        made = Engine(poisoned, config=EngineConfig(**{"cache_tokens": 400, "block": 4, "chunk": 8, "budget": 24, **CONFIGS[name]}))
        if name == "flat":
            made.runner.compiled = None
        return made

    alone, mixed = engine(), engine()
    want, found, lost = good(), good(), bad()
    for r in want:
        alone.add(r)
    for pair in zip(found, [*lost, None]):
        for r in pair:
            if r is not None:
                mixed.add(r)
    for e in (alone, mixed):
        while e.busy:
            given = e.step()
            assert all(t >= 0 for _, tokens in given for t in tokens)
        e.cache.check()
        assert e.cache.available() == e.cache.blocks and not e.runner.place_of
    assert told(found) == told(want) and {r.finish_reason for r in found} == {"length"}
    assert [(r.output, r.finish_reason, r.fault) for r in lost] == [([], "error", "not_numbers"), ([POISON], "error", "not_numbers"), ([], "error", "not_numbers")]
    assert len(lost[1].logprobs) == len(lost[1].tops) == 1 and not lost[2].logprobs
    assert mixed.totals["accepted_tokens"] >= 0 and mixed.totals["generated_tokens"] == sum(len(r.output) for r in (*found, *lost))
    for r in lost:
        assert mixed.cache.match(Request(list(r.prompt), r.params)) == [], "nobody may find what it left"
    again = good()  # in the blocks that held the poison
    for r in again:
        mixed.add(r)
    while mixed.busy:
        mixed.step()
    assert told(again) == told(want)


def test_samples_of_a_poisoned_prompt_all_end(poisoned: Decoder):
    engine = Engine(poisoned, config=EngineConfig(cache_tokens=200, block=4))
    first, other = (Request([3, POISON], SamplingParams(max_tokens=4), seed=s) for s in (1, 2))
    engine.add(first)
    engine.add(other, behind=first)
    for _ in range(10):
        if engine.busy:
            engine.step()
    assert not engine.busy and first.fault == other.fault == "not_numbers" and engine.cache.available() == engine.cache.blocks


@pytest.mark.parametrize("clean", [True, False], ids=["the model is clean", "both"])
def test_a_poisoned_draft_model_only_stops_proposing(poisoned: Decoder, clean: bool):
    """Its twin of a request that reads NaN proposes nothing, and the others' drafts are accepted as before."""
    model = decoder() if clean else poisoned
    requests = [Request([5, 6, 7], SamplingParams(max_tokens=8)), Request([8, POISON, 9], SamplingParams(max_tokens=8))]
    plain = [Request(list(r.prompt), r.params) for r in requests]
    for drafts, some in ((2, requests), (0, plain)):
        engine = Engine(model, config=EngineConfig(cache_tokens=200, block=4, drafts=drafts), draft=poisoned if drafts else None)
        for r in some:
            engine.add(r)
        while engine.busy:
            engine.step()
        assert not drafts or clean or engine.totals["accepted_tokens"] > 0
    assert told(requests) == told(plain)
    assert requests[1].finish_reason == ("length" if clean else "error")


def test_llm_tells_it(poisoned: Decoder):
    """A model that answers nobody is an error; where some are answered, theirs says so."""
    llm = LLM(poisoned, tokenizer())
    never = SamplingParams(max_tokens=3, logit_bias={POISON: -100.0})
    one, other = llm.generate([[5, 6], [5, POISON]], never)
    assert one.outputs[0].finish_reason == "length" and (other.outputs[0].finish_reason, other.outputs[0].token_ids) == ("error", [])
    for ask in (lambda: llm.generate([[5, POISON]], never), lambda: list(llm.stream([POISON], never)), lambda: llm.beam_search([[POISON, 5]], 2, 3)):
        with pytest.raises(PellucidError, match="not numbers"):
            ask()
    found, lost = llm.beam_search([[5, 6], [POISON, 5]], 2, 3)
    assert len(found.outputs) == 2 and [(o.finish_reason, o.token_ids) for o in lost.outputs] == [("error", [])]
    assert found.outputs == llm.beam_search([[5, 6]], 2, 3)[0].outputs


@pytest.mark.parametrize("most", [2, 6])
def test_a_beam_is_given_up_and_the_others_go_on(poisoned: Decoder, most: int):
    """The poison is the most probable token behind one prompt: of all that a search opens, what holds it goes no further."""
    biased = copy.deepcopy(poisoned)
    with torch.no_grad():
        biased.head_weight[POISON] = biased.hidden(torch.tensor([[5, 6]]))[0, -1]
    engine = Engine(biased, config=EngineConfig(cache_tokens=400, block=4))
    first = Request([5, 6], SamplingParams(max_tokens=1, logprobs=4))
    engine.add(first)
    engine.step()
    assert first.tops[0][0][0] == POISON
    searches = [Search([5, 6], 4, most), Search([5, 6], 1, most), Search([20, 21, 22], 2, most)]
    run_searches(engine, searches)
    assert len(searches[0].done) >= 1 and searches[1].done == [] == searches[1].open, "its only beam was lost"
    assert all(POISON not in beam.tokens[:-1] and len(beam.tokens) == most for s in searches for beam in s.done)
    engine.cache.check()
    assert engine.cache.available() == engine.cache.blocks


def test_listeners_hear_of_their_own_alone(poisoned: Decoder):
    llm = LLM(poisoned, tokenizer())
    never = SamplingParams(max_tokens=20, logit_bias={POISON: -100.0})
    want = llm.generate([[5, 6, 7], [20, 21]], never)

    async def one(engine: AsyncLLM, prompt: list[int]):
        return [output async for output in engine.generate(prompt, never)][-1].outputs[0]

    async def main():
        async with AsyncLLM(llm) as engine:
            found = await asyncio.gather(*(one(engine, p) for p in ([5, 6, 7], [8, POISON], [20, 21])))
            return found, dict(engine.reasons), engine.engine.cache.available() == engine.engine.cache.blocks

    (first, lost, second), reasons, free = asyncio.run(main())
    assert [first.token_ids, second.token_ids] == [o.outputs[0].token_ids for o in want]
    assert (lost.finish_reason, lost.token_ids, lost.text) == ("error", [], "") and reasons == {"length": 2, "error": 1} and free


@pytest.mark.parametrize("kind", ["tensor", "disaggregated"])
def test_in_several_processes(fleet_of, folders, tmp_path, kind: str):
    folder = tmp_path / "poisoned"
    shutil.copytree(folders("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = EngineConfig(cache_tokens=400, block=4, chunk=8)
    want = run(Engine(open_model(folder), [], config, tokenizer()), good())
    fleet, found, lost = fleet_of(folder, kind, config), good(), bad()
    run(fleet, [r for pair in zip(found, [*lost, Request([7, POISON], SamplingParams(max_tokens=2))]) for r in pair])
    assert [(r.output, r.finish_reason, r.fault) for r in found] == [(r.output, r.finish_reason, r.fault) for r in want]
    assert [(r.output, r.finish_reason, r.fault, len(r.logprobs)) for r in lost] == [
        ([], "error", "not_numbers", 0), ([POISON], "error", "not_numbers", 1), ([], "error", "not_numbers", 0)]


class FlatAhead:
    """Stands where a GPU's step does, so that steps begin before the last one's tokens are read, and computes by the flat pass."""

    logits = None

    def __init__(self, engine: Engine):
        self.runner, self.drawn = engine.runner, torch.full((engine.config.running,), -1)
        engine.runner.compiled, engine.runner.gpu, engine.ahead.possible = None, self, True

    def hidden(self, parts, same=True, sources=None):
        unknown = [(p.request.tokens, p.start + p.count - 1, s) for p, s in zip(parts, sources or [-1] * len(parts)) if s >= 0]
        for tokens, at, source in unknown:
            assert tokens[at] == -1
            tokens[at] = max(0, int(self.drawn[source]))
        found = self.runner._flat(segments_of(parts))
        for tokens, at, _ in unknown:
            tokens[at] = -1
        return found


@pytest.mark.parametrize("prefix", ["chain", "radix"])
def test_where_the_next_step_is_on_its_way(poisoned: Decoder, prefix: str):
    found = []
    for ahead, poison in ((True, True), (True, False), (False, False)):
        engine = Engine(poisoned, config=EngineConfig(cache_tokens=400, block=4, chunk=8, prefix=prefix))
        if ahead:
            FlatAhead(engine)
        some = [Request([3 + i, 5], SamplingParams(max_tokens=9, temperature=1.0, top_k=20, logprobs=0), seed=i) for i in range(3)]
        lost = [Request([*range(30, 40), POISON, 6], SamplingParams(max_tokens=8)), Request([POISON], SamplingParams(max_tokens=8, logprobs=0))] if poison else []
        flights = 0
        for r in (some[0], *lost, *some[1:]):
            engine.add(r)
            engine.step()
        while engine.busy:
            engine.step()
            flights += engine.ahead.flight is not None
        engine.cache.check()
        assert engine.cache.available() == engine.cache.blocks and (flights > 0) == ahead
        assert all((r.output, r.finish_reason, r.fault) == ([], "error", "not_numbers") for r in lost)
        assert all(engine.cache.match(Request(list(r.prompt), r.params)) == [] for r in lost)
        found.append(told(some))
    assert found[0] == found[1] == found[2] and {row[3] for row in found[0]} == {"length"}


@pytest.mark.parametrize("cache", [RadixTree(20, 2), HashChain(20, 2)], ids=["radix", "chain"])
def test_what_is_withdrawn_is_found_by_nobody(cache):
    """Nor is what others hung behind it in a tree; whoever reads it now goes on, and every block comes back."""
    def run_through(tokens: list[int]) -> Request:
        r = Request(tokens, SamplingParams())
        r.tables = [[block for (block,) in cache.match(r)]]
        cache.claim(r.blocks)
        r.blocks += cache.allocate(len(tokens) // 2 - len(r.blocks))
        r.computed = len(tokens)
        cache.publish(r)
        return r

    other, longer = run_through([9, 9]), run_through([1, 2, 3, 4, 5, 6])
    cache.release(longer.blocks)
    reader, lost = run_through([1, 2, 3, 4, 7, 8]), run_through([1, 2, 3, 4])
    assert len(cache.match(longer)) == 3
    cache.withdraw(lost)
    cache.release(lost.blocks)
    cache.check()
    assert cache.match(longer) == cache.match(reader) == [] and len(cache.match(other)) == 1
    cache.publish(reader)
    cache.release(reader.blocks)
    cache.release(other.blocks)
    cache.check()
    assert cache.available() == 20
