"""Answers of a given form: what a model with random weights writes always fits, read by independent parsers."""

from __future__ import annotations

import json
import re
import sys

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_decoders import SPEC, decoder

from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.params import SamplingParams, StructuredOutput
from pellucid.engine.request import Request
from pellucid.engine.structured import forbid
from pellucid.errors import BadInput
from pellucid.tokenizers import patterns, train_bpe

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def words():
    """Tokens of several characters that cross what JSON keeps apart."""
    texts = ['{"name": "Ada", "age": 36, "tags": ["a", "b"], "ok": true}, {"name": null, "x": -1.5e3}], "more": false} 12 + 30 = 42 hello world'] * 4
    return train_bpe(texts, 312, patterns.QWEN_PATTERN)


@pytest.fixture(scope="module")
def model(words):
    from dataclasses import replace

    return decoder(replace(SPEC, vocab=words.vocab_size + 12, context=2048), seed=2)  # a head wider than the vocabulary, as many have


@pytest.fixture(scope="module")
def engine(model, words):
    """One for all tests: what one answer leaves must not matter to the next."""
    return Engine(model, words.eos_ids, EngineConfig(cache_tokens=4000, block=4), words)


def answers(engine, words, *wanted: StructuredOutput, seed: int = 0, most: int = 300, temperature: float = 1.0, **params):
    requests = [Request([3, 4 + i, 5], SamplingParams(max_tokens=most, temperature=temperature, structured=w, **params), seed + i) for i, w in enumerate(wanted)]
    for r in requests:
        engine.add(r)
    while engine.busy:
        engine.step()
    return [(words.decode([t for t in r.output if t not in words.eos_ids]), r) for r in requests]


# --- always fits ------------------------------------------------------------------------------------------------------

FORMS = [
    ({"regex": r"[a-z]{3,5}-[0-9]{2}(\.[0-9]{1,3})?"}, lambda text: re.fullmatch(r"[a-z]{3,5}-[0-9]{2}(\.[0-9]{1,3})?", text)),
    ({"regex": "(澄明|😀){1,4}"}, lambda text: re.fullmatch("(澄明|😀){1,4}", text)),  # tokens end inside characters
    ({"choice": ["yes", "no", 'perhaps "so"\n', "不"]}, lambda text: text in ("yes", "no", 'perhaps "so"\n', "不")),
    ({"grammar": 'start: NUMBER (" + " NUMBER)* " = ?"\nNUMBER: /[1-9][0-9]?/'}, lambda text: re.fullmatch(r"[1-9][0-9]?( \+ [1-9][0-9]?)* = \?", text)),
    ({"grammar": 'root ::= "(" root ")" | [a-c]'}, lambda text: text.count("(") == text.count(")") and re.fullmatch(r"\(*[a-c]\)*", text)),
    ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
]


@pytest.mark.parametrize("number", range(len(FORMS)))
@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_forms(engine, words, number, temperature):
    form, fits = FORMS[number]
    for seed in range(0, 12, 4) if temperature else [0]:
        for text, r in answers(engine, words, *[StructuredOutput(**form)] * 4, seed=seed, temperature=temperature):
            assert r.finish_reason in ("stop", "length")
            if r.finish_reason == "stop":
                assert fits(text), text
    if number < 3:
        assert all(r.finish_reason == "stop" for _, r in answers(engine, words, *[StructuredOutput(**form)] * 3, temperature=temperature))


names = st.text("abcdefgh_ é\"\\澄", min_size=1, max_size=6)
scalars = st.one_of(
    st.fixed_dictionaries({"type": st.just("string"), "maxLength": st.integers(0, 6)}), st.just({"type": "boolean"}), st.just({"type": "null"}),
    st.integers(-50, 50).flatmap(lambda low: st.fixed_dictionaries({"type": st.just("integer"), "minimum": st.just(low), "maximum": st.integers(low, low + 999)})),
    st.fixed_dictionaries({"type": st.just("number"), "minimum": st.just(-1), "maximum": st.just(99)}), st.fixed_dictionaries({"const": names}),
    st.fixed_dictionaries({"enum": st.lists(st.one_of(names, st.integers(-9, 9), st.none(), st.booleans()), min_size=1, max_size=4)}),
    st.just({"type": "string", "pattern": "^[A-Z][a-z]{1,3}$"}), st.just({"type": "string", "format": "date"}))


def compound(inner):
    fields = st.dictionaries(names, inner, max_size=3)
    return st.one_of(
        fields.flatmap(lambda p: st.fixed_dictionaries({
            "type": st.just("object"), "properties": st.just(p), "additionalProperties": st.just(False),
            "required": st.lists(st.sampled_from(sorted(p)), unique=True) if p else st.just([])})),
        st.fixed_dictionaries({"type": st.just("array"), "items": inner, "minItems": st.integers(0, 2), "maxItems": st.integers(2, 3)}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)}))


schemas = st.recursive(scalars, compound, max_leaves=6)


@given(schema=schemas, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_random_schemas(engine, words, schema, seed):
    for text, r in answers(engine, words, *[StructuredOutput(json_schema=schema)] * 2, seed=seed):
        if r.finish_reason == "stop":
            jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(text))
        else:
            assert r.finish_reason == "length" and len(r.output) == 300


def test_white_space_as_people_write_it_and_no_more(engine, words):
    form = StructuredOutput(json_object=True)
    value = {"a": [1, {"b": None}], "c": {}}
    for text, fits in ((json.dumps(value), True), (json.dumps(value, indent=4), True), (json.dumps(value, separators=(",", ":")), True), ('{"a":' + " " * 9 + "1}", False)):
        constraint = engine.grammars.constraint(form, [1])
        assert all(constraint.accept(t) for t in words.encode(text)) == fits
        assert not fits or constraint.matcher.is_accepting()


# --- beside the rest of the engine ------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
          "required": ["name", "age"], "additionalProperties": False}
CONFIGS = {"plain": {"prefix": "none"}, "chunks of 1": {"chunk": 1}, "chunks of 7": {"chunk": 7, "budget": 9}, "pressure": {"cache_tokens": 100},
           "swap": {"cache_tokens": 100, "swap": True}, "speculation": {"drafts": 4}, "speculation under pressure": {"drafts": 4, "cache_tokens": 100, "budget": 7}}


@pytest.fixture(scope="module")
def free(model, words):
    """What a request without a form writes, alone."""
    r = Request([3, 4, 5], SamplingParams(max_tokens=30, temperature=1.0), 9)
    engine = Engine(model, config=EngineConfig(cache_tokens=100), tokenizer=words)
    engine.add(r)
    while engine.busy:
        engine.step()
    return r.output


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_schedules_and_speculation_change_nothing(model, words, temperature, free):
    found, accepted = {}, 0
    for name, config in CONFIGS.items():
        engine = Engine(model, words.eos_ids, EngineConfig(**{"cache_tokens": 2000, "block": 4, **config}), words)
        other = Request([3, 4, 5], SamplingParams(max_tokens=30, temperature=1.0, ignore_eos=True), 9)
        engine.add(other)
        wanted = [StructuredOutput(json_schema=SCHEMA), StructuredOutput(regex="(ab){20}"), StructuredOutput(json_schema=SCHEMA)]
        found[name] = answers(engine, words, *wanted, temperature=temperature, most=64, repetition_penalty=1.1, seed=3)
        assert other.output == free
        accepted += engine.totals["accepted_tokens"]
        for text, r in found[name]:
            assert r.finish_reason == "stop" and (text == "ab" * 20 or jsonschema.validate(json.loads(text), SCHEMA) is None)
    assert len({tuple(text for text, _ in pairs) for pairs in found.values()}) == 1
    assert accepted > 0  # among them drafts of the form "abab"


def test_a_thought_is_free_and_the_answer_behind_it_is_not(model, words):
    open_, close = words.encode("<think>")[0], words.encode("</think>")[0]
    form = StructuredOutput(regex="[0-9]{3}", thinking=True)
    for prompt, begins in (([3, open_, 10], True), ([3, 4], False)):
        for seed in range(6):
            for drafts in (0, 3):
                engine = Engine(model, words.eos_ids, EngineConfig(cache_tokens=900, block=4, drafts=drafts), words)
                # the end of the thought made likely, so that it comes; without an open thought also its beginning
                r = Request(prompt, SamplingParams(max_tokens=250, temperature=1.0, structured=form, logit_bias={close: 5.0, open_: 9.0 if seed % 2 else -9.0}), seed)
                engine.add(r)
                while engine.busy:
                    engine.step()
                text = words.decode([t for t in r.output if t not in words.eos_ids])
                assert r.finish_reason == "stop"
                thinks = begins or seed % 2 == 1
                assert (close in r.output) == thinks
                assert re.fullmatch("[0-9]{3}", text.partition("</think>")[2] if thinks else text), text
                assert not thinks or begins or r.output[0] == open_


def test_early_ends_give_way_to_a_complete_form(engine, words):
    ((text, r),) = answers(engine, words, StructuredOutput(choice=["a"]), min_tokens=5)
    assert (text, r.finish_reason) == ("a", "stop")
    ((text, r),) = answers(engine, words, StructuredOutput(regex="x*"), min_tokens=9, most=40)
    assert text.count("x") == len(text) >= 9
    ((text, r),) = answers(engine, words, StructuredOutput(regex="[ab]{6}"), ignore_eos=True)
    assert re.fullmatch("[ab]{6}", text) and r.finish_reason == "stop"


def test_the_mask_as_bits():
    g = torch.Generator().manual_seed(0)
    logits, bits = torch.randn(3, 77, generator=g), torch.rand(3, 96, generator=g) < 0.5
    masks = torch.tensor([[sum(int(bits[b, 32 * w + i]) << i for i in range(32)) for w in range(3)] for b in range(3)], dtype=torch.int64).to(torch.int32)
    assert torch.equal(forbid(logits, masks), torch.where(bits[:, :77], logits, -torch.inf))


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [
    {}, {"regex": "a", "choice": ["b"]}, {"choice": ["a", ""]}, {"regex": "("}, {"json_schema": "{"}, {"json_schema": {"type": "nope"}},
    {"json_schema": {"not": {"type": "string"}}}, {"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}}, {"json_schema": False},
    {"grammar": "start: other"}, {"json_schema": {"$ref": "https://example.org/schema.json"}}], ids=str)
def test_what_is_no_form_is_refused_before_work_begins(engine, wrong):
    with pytest.raises(BadInput):
        engine.add(Request([1], SamplingParams(max_tokens=4, structured=StructuredOutput(**wrong))))
    assert not engine.busy


def test_without_a_tokenizer_or_the_library(model, words, monkeypatch):
    request = Request([1], SamplingParams(max_tokens=4, structured=StructuredOutput(regex="a")))
    with pytest.raises(BadInput, match="tokenizer"):
        Engine(model, words.eos_ids, EngineConfig(cache_tokens=64)).add(request)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BadInput, match="llguidance"):
        Engine(model, words.eos_ids, EngineConfig(cache_tokens=64), words).add(request)
