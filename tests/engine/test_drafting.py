"""Models as proposers: greedy and sampled tokens are those without them, and good proposals are accepted."""

from __future__ import annotations

import pytest
import torch

from pellucid import events
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.drafting import DraftModel, PredictionHead
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.errors import BadInput
from pellucid.nn import GDN, MLP, Attn, Decoder, DecoderSpec, KVCache, Layer, Rope, init_weights, prediction_spec

LAYER = Layer(Attn(4, 2, 8, Rope(8), qk_norm=True), MLP(48))
PROMPTS = [[5, 6, 7, 5, 6], [3], list(range(3, 33)), [9, 8, 7, 6, 5, 4, 3, 2, 30], list(range(3, 20))]


def sharp(spec: DecoderSpec, seed: int) -> Decoder:
    model = init_weights(Decoder(spec), seed=seed)
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Decoder:
    return sharp(DecoderSpec(40, 32, (LAYER,) * 2, context=200, mtp=(LAYER,)), 3)


@pytest.fixture(scope="module")
def friend(model) -> Decoder:
    """Nearly the model: it agrees often, not always."""
    twin = Decoder(model.spec).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.04 * p.std().nan_to_num(0) * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return twin


@pytest.fixture(scope="module")
def stranger() -> Decoder:
    return sharp(DecoderSpec(40, 16, (Layer(Attn(2, 1, 8, Rope(8)), MLP(24)),), context=200), 8)


def run(model, temperature: float, proposer=None, penalty: float = 1.2, **config) -> tuple[list[list[int]], Engine]:
    engine = Engine(model, [1], EngineConfig(**{"cache_tokens": 600, "block": 4, **config}), proposer=proposer)
    requests = [Request(p, SamplingParams(max_tokens=24, temperature=temperature, top_p=0.9 if i % 2 else None, repetition_penalty=penalty if i == 3 else 1.0), i)
                for i, p in enumerate(PROMPTS)]
    for r in requests[:3]:
        engine.add(r)
    engine.step()
    for r in requests[3:]:
        engine.add(r)
    for _ in range(2000):
        if not engine.busy:
            break
        engine.step()
    engine.cache.check()
    assert not engine.busy and engine.cache.available() == engine.cache.blocks
    if proposer is not None:
        proposer.pool.check()
        assert proposer.pool.available() == proposer.pool.blocks  # it has forgotten everybody
    return [r.output for r in requests], engine


CONFIGS = {"plain": {"prefix": "none"}, "chain": {}, "radix": {"prefix": "radix"}, "chunks of 1": {"chunk": 1}, "chunks of 7": {"chunk": 7, "budget": 9},
           "pressure": {"cache_tokens": 70}, "swap": {"cache_tokens": 70, "swap": True}}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_tokens_are_those_without_proposals(model, friend, stranger, temperature):
    want, _ = run(model, temperature)
    rates: dict[str, list[float]] = {"friend": [], "stranger": [], "head": []}
    for config in CONFIGS.values():
        for name in rates:
            proposer = PredictionHead(model, 800, 64) if name == "head" else DraftModel(friend if name == "friend" else stranger, model.spec, 800)
            got, engine = run(model, temperature, proposer, drafts=4, **config)
            assert got == want, (name, config)
            assert engine.totals["proposed_tokens"] > 30
            rates[name].append(engine.totals["accepted_tokens"] / engine.totals["proposed_tokens"])
    assert min(rates["friend"]) > 0.25 and max(rates["stranger"]) < min(rates["friend"])


def test_a_model_that_proposes_for_itself_is_always_right(model):
    for temperature in (0.0, 0.8):
        _, engine = run(model, temperature, DraftModel(model, model.spec, 800), penalty=1.0, drafts=3, prefix="none")
        refused = engine.totals["proposed_tokens"] - engine.totals["accepted_tokens"]
        assert refused <= 3 * len(PROMPTS)  # behind an end
        assert engine.totals["accepted_tokens"] > 15


def test_the_head_proposes_what_the_model_definition_predicts(model):
    """Against `Decoder.predict` over the whole text: the greedy first proposal of each step, with and without rows that were refused."""
    engine = Engine(model, config=EngineConfig(cache_tokens=300, drafts=3, proposer="mtp", block=4))
    seen: list[tuple[list[int], list[int]]] = []
    inner = engine.proposer.propose
    engine.proposer.propose = lambda requests, most: [seen.append((list(r.tokens), d)) or d for r, d in zip(requests, inner(requests, most), strict=True)]
    engine.add(Request(list(range(3, 20)), SamplingParams(max_tokens=30)))
    while engine.busy:
        engine.step()
    assert len(seen) > 5 and engine.totals["proposed_tokens"] > 20
    for tokens, drafts in seen:
        x = torch.tensor([tokens])
        with torch.no_grad():
            hidden = model.hidden(x)[:, :-1]
            cache = KVCache(prediction_spec(model.spec, 1), 1, len(tokens) + 4)
            state = model.predict(1, x[:, 1:], hidden, torch.arange(1, len(tokens))[None], cache=cache)[:, -1:]
            for i, draft in enumerate(drafts):
                assert int(model.logits(state)[0, -1].argmax()) == draft
                state = model.predict(1, torch.tensor([[draft]]), state, torch.tensor([[len(tokens) + i]]), cache=cache)


def test_sampled_tokens_keep_their_distribution(model, stranger):
    """The second token of 2000 seeded requests with proposals, against the exact distribution: chi-square, five standard deviations."""
    with torch.no_grad():
        first = model(torch.tensor([[5, 6]]))[0, -1].softmax(-1)
        second = sum(first[t] * model(torch.tensor([[5, 6, t]]))[0, -1].softmax(-1) for t in range(40)).double()
    counts = torch.zeros(40, dtype=torch.float64)
    for name in ("draft", "head"):
        engine = Engine(model, config=EngineConfig(cache_tokens=6000, block=4, drafts=2, speculate_up_to=500, budget=4096, running=500),
                        proposer=DraftModel(stranger, model.spec, 20000, 500) if name == "draft" else PredictionHead(model, 20000, 500))
        requests = [Request([5, 6], SamplingParams(max_tokens=4, temperature=1.0), seed) for seed in range(3000 * (name == "head"), 3000 * (name == "head") + 1000)]
        for r in requests:
            engine.add(r)
        while engine.busy:
            engine.step()
        assert engine.totals["accepted_tokens"] > 0
        for r in requests:
            counts[r.output[1]] += 1
    expected = second / second.sum() * counts.sum()
    rare = expected < 5
    cells = torch.cat((counts[~rare], counts[rare].sum()[None])), torch.cat((expected[~rare], expected[rare].sum()[None]))
    chi, freedom = float(((cells[0] - cells[1]) ** 2 / cells[1].clamp_min(1e-9)).sum()), len(cells[0]) - 1
    assert chi < freedom + 5 * (2 * freedom) ** 0.5


def test_a_small_cache_of_the_proposer_only_means_fewer_proposals(model, friend):
    want, _ = run(model, 0.0)
    for proposer in (DraftModel(friend, model.spec, 48), PredictionHead(model, 48, 64)):
        assert run(model, 0.0, proposer, drafts=4)[0] == want


def test_acceptance_is_told(model, friend):
    seen: list = []
    with events.subscribed(seen.append):
        _, engine = run(model, 0.0, DraftModel(friend, model.spec, 800), drafts=4)
    steps = [e for e in seen if e.kind == "engine_step"]
    assert sum(e.proposed for e in steps) == engine.totals["proposed_tokens"] and sum(e.accepted for e in steps) == engine.totals["accepted_tokens"] > 0


def test_impossible_proposers(model):
    with pytest.raises(BadInput, match="the model 40"):
        DraftModel(sharp(DecoderSpec(50, 32, (LAYER,), context=64), 1), model.spec)
    hybrid = init_weights(Decoder(DecoderSpec(40, 32, (Layer(GDN(2, 2, 8, 8), MLP(48)),), context=64))).eval()
    with pytest.raises(BadInput, match="linear attention"):
        DraftModel(hybrid, model.spec)
    with pytest.raises(BadInput, match="multi-token"):
        Engine(init_weights(Decoder(DecoderSpec(40, 32, (LAYER,), context=64))), config=EngineConfig(cache_tokens=64, drafts=2, proposer="mtp"))
    with pytest.raises(BadInput, match="proposer"):
        Engine(model, config=EngineConfig(cache_tokens=64, drafts=2, proposer="oracle"))
