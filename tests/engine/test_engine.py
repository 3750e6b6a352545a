"""The engine by itself: seeds, speculation, cancellation in every state, what it reports."""

import pytest
import torch

from pellucid import events
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request, State
from pellucid.engine.speculation import PromptLookup
from pellucid.errors import BadInput
from pellucid.nn import GDN, MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = init_weights(Decoder(DecoderSpec(40, 32, (Layer(Attn(4, 2, 8, Rope(8), qk_norm=True), MLP(48)),) * 2, context=200)), seed=3)
    with torch.no_grad():
        model.head.weight.mul_(4)  # a distribution worth drawing from
    return model.eval()


def run(model: Decoder, requests: list[Request], **options) -> Engine:
    engine = Engine(model, eos=[1], config=EngineConfig(**{"cache_tokens": 600, "block": 4, **options}))
    for r in requests:
        engine.add(r)
    for _ in range(2000):
        if not engine.busy:
            return engine
        engine.step()
    raise AssertionError("it does not end")


def sampled(seed: int, prompt=(5, 6, 7, 5, 6, 7, 5, 6), new: int = 40, **fields) -> Request:
    return Request(list(prompt), SamplingParams(max_tokens=new, temperature=0.7, top_p=0.9 if seed % 2 else None, logprobs=True, **fields), seed)


def test_a_seeded_request_gives_the_same_whatever_runs_beside_it(model):
    alone = [sampled(s) for s in range(4)]
    for r in alone:
        run(model, [r], prefix="none")
    for options in ({}, {"budget": 3}, {"cache_tokens": 120}, {"prefix": "radix"}, {"drafts": 4}, {"drafts": 4, "cache_tokens": 120, "swap": True},
                    {"order": "planned"}, {"step_seconds": 1e-6}, {"step_seconds": 1e-6, "prefix": "none", "cache_tokens": 120}):
        together = [sampled(s) for s in range(4)]
        run(model, [*together, *(sampled(50 + i, prompt=range(3, 9 + i)) for i in range(5))], **options)
        assert [r.output for r in together] == [r.output for r in alone]
        for a, b in zip(alone, together, strict=True):
            assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)


def test_a_step_has_no_time_for_a_whole_prompt(model):
    """With hardly any time a prompt comes in the smallest pieces once the engine knows what steps cost; without the bound in one."""
    counts = {}
    for bound in (None, 1e-6):
        engine = Engine(model, eos=[1], config=EngineConfig(cache_tokens=600, block=4, step_seconds=bound))
        engine.add(sampled(0, new=60, ignore_eos=True))
        for _ in range(20):
            engine.step()
        engine.add(prompt := sampled(1, prompt=range(2, 34), new=2))
        parts = []
        with events.subscribed(lambda e, parts=parts: parts.append(e.tokens) if e.kind == "engine_step" else None):
            while prompt.state is not State.FINISHED:
                engine.step()
        counts[bound] = max(parts)
    assert counts == {None: 33, 1e-6: 17}
    with pytest.raises(BadInput, match="not possible"):
        Engine(model, config=EngineConfig(step_seconds=0.0))


@pytest.mark.parametrize("options", [
    {}, {"budget": 1}, {"budget": 1, "chunk": 1, "prefix": "radix"}, {"budget": 2, "drafts": 5}, {"drafts": 5}, {"drafts": 9, "draft": True},
    {"drafts": 9, "draft": True, "budget": 3, "prefix": "radix-cost"}, {"cache_tokens": 200, "swap": True, "drafts": 3, "budget": 1}])
def test_answers_reach_the_end_of_the_context_and_no_further(model, options):
    """Prompts of all but 1, 2 and 12 of its 200 tokens; the smallest budgets; guesses that would lead beyond the end."""
    prompts, new = [([5, 6, 7, 8, 9] * 40)[: 200 - n] for n in (1, 2, 12)], (1, 2, 12)
    want = [Request(p, SamplingParams(max_tokens=n, ignore_eos=True)) for p, n in zip(prompts, new, strict=True)]
    run(model, want, prefix="none")
    config = EngineConfig(**{"cache_tokens": 600, "block": 4, **{name: value for name, value in options.items() if name != "draft"}})
    engine = Engine(model, config=config, draft=model if "draft" in options else None)
    asked = [Request(p, SamplingParams(max_tokens=n, ignore_eos=True)) for p, n in zip(prompts, new, strict=True)]
    run_on(engine, asked)
    engine.cache.check()
    assert [r.output for r in asked] == [r.output for r in want] and all(len(r.tokens) == 200 for r in asked)
    assert engine.cache.available() == engine.cache.blocks
    for length, most in ((200, 1), (199, 2), (188, 13)):
        with pytest.raises(BadInput, match="context of 200"):
            engine.add(Request([5] * length, SamplingParams(max_tokens=most)))


def test_speculation_accepts_what_repeats_and_counts_it(model):
    loop = Request([5, 6, 7, 8] * 8, SamplingParams(max_tokens=60, ignore_eos=True))
    engine = run(model, [loop], drafts=5)
    plain = Request([5, 6, 7, 8] * 8, SamplingParams(max_tokens=60, ignore_eos=True))
    assert engine.steps < run(model, [plain]).steps and loop.output == plain.output
    assert 0 < engine.totals["accepted_tokens"] <= engine.totals["proposed_tokens"]


def test_prompt_lookup_finds_the_latest_and_longest_run():
    r = Request([1, 2, 3, 9, 1, 2, 3, 8, 5, 2, 3], SamplingParams())
    lookup = PromptLookup(longest=3, shortest=2)
    assert lookup.propose([r], 3) == [[8, 5, 2]]
    r.tokens += [8, 5]
    assert lookup.propose([r], 2) == [[2, 3]]
    assert lookup.propose([Request([1, 2, 3], SamplingParams())], 2) == [[]]


def test_cancelling_in_every_state_frees_at_once(model):
    for moment in range(9):
        engine = Engine(model, config=EngineConfig(cache_tokens=60, block=4, budget=7, running=3, swap=moment % 2 == 1, drafts=moment % 3))
        requests = [Request(list(range(3, 15)), SamplingParams(max_tokens=12), seed=i) for i in range(5)]
        for r in requests:
            engine.add(r)
        for _ in range(moment):
            engine.step()
        for r in requests:
            engine.cancel(r)
            engine.cancel(r)  # twice is once
            engine.cache.check()
        assert not engine.busy and engine.cache.available() == engine.cache.blocks
        assert all(r.state is State.FINISHED for r in requests) and len(engine.runner.pages.table.free) == 3
        assert not engine.runner.swapped


def test_steps_are_events_and_the_snapshot_is_the_real_state(model):
    seen = []
    with events.subscribed(seen.append):
        engine = Engine(model, config=EngineConfig(cache_tokens=64, block=4))
        engine.add(Request([3, 4, 5, 6, 7], SamplingParams(max_tokens=4)))
        engine.step()
    (step,) = [e for e in seen if e.kind == "engine_step"]
    assert (step.tokens, step.generated, step.running, step.admitted) == (5, 1, 1, 1)
    snapshot = engine.snapshot()
    (row,) = snapshot["running"]
    assert row["computed"] == 5 and row["known"] == 6 and len(row["blocks"]) == 2
    assert snapshot["available"] == 16 - 2


def test_linear_attention_has_no_reuse_and_no_speculation():
    spec = DecoderSpec(40, 32, (Layer(GDN(2, 2, 8, 8), MLP(48)),), context=64)
    hybrid = init_weights(Decoder(spec)).eval()
    engine = Engine(hybrid, config=EngineConfig(cache_tokens=64))
    assert type(engine.cache).__name__ == "NoReuse"
    with pytest.raises(BadInput, match="speculative"):
        Engine(hybrid, config=EngineConfig(cache_tokens=64, drafts=2))


@pytest.mark.parametrize(("options", "says"), [
    ({"prefix": "tree"}, "not known"), ({"order": "random"}, "not known"), ({"cache_tokens": 0}, "not possible"), ({"budget": 0}, "at least 1")])
def test_impossible_settings(model, options, says):
    with pytest.raises(BadInput, match=says):
        Engine(model, config=EngineConfig(**{"cache_tokens": 64, **options}))


@pytest.mark.parametrize("compiled", [True, False])
def test_who_adopts_equal_blocks_of_the_tree_reads_them(model, compiled):
    """Two compute the same prompt at once; the second then stands on the first's blocks, and its own are written by others."""
    def answers(prefix: str) -> list[list[int]]:
        engine = Engine(model, config=EngineConfig(cache_tokens=400, prefix=prefix))
        if not compiled:
            engine.runner.compiled = None
        same = [Request(list(range(3, 30)), SamplingParams(max_tokens=20, ignore_eos=True)) for _ in range(2)]
        for r in same:
            engine.add(r)
        engine.step()
        if prefix == "radix":
            assert same[0].blocks[:26] == same[1].blocks[:26]
        later = [Request([i, *range(5, 20)], SamplingParams(max_tokens=20, ignore_eos=True)) for i in (31, 32)]
        run_on(engine, later)
        return [r.output for r in (*same, *later)]

    assert answers("radix") == answers("none")


def run_on(engine: Engine, requests: list[Request]) -> None:
    for r in requests:
        engine.add(r)
    while engine.busy:
        engine.step()


def test_the_first_prompt_may_be_longer_than_the_compiled_step_takes(model, monkeypatch):
    """It takes the flat pass, and the head is the compiled step's, which has run nothing before."""
    engine = Engine(model, config=EngineConfig(cache_tokens=400))
    monkeypatch.setattr(type(engine.runner.compiled or engine.runner), "suits", staticmethod(lambda parts: False), raising=False)
    plain = Engine(model, config=EngineConfig(cache_tokens=400))
    plain.runner.compiled = None
    first, second = (Request(list(range(3, 30)), SamplingParams(max_tokens=4)) for _ in range(2))
    run_on(engine, [first])
    run_on(plain, [second])
    assert first.output == second.output


def test_blocks_of_refused_drafts_go_back_at_once(model):
    class Wrong:
        """Never what the model says: it takes what it likes least."""

        def propose(self, requests, most):
            return [[1] * most for _ in requests]

        def forget(self, request):
            pass

    engine = Engine(model, config=EngineConfig(cache_tokens=200, block=2, drafts=7), proposer=Wrong())
    r = Request(list(range(3, 15)), SamplingParams(max_tokens=20, logit_bias={1: -100.0}))
    engine.add(r)
    while engine.busy:
        engine.step()
        assert r.state is State.FINISHED or len(r.blocks) <= r.computed // 2 + 1
    assert engine.totals["proposed_tokens"] > 50 and engine.totals["accepted_tokens"] == 0
