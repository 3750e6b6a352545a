"""Fields of vLLM's server beside OpenAI's: why an answer stopped, its tokens, one call at a time, other addresses."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from served_models import Actor, random_llm
from test_openai_client import ASK, CALL, TOOLS, client_of

import pellucid
from pellucid.engine import LLM, SamplingParams
from pellucid.server import running_server
from pellucid.server.formats import FORMATS
from pellucid.server.parser import AnswerParser
from pellucid.server.reader import OneCall

post = functools.partial(httpx.post, timeout=60)  # kernels may have to be compiled first


@pytest.fixture(scope="module")
def llm() -> LLM:
    return random_llm()


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    with running_server(llm, "tiny", api_key=None) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


@pytest.fixture(scope="module")
def actor() -> Actor:
    return Actor()


@pytest.fixture(scope="module")
def stage(actor: Actor) -> Iterator[openai.OpenAI]:
    with running_server(actor.llm, "actor") as url:
        yield client_of(url)


def extra(thing: Any, name: str) -> Any:
    return (thing.model_extra or {}).get(name)


# --- why it stopped ---------------------------------------------------------------------------------------------------------


def test_which_text_or_token_ended_it(stage: openai.OpenAI, actor: Actor):
    token = actor.tokenizer.encode(" seven")[0]
    for more, text, reason, by in (({"stop": ["eight", "four five"]}, "one two three ", "stop", "four five"), ({}, "one two three four five", "stop", None),
                                   ({"max_tokens": 2}, None, "length", None), ({"extra_body": {"stop_token_ids": [token]}}, "six", "stop", token)):
        for stream in (False, True):
            actor.say("six seven" if by == token else "one two three four five")
            if stream:
                parts = [c.choices[0] for c in stage.chat.completions.create(model="actor", messages=ASK, stream=True, **more)]
                said, last = "".join(p.delta.content or "" for p in parts), parts[-1]
                assert all(extra(p, "stop_reason") is None for p in parts[:-1])
            else:
                last = stage.chat.completions.create(model="actor", messages=ASK, **more).choices[0]
                said = last.message.content
            assert (last.finish_reason, extra(last, "stop_reason")) == (reason, by) and (text is None or said == text)
        actor.say("six seven" if by == token else "one two three four five")
        plain = stage.completions.create(model="actor", prompt="one", **{"max_tokens": 30, **more}).choices[0]
        assert (plain.finish_reason, extra(plain, "stop_reason")) == (reason, by)


def test_the_stop_text_can_be_part_of_the_answer(stage: openai.OpenAI, actor: Actor):
    for stream in (False, True):
        actor.say("one two three four")
        asked: dict[str, Any] = {"model": "actor", "prompt": "one", "stop": ["wo thr", "three"], "max_tokens": 30, "extra_body": {"include_stop_str_in_output": True}}
        found = stage.completions.create(stream=stream, **asked)
        assert "".join(c.choices[0].text for c in (found if stream else [found])) == "one two thr"


def test_control_tokens_can_be_shown(stage: openai.OpenAI, actor: Actor):
    special = next(t for t in actor.tokenizer.special if t not in FORMATS["hermes"].markers and actor.tokenizer.special[t] not in actor.tokenizer.eos_ids)
    for bare in (True, False):
        actor.say("one")
        actor.model.script += [actor.tokenizer.special[special], *actor.tokenizer.encode(" two")]
        answer = stage.completions.create(model="actor", prompt="one", max_tokens=30, extra_body={"skip_special_tokens": not bare})
        assert answer.choices[0].text == (f"one{special} two" if bare else "one two")


# --- tokens -----------------------------------------------------------------------------------------------------------------


def test_the_tokens_of_prompt_and_answer(client: openai.OpenAI, llm: LLM):
    ids, asked = llm.chat_ids(ASK), {"return_token_ids": True}
    want = [o.token_ids for o in llm.generate([ids], SamplingParams(max_tokens=9, temperature=1.0, seed=1, n=3))[0].outputs]
    whole = client.chat.completions.create(model="tiny", messages=ASK, seed=1, n=3, max_tokens=9, extra_body=asked)
    assert extra(whole, "prompt_token_ids") == ids and [extra(c, "token_ids") for c in whole.choices] == want
    found: list[list[int]] = [[], [], []]
    prompts = []
    for chunk in client.chat.completions.create(model="tiny", messages=ASK, seed=1, n=3, max_tokens=9, extra_body=asked, stream=True):
        prompts.append(extra(chunk, "prompt_token_ids"))
        for c in chunk.choices:
            found[c.index] += extra(c, "token_ids") or []
    assert found == want and prompts[0] == ids and not any(prompts[1:])
    texts = client.completions.create(model="tiny", prompt=["one", "two"], seed=1, max_tokens=9, extra_body=asked)
    assert [extra(c, "prompt_token_ids") for c in texts.choices] == [llm.prompt_ids("one"), llm.prompt_ids("two")]
    streamed: dict[int, list[int]] = {0: [], 1: []}
    for chunk in client.completions.create(model="tiny", prompt=["one", "two"], seed=1, max_tokens=9, extra_body=asked, stream=True):
        (c,) = chunk.choices
        assert (extra(c, "prompt_token_ids") is not None) == (not streamed[c.index])
        streamed[c.index] += extra(c, "token_ids")
    assert [streamed[i] for i in (0, 1)] == [extra(c, "token_ids") for c in texts.choices]
    assert "token_ids" not in client.chat.completions.create(model="tiny", messages=ASK, max_tokens=2).choices[0].model_dump()


def test_long_prompts_can_be_cut_at_their_beginning(client: openai.OpenAI, llm: LLM):
    text = "one two three four " * 100
    ids = llm.prompt_ids(text)
    assert len(ids) > llm.context
    for most, left in ((5, 5), (-1, llm.context - 16), (10**9, None), (0, None), (-2, None)):
        asked: dict[str, Any] = {"model": "tiny", "prompt": text, "temperature": 0, "extra_body": {"truncate_prompt_tokens": most, "return_token_ids": True, "ignore_eos": True}}
        if left is None:
            with pytest.raises(openai.BadRequestError):
                client.completions.create(**asked)
            continue
        choice = client.completions.create(**asked).choices[0]
        assert extra(choice, "prompt_token_ids") == ids[-left:]
        assert choice.text == llm.generate([ids[-left:]], SamplingParams(max_tokens=16, ignore_eos=True))[0].outputs[0].text
    chat = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], max_tokens=7, extra_body={"truncate_prompt_tokens": -1})
    assert chat.usage and chat.usage.prompt_tokens == llm.context - 7


def test_the_end_token_is_one_of_them(stage: openai.OpenAI, actor: Actor):
    for stream in (False, True):
        actor.say("one two")
        found = stage.chat.completions.create(model="actor", messages=ASK, stream=stream, extra_body={"return_token_ids": True})
        tokens = [t for chunk in found for t in extra(chunk.choices[0], "token_ids") or []] if stream else extra(found.choices[0], "token_ids")
        assert tokens == [*actor.tokenizer.encode("one two"), actor.model.end]


# --- one call at a time -----------------------------------------------------------------------------------------------------


def test_one_call_where_no_more_may_be_made(stage: openai.OpenAI, actor: Actor):
    """parallel_tool_calls false: the answer ends behind the first call, whole and streamed; else all of them are told."""
    other = CALL.replace("1+2", "3+4")
    for parallel, count in ((False, 1), (True, 2), (None, 2)):
        more = {} if parallel is None else {"parallel_tool_calls": parallel}
        actor.say(f"so:\n{CALL}\n{other}")
        answer = stage.chat.completions.create(model="actor", messages=ASK, tools=TOOLS, **more)
        (choice,) = answer.choices
        assert choice.message.content == "so:" and choice.finish_reason == "tool_calls" and len(choice.message.tool_calls) == count
        assert choice.message.tool_calls[0].function.arguments == '{"expression": "1+2"}'
        assert parallel is not False or (answer.usage and answer.usage.completion_tokens <= len(actor.tokenizer.encode(f"so:\n{CALL}"))), "it wrote no further"
        actor.say(f"so:\n{CALL}\n{other}")
        with stage.chat.completions.stream(model="actor", messages=ASK, tools=TOOLS, **more) as stream:
            told = stream.get_final_completion().choices[0]
        assert told.finish_reason == "tool_calls" and [c.function.arguments for c in told.message.tool_calls] == [c.function.arguments for c in choice.message.tool_calls]
    actor.say(f"{CALL}\n{other}")
    made = stage.responses.create(model="actor", input="1+2", parallel_tool_calls=False, tools=[{"type": "function", "strict": False, **TOOLS[0]["function"]}])
    assert [item.type for item in made.output] == ["function_call"]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("form, text", [
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'), ("pythonic", "<|python_start|>[f(a=1), g()]<|python_end|>"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call> and <tool_call>{"name": "g", "arguments": {}}</tool_call>')])
def test_the_first_call_of_a_block_and_one_that_gets_lost(form: str, text: str, live: bool):
    schemas = {name: {"type": "object", "properties": {}} for name in "fg"}

    def read(text: str) -> list[Any]:
        parser = OneCall(AnswerParser(form=FORMATS[form], schemas=schemas, live=live))
        pieces = [piece for c in text if not parser.stopped for piece in parser.feed(c)]
        return pieces + ([] if parser.stopped else parser.finish())

    pieces = read(text)
    assert {p.name for p in pieces} == {"f"} and pieces[-1].part == ("end" if live else "whole") and pieces[-1].text.replace(" ", "") == '{"a":1}'
    assert [p.part for p in pieces].count("begin") == live
    if form == "mistral":
        broken = read(text[:-3] + "?")
        assert "".join(p.text for p in broken if p.kind == "content") == text[:-3] + "?"
        assert [p.part for p in broken if p.kind == "tool_call" and p.part != "more"] == (["begin", "lost"] if live else [])


# --- other names ------------------------------------------------------------------------------------------------------------


def test_thoughts_by_both_names(stage: openai.OpenAI, actor: Actor):
    actor.say("<think>\none and two\n</think>\n\nthree")
    message = stage.chat.completions.create(model="actor", messages=ASK).choices[0].message
    assert extra(message, "reasoning") == extra(message, "reasoning_content") == "one and two"
    actor.say("<think>\none and two\n</think>\n\nthree")
    parts = [c.choices[0].delta for c in stage.chat.completions.create(model="actor", messages=ASK, stream=True)]
    assert "".join(extra(p, "reasoning") or "" for p in parts) == "".join(extra(p, "reasoning_content") or "" for p in parts) == "one and two"
    turns = [[*ASK, {"role": "assistant", "content": "three", name: "one and two"}] for name in ("reasoning", "reasoning_content")]
    first, second = (post(f"{str(stage.base_url).removesuffix('v1/')}tokenize", json={"messages": turn}).json()["tokens"] for turn in turns)
    assert first == second


def test_other_addresses(url: str):
    assert httpx.get(f"{url}/version").json() == {"version": pellucid.__version__}
    assert httpx.get(f"{url}/ping").json() == httpx.get(f"{url}/health").json()
    rank = {"model": "tiny", "query": "one", "documents": ["two", "three"]}
    assert len({str(post(url + path, json=rank).json()["results"]) for path in ("/rerank", "/v1/rerank", "/v2/rerank")}) == 1
    pair = {"model": "tiny", "text_1": "one", "text_2": "two"}
    assert post(f"{url}/score", json=pair).json()["data"] == post(f"{url}/v1/score", json=pair).json()["data"]


def test_more_stop_texts_than_openai_takes(client: openai.OpenAI):
    assert client.completions.create(model="tiny", prompt="one", max_tokens=2, stop=[f"#{i}" for i in range(16)]).choices
    with pytest.raises(openai.BadRequestError, match="at most 16"):
        client.completions.create(model="tiny", prompt="one", max_tokens=2, stop=[f"#{i}" for i in range(17)])
