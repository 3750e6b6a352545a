"""A sample whose logits are no numbers breaks off alone: the request's other samples are answered, whole and streamed."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from served_models import poisoned_llm
from test_openai_client import ASK, client_of

from pellucid.engine import LLM, SamplingParams
from pellucid.engine.job import best_first, per_token
from pellucid.engine.request import Request
from pellucid.server import running_server

post = functools.partial(httpx.post, timeout=60)  # kernels may have to be compiled first


@pytest.fixture(scope="module")
def poisoned() -> tuple[LLM, int]:
    return poisoned_llm()


@pytest.fixture(scope="module")
def client(poisoned: tuple[LLM, int]) -> Iterator[openai.OpenAI]:
    with running_server(poisoned[0], "actor") as url:
        yield client_of(url)


@pytest.fixture(scope="module")
def drawn(poisoned: tuple[LLM, int]) -> dict[str, Any]:
    """What asks for four samples of which some draw the poison and some do not."""
    llm, poison = poisoned
    for seed in range(50):
        params = SamplingParams(max_tokens=12, temperature=1.0, seed=seed, n=4, logit_bias={poison: 4.0}, ignore_eos=True)
        lost = [o.finish_reason == "error" for o in llm.generate([llm.chat_ids(ASK)], params)[0].outputs]
        if lost[0] and lost.count(True) == 2:
            return {"model": "actor", "max_tokens": 12, "seed": seed, "n": 4, "logit_bias": {str(poison): 4}, "extra_body": {"ignore_eos": True}}
    raise AssertionError("no seed does it")


def test_the_other_choices_are_answered(client: openai.OpenAI, poisoned: tuple[LLM, int], drawn: dict[str, Any]):
    llm, poison = poisoned
    want = llm.generate([llm.chat_ids(ASK)], SamplingParams(max_tokens=12, temperature=1.0, seed=drawn["seed"], n=4, logit_bias={poison: 4.0}, ignore_eos=True))[0]
    answer = client.chat.completions.create(messages=ASK, logprobs=True, **drawn)
    assert [c.finish_reason for c in answer.choices] == [o.finish_reason for o in want.outputs] and {"error", "length"} == {c.finish_reason for c in answer.choices}
    for choice, output in zip(answer.choices, want.outputs):
        assert len(choice.logprobs.content if choice.logprobs else []) == len(output.token_ids)
        told = (choice.model_extra or {}).get("error")
        assert (told is not None) == (choice.finish_reason == "error")
        if told:
            assert told["code"] == "not_numbers" and "not numbers" in told["message"] and set(told) == {"message", "type", "param", "code"}
    assert answer.usage and answer.usage.completion_tokens == sum(len(o.token_ids) for o in want.outputs)
    texts, reasons = [""] * 4, [""] * 4
    for chunk in client.chat.completions.create(messages=ASK, stream=True, **drawn):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] += choice.finish_reason or ""
        assert ("error" in (choice.model_extra or {})) == (choice.finish_reason == "error")
    assert texts == [c.message.content for c in answer.choices] and reasons == [c.finish_reason for c in answer.choices]


def test_the_best_are_those_that_did_not_break_off(client: openai.OpenAI, drawn: dict[str, Any], poisoned: tuple[LLM, int]):
    llm, poison = poisoned
    ids = llm.chat_ids(ASK)
    asked = {**drawn, "prompt": ids}
    best = client.completions.create(**asked | {"n": 3, "best_of": 4})
    assert [c.finish_reason for c in best.choices] == ["length", "length", "error"]
    two = client.completions.create(**asked | {"n": 2, "best_of": 4})
    assert [c.text for c in two.choices] == [c.text for c in best.choices[:2]]
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=drawn["seed"], n=2, best_of=4, logit_bias={poison: 4.0}, ignore_eos=True)
    assert [o.text for o in llm.generate([ids], params)[0].outputs] == [c.text for c in two.choices]


def test_one_prompt_of_several(client: openai.OpenAI, poisoned: tuple[LLM, int]):
    asked: dict[str, Any] = {"model": "actor", "prompt": ["one", "a~b", "two"], "temperature": 0, "max_tokens": 5, "logit_bias": {str(poisoned[1]): -100},
                             "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**asked)
    assert [c.finish_reason for c in whole.choices] == ["length", "error", "length"] and whole.choices[1].text == ""
    assert all(c.text == client.completions.create(**asked | {"prompt": p}).choices[0].text for c, p in zip(whole.choices, ("one", None, "two")) if p)
    parts = [c for chunk in client.completions.create(stream=True, **asked) for c in chunk.choices]
    for choice in whole.choices:
        mine = [c for c in parts if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text and mine[-1].finish_reason == choice.finish_reason
    assert [c.index for c in parts if "error" in (c.model_extra or {})] == [1]


def test_where_nothing_is_left_the_request_has_failed(client: openai.OpenAI, poisoned: tuple[LLM, int]):
    asked: dict[str, Any] = {"model": "actor", "max_tokens": 5, "n": 3, "logit_bias": {str(poisoned[1]): 100}}
    with pytest.raises(openai.InternalServerError, match="not numbers"):
        client.chat.completions.create(messages=ASK, **asked)
    with pytest.raises(openai.APIError, match="not numbers"):
        list(client.chat.completions.create(messages=ASK, stream=True, **asked))
    text = post(f"{client.base_url}chat/completions", json={"messages": ASK, "stream": True, **asked}).text
    assert "[DONE]" not in text and json.loads(text.strip().split("data: ")[-1])["error"]["code"] == "not_numbers"


def test_an_answer_of_no_tokens_is_not_the_best():
    good, lost = (Request([1], SamplingParams(), finish_reason=reason) for reason in ("stop", "error"))
    good.logprobs = [-3.0]
    assert per_token(lost) > per_token(good) and sorted([lost, good], key=best_first) == [good, lost]
