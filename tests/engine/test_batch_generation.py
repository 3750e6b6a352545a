"""Batched generation with a cache: against a loop without one, against transformers, and against itself in other batches."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tiny_decoders import SPEC, decoder

from pellucid.engine import LLM, Batch, Sample, SamplingParams, run_all
from pellucid.engine.decode import plain_step
from pellucid.errors import BadInput
from pellucid.nn import MLP, Attn, Layer, Rope
from pellucid.runtime import Choice

LENGTHS = (1, 2, 7, 7, 16, 31)


def prompts(seed=0, lengths=LENGTHS):
    rng = random.Random(seed)
    return [[rng.randrange(280) for _ in range(n)] for n in lengths]


def samples(params, seed=0, lengths=LENGTHS):
    params = params if isinstance(params, list) else [params] * len(lengths)
    return [Sample(ids, p, 100 + i) for i, (ids, p) in enumerate(zip(prompts(seed, lengths), params))]


def run(model, made, **how):
    run_all(model, made, how.pop("eos", []), **how)
    return made


def full_logits(model, s, count=None):
    """Logits that predict each generated token, from one forward pass without a cache. (T, V)"""
    ids = s.prompt + s.tokens[:-1]
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, len(s.prompt) - 1 :]


# --- against other implementations ------------------------------------------------------------------------------------


def layers(window=None, kv=2, qk_norm=True):
    return (Layer(Attn(4, kv, 8, Rope(8), qk_norm=qk_norm, window=window), MLP(64)),) * 2


SPECS = {
    "qwen3": SPEC,
    "tied": replace(SPEC, tied=True),
    "multi-head": replace(SPEC, layers=layers(kv=4, qk_norm=False)),
    "one kv head": replace(SPEC, layers=layers(kv=1)),
    "window": replace(SPEC, layers=(*layers(window=5)[:1], *layers()[:1])),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_cached_generation_is_the_uncached_argmax_loop(spec):
    model = decoder(spec, seed=1)
    made = run(model, samples(SamplingParams(max_tokens=20, logprobs=True)))
    for s in made:
        ids = list(s.prompt)
        for token, logprob in zip(s.tokens, s.logprobs):
            with torch.no_grad():
                logits = model(torch.tensor([ids]))[0, -1]
            assert token == int(logits.argmax())
            assert abs(logprob - float(logits.log_softmax(-1)[token])) < 1e-4
            ids.append(token)
        assert len(s.tokens) == 20 and s.finish_reason == "length"
        assert spec.tied or len(set(s.tokens)) > 2  # not a trivial loop


def hugging_face(kind):
    import transformers

    shape = dict(vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.25,
                 attn_implementation="eager", pad_token_id=None, bos_token_id=None, eos_token_id=None)
    config, model = {"qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
                     "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM)}[kind]
    torch.manual_seed(4)
    return model(config(**shape)).eval()


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_greedy_text_is_that_of_transformers(kind, tokenizer, tmp_path):
    """A folder saved by transformers, ragged prompts padded on the left, beside our own batch of the same prompts."""
    from transformers import AutoTokenizer

    theirs = hugging_face(kind)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    texts = ["hello", "12 + 30 =", "user\nhello worlds, hello world: what is 12 + 30 and 4 more?", "a", "澄明 😀"]
    cut = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    batch = cut(texts, return_tensors="pt", padding=True)
    llm = LLM(tmp_path)
    with torch.no_grad():
        out = theirs.generate(**batch, max_new_tokens=24, do_sample=False, eos_token_id=llm.tokenizer.eos_ids,
                              pad_token_id=llm.tokenizer.pad_id)
    mine = llm.generate(texts, SamplingParams(max_tokens=24))
    for text, row, request in zip(texts, out[:, batch["input_ids"].shape[1] :].tolist(), mine):
        (completion,) = request.outputs
        assert request.prompt_token_ids == cut(text)["input_ids"]
        assert completion.token_ids == row[: len(completion.token_ids)]
        assert all(t == llm.tokenizer.pad_id for t in row[len(completion.token_ids) :])
        assert len(completion.token_ids) == 24 or completion.finish_reason == "stop"
        assert completion.text == cut.decode([t for t in completion.token_ids if t not in llm.tokenizer.eos_ids])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7, 1.6])
def test_logprobs_are_the_log_softmax_of_a_full_forward(model, temperature):
    params = SamplingParams(max_tokens=16, temperature=temperature, top_k=20, min_p=0.01, logprobs=True)
    for s in run(model, samples(params)):
        logits = full_logits(model, s) / (temperature or 1.0)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(s.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(s.logprobs), expected, atol=1e-4, rtol=0)


# --- against itself ---------------------------------------------------------------------------------------------------

MIX = [
    SamplingParams(max_tokens=12, temperature=1.0, logprobs=True),
    SamplingParams(max_tokens=3, temperature=0.7, top_p=0.8, logprobs=True),
    SamplingParams(max_tokens=17, logprobs=True),
    SamplingParams(max_tokens=9, temperature=1.4, top_k=12, logprobs=True),
    SamplingParams(max_tokens=1, temperature=1.0, min_p=0.05, logprobs=True),
    SamplingParams(max_tokens=14, temperature=2.0, logprobs=True),
]


@pytest.fixture(scope="module")
def alone(model):
    """Each request in a batch of its own."""
    made = samples(MIX)
    for s in made:
        run(model, [s])
    return made


def same(made, wanted):
    for a, b in zip(made, wanted):
        assert (a.tokens, a.finish_reason) == (b.tokens, b.finish_reason)
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_batch", [1, 2, 4, 512])
def test_a_request_does_not_depend_on_the_batch_it_is_in(model, alone, max_batch):
    same(run(model, samples(MIX), max_batch=max_batch), alone)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.75, 1.0, 2.0])
def test_a_request_does_not_depend_on_shrinking(model, alone, share, monkeypatch):
    monkeypatch.setattr(Batch, "shrink_at", share)
    same(run(model, samples(MIX)), alone)


def test_a_request_does_not_depend_on_order_or_company(model, alone):
    for seed in (1, 2, 3):
        made = samples(MIX)
        company = samples(SamplingParams(max_tokens=20, temperature=1.0), seed=seed, lengths=(5, 40, 40, 2))
        mixed = made + company
        random.Random(seed).shuffle(mixed)
        batch = Batch(model, mixed, [])
        for _ in batch.run():
            pass
        same(made, alone)


@pytest.fixture
def plain(monkeypatch):
    """Every step goes through the model itself, so that what it is given can be watched."""
    monkeypatch.setattr("pellucid.engine.batch.choose_step", lambda model: Choice(plain_step(model), "watched"))


def test_shrinking_really_happens(model, monkeypatch, plain):
    """The rows that the model computes in each step fall as sequences end; never below those still going."""
    widths = []
    forward = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest, **how: widths.append(len(tokens)) or forward(tokens, *rest, **how))
    made = [Sample([i], SamplingParams(max_tokens=m), 0) for i, m in enumerate([2, 4, 4, 8, 8, 8, 8, 8])]
    steps = [len(fed) for fed in Batch(model, made, []).run()]
    assert steps == [8, 8, 7, 7, 5, 5, 5, 5]  # the sequences that received a token
    assert widths == [8, 8, 8, 8, 5, 5, 5, 5]  # 7 of 8 stay: not worth a copy; 5 of 8: copied together


def test_equal_prompts_are_prefilled_once(model, monkeypatch, plain):
    shapes = []
    forward = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest, **how: shapes.append(tuple(tokens.shape)) or forward(tokens, *rest, **how))
    a, b = [5, 6, 7], [9, 8]
    made = [Sample(p, SamplingParams(max_tokens=4, temperature=1.0), s) for s, p in enumerate([a, b, a, a, b])]
    run(model, made)
    assert shapes == [(2, 3)] + [(5, 1)] * 3
    for s in made:
        twin = Sample(s.prompt, s.params, s.seed)
        run(model, [twin])
        assert twin.tokens == s.tokens


def test_progress_counts_every_sequence_once(model):
    seen = []
    made = [Sample([i], SamplingParams(max_tokens=1 + i), 0) for i in range(7)]
    run(model, made, max_batch=3, progress=seen.append)
    assert seen == [3, 3, 1]


# --- ends -------------------------------------------------------------------------------------------------------------


def test_an_end_token_is_kept_as_the_last_and_ends_only_its_own_sequence(model):
    free = run(model, samples(SamplingParams(max_tokens=12, temperature=1.0, logprobs=True)))
    eos = free[2].tokens[4]
    ended = run(model, samples(SamplingParams(max_tokens=12, temperature=1.0, logprobs=True)), eos=[eos])
    for before, after in zip(free, ended):
        cut = before.tokens.index(eos) + 1 if eos in before.tokens else 12
        assert after.tokens == before.tokens[:cut]
        assert len(after.logprobs) == len(after.tokens)
        assert after.finish_reason == ("stop" if eos in before.tokens else "length")
    assert {s.finish_reason for s in ended} == {"stop", "length"}
    ignoring = run(model, samples(SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)), eos=[eos])
    assert [s.tokens for s in ignoring] == [s.tokens for s in free]


def test_an_end_token_in_the_last_place_is_a_stop_and_not_a_cut(model):
    (free,) = run(model, samples(SamplingParams(max_tokens=6, temperature=1.0), lengths=(4,)))
    eos = free.tokens[-1]
    assert eos not in free.tokens[:-1]
    (ended,) = run(model, samples(SamplingParams(max_tokens=6, temperature=1.0), lengths=(4,)), eos=[eos])
    assert (ended.tokens, ended.finish_reason) == (free.tokens, "stop")


def test_a_sequence_can_be_cancelled_on_the_way(model, alone):
    made = samples(MIX)
    for number, fed in enumerate(Batch(model, made, []).run()):
        if number == 4:
            made[0].finish_reason = "cancelled"
        assert number <= 4 or made[0] not in fed
    assert len(made[0].tokens) == 5 and made[0].tokens == alone[0].tokens[:5]
    same(made[1:], alone[1:])


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, most", [(0, 4), (96, 1), (200, 1), (90, 7), (1, 96)])
def test_what_cannot_fit_is_refused_before_any_work(model, length, most, monkeypatch):
    def no_work(*args, **how):
        raise AssertionError("work was done")

    monkeypatch.setattr(model, "hidden", no_work)
    fine = Sample([1], SamplingParams(max_tokens=4), 0)
    with pytest.raises(BadInput):
        run(model, [fine, Sample([1] * length, SamplingParams(max_tokens=most), 0)], max_batch=1)


def test_the_context_may_be_filled_to_its_last_token(model):
    (s,) = run(model, [Sample([1] * 90, SamplingParams(max_tokens=6), 0)])
    assert len(s.tokens) == 6
    run(model, [])  # nothing to do is fine
