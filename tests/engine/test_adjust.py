"""Bias, penalties, early ends, log-probabilities: against transformers' processors, alone and through the whole engine."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_generators import VOCAB, generated, hugging_face

import pellucid
from pellucid.engine.adjust import Adjuster
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.errors import BadInput

SETTINGS = [
    {"repetition_penalty": 1.3}, {"repetition_penalty": 0.8}, {"logit_bias": {5: 4.0, 7: -100.0, 200: 1.5}}, {"frequency_penalty": 0.7},
    {"presence_penalty": -1.1}, {"min_tokens": 9}, {},
    {"repetition_penalty": 1.7, "frequency_penalty": -0.4, "presence_penalty": 0.6, "logit_bias": {1: 2.0, 2: 2.0}, "min_tokens": 4, "stop_token_ids": [9]},
]


def by_transformers(row, prompt, output, p):
    """One place's logits after transformers' processors; frequency and presence, which it does not have, word for word as OpenAI states
    them: logit[j] - count[j] * frequency - (count[j] > 0) * presence."""
    from transformers.generation import logits_process as hf

    ids, scores = torch.tensor([prompt + output]), row[None].clone()
    if p.logit_bias:
        scores = hf.SequenceBiasLogitsProcessor({(t,): b for t, b in p.logit_bias.items()})(ids, scores)
    if p.repetition_penalty != 1:
        scores = hf.RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(ids, scores)
    for j in range(VOCAB):
        scores[0, j] -= output.count(j) * p.frequency_penalty + (output.count(j) > 0) * p.presence_penalty
    if p.min_tokens:
        scores = hf.MinNewTokensLengthLogitsProcessor(len(prompt), p.min_tokens, [1, *p.stop_token_ids])(ids, scores)
    return scores[0]


@pytest.mark.parametrize("drafts", [0, 3])
def test_all_of_a_batch_as_transformers_one_by_one(drafts):
    rng, g = random.Random(3), torch.Generator().manual_seed(3)
    adjuster, requests = Adjuster(VOCAB, [1]), []
    for settings in SETTINGS * 2:
        requests.append(Request([rng.randrange(20) for _ in range(rng.randrange(1, 12))], SamplingParams(max_tokens=40, **settings)))
    for step in range(6):  # tokens come in between, requests leave and others take their places
        for r in requests:
            proposed = [rng.randrange(20) for _ in range(drafts * (step % 2))]
            r.tokens, r.drafts = r.tokens + proposed, len(proposed)
        places = [(r, j) for r in requests for j in range(1 + r.drafts)]
        logits = 3 * torch.randn(len(places), VOCAB, generator=g)
        ours = logits.clone()
        adjuster(ours, places)
        for (r, j), row, mine in zip(places, logits, ours, strict=True):
            output = r.tokens[len(r.prompt) : len(r.tokens) - r.drafts + j]
            torch.testing.assert_close(mine, by_transformers(row, r.prompt, output, r.params), rtol=1e-5, atol=1e-5)
        given = []
        for r in requests:
            del r.tokens[len(r.tokens) - r.drafts :]
            r.drafts, new = 0, [rng.randrange(20) for _ in range(rng.randrange(1, 3))]
            r.tokens += new
            given.append((r, new))
        adjuster.record(given)
        gone = requests.pop(rng.randrange(len(requests)))
        adjuster.forget(gone)
        requests.append(Request([rng.randrange(20)], SamplingParams(max_tokens=40, **rng.choice(SETTINGS))))
    assert len(adjuster.counts) <= 28  # rows are used again


# --- the whole engine -------------------------------------------------------------------------------------------------

CONFIGS = {
    "plain": {"prefix": "none"}, "chunks of 1": {"chunk": 1, "block": 3}, "chunks of 7": {"chunk": 7, "budget": 9},
    "radix": {"prefix": "radix", "order": "longest-hit"}, "pressure": {"cache_tokens": 48, "block": 4},
    "swap": {"cache_tokens": 48, "block": 4, "swap": True}, "speculation": {"drafts": 4, "block": 4},
    "speculation under pressure": {"drafts": 3, "block": 2, "budget": 6, "cache_tokens": 48},
}
PROMPTS = [[3, 4, 5, 3, 4, 5, 3, 4], [7], [9, 8, 7, 6, 5, 4, 3, 2, 30, 31, 32, 33], [9, 8, 7, 6, 5, 4, 3, 2, 30, 31, 34], [3, 4, 5, 3, 4, 5, 3, 4, 6]]
PENALTIES = [
    ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}), ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
    ({"logit_bias": {5: 3.0, 77: 4.0}}, {"sequence_bias": {(5,): 3.0, (77,): 4.0}}), ({"min_tokens": 8}, {"min_new_tokens": 8}), ({}, {})]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    theirs = hugging_face(folder)
    return theirs, pellucid.load(folder)


def run(model, requests, eos=(), **config) -> Engine:
    engine = Engine(model, eos, EngineConfig(**{"cache_tokens": 400, **config}))
    for r in requests:
        engine.add(r)
    for _ in range(1500):
        if not engine.busy:
            engine.cache.check()
            assert engine.cache.available() == engine.cache.blocks and not engine.adjuster.row_of and not engine.held
            return engine
        engine.step()
    raise AssertionError("it does not end")


@pytest.fixture(scope="module")
def wanted(pair):
    theirs, _ = pair
    free = [generated(theirs, p, max_new_tokens=16, do_sample=False).sequences[0, len(p) :].tolist() for p in PROMPTS]
    eos = free[3][2]  # ends some answers early, where min_tokens does not forbid it
    return eos, [generated(theirs, p, max_new_tokens=16, do_sample=False, eos_token_id=eos, output_logits=True, **options)
                 for p, (_, options) in zip(PROMPTS, PENALTIES, strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_with_penalties_is_transformers(pair, wanted, name):
    eos, theirs = wanted
    requests = [Request(p, SamplingParams(max_tokens=16, logprobs=3, prompt_logprobs=2, **mine)) for p, (mine, _) in zip(PROMPTS, PENALTIES, strict=True)]
    engine = run(pair[1], requests, [eos], **CONFIGS[name])
    for r, out in zip(requests, theirs, strict=True):
        assert r.output == out.sequences[0, len(r.prompt) :].tolist()
        assert r.finish_reason == ("stop" if r.output[-1] == eos else "length")
        logp = torch.cat(out.logits).log_softmax(-1)  # as the model left them, before any penalty
        torch.testing.assert_close(torch.tensor(r.logprobs), logp.gather(1, torch.tensor(r.output)[:, None])[:, 0], atol=1e-4, rtol=1e-4)
        assert [[t for t, _ in top] for top in r.tops] == logp.topk(3).indices.tolist()
        torch.testing.assert_close(torch.tensor([[v for _, v in top] for top in r.tops]), logp.topk(3).values, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            read = pair[0](torch.tensor([r.prompt])).logits[0, :-1].log_softmax(-1)
        assert len(r.prompt_logprobs) == len(r.prompt_tops) == len(r.prompt) - 1
        torch.testing.assert_close(torch.tensor(r.prompt_logprobs), read.gather(1, torch.tensor(r.prompt[1:])[:, None])[:, 0], atol=1e-4, rtol=1e-4)
        assert [[t for t, _ in top] for top in r.prompt_tops] == read.topk(2).indices.tolist()
    if "pressure" in name or name == "swap":
        assert engine.totals["preemptions"] > 0
    if "speculation" in name:
        assert engine.totals["accepted_tokens"] > 0


def test_sampled_requests_do_not_depend_on_the_batch(pair):
    def made(seed):
        settings = [{"repetition_penalty": 1.2, "top_p": 0.9}, {"frequency_penalty": 0.5, "typical_p": 0.8}, {"presence_penalty": 1.0, "logprobs": 2},
                    {"logit_bias": {9: 2.0}, "top_k": 30}, {"min_tokens": 12, "logprobs": 0}]
        return [Request(p, SamplingParams(max_tokens=16, temperature=0.9, **s), seed + i) for i, (p, s) in enumerate(zip(PROMPTS, settings, strict=True))]

    alone = made(5)
    for r in alone:
        run(pair[1], [r], [2])
    assert len({tuple(r.output) for r in alone}) == 5
    for config in CONFIGS.values():
        together = made(5)
        run(pair[1], [*together, *made(70)], [2], **config)
        assert [r.output for r in together] == [r.output for r in alone]
        assert [len(r.logprobs) for r in together] == [0, 0, len(together[2].output), 0, len(together[4].output)]
        assert [len(top) for top in together[2].tops] == [2] * len(together[2].output)


def test_log_probabilities_of_a_sampled_request_are_those_at_its_temperature(pair):
    r = Request(PROMPTS[0], SamplingParams(max_tokens=12, temperature=0.6, repetition_penalty=1.5, logit_bias={4: 3.0}, top_k=5, logprobs=4), 3)
    run(pair[1], [r])
    with torch.no_grad():
        logp = (pair[0](torch.tensor([r.tokens])).logits[0, len(r.prompt) - 1 : -1] / 0.6).log_softmax(-1)
    torch.testing.assert_close(torch.tensor(r.logprobs), logp.gather(1, torch.tensor(r.output)[:, None])[:, 0], atol=1e-4, rtol=1e-4)
    assert [[t for t, _ in top] for top in r.tops] == logp.topk(4).indices.tolist()


def test_stop_tokens_end_and_stay(pair):
    free = Request(PROMPTS[2], SamplingParams(max_tokens=12))
    run(pair[1], [free])
    stop = free.output[5]
    r = Request(PROMPTS[2], SamplingParams(max_tokens=12, stop_token_ids=[stop], ignore_eos=True))
    run(pair[1], [r], [stop])
    assert r.output == free.output[: free.output.index(stop) + 1] and r.finish_reason == "stop"


def test_who_follows_waits_for_the_prompt_and_hits_it(pair):
    engine = Engine(pair[1], config=EngineConfig(cache_tokens=400, block=4, chunk=5))
    first = Request(PROMPTS[2], SamplingParams(max_tokens=6, temperature=1.0), 1)
    others = [Request(PROMPTS[2], SamplingParams(max_tokens=6, temperature=1.0), 2 + i) for i in range(3)]
    engine.add(first)
    for r in others:
        engine.add(r, behind=first)
    engine.cancel(others[2])
    while engine.busy:
        engine.step()
    assert [r.hit for r in (first, *others)] == [0, 8, 8, 0] and others[2].finish_reason == "cancelled"
    assert all(len(r.output) == 6 for r in (first, *others[:2])) and not engine.held
    engine.add(first := Request(PROMPTS[2], SamplingParams(max_tokens=6)))
    engine.add(orphan := Request(PROMPTS[2], SamplingParams(max_tokens=6)), behind=first)
    engine.cancel(first)  # before it has read its prompt: the other one must not wait for ever
    while engine.busy:
        engine.step()
    assert orphan.finish_reason == "length"


@pytest.mark.parametrize("params", [{"logit_bias": {VOCAB: 1.0}}, {"stop_token_ids": [VOCAB]}, {"stop": ("a",)}], ids=str)
def test_what_the_engine_cannot_do_is_refused(pair, params):
    engine = Engine(pair[1], config=EngineConfig(cache_tokens=100))
    with pytest.raises(BadInput):
        engine.add(Request([1, 2], SamplingParams(max_tokens=4, **params)))
    assert not engine.busy
