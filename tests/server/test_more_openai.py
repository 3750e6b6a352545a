"""The rest of OpenAI's protocol through the real `openai` client: responses, log-probabilities, structured output, forced tools, vectors."""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import numpy as np
import openai
import pydantic
import pytest
import torch
from served_models import Actor, random_llm
from test_openai_client import ASK, CALL, TOOLS, client_of

from pellucid.engine import LLM, SamplingParams
from pellucid.server import running_server
from pellucid.server.protocol import forced_schema


@pytest.fixture(scope="module")
def llm() -> LLM:
    return random_llm(2048)


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    with running_server({"tiny": llm, "other": random_llm()}) as url:
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


# --- sampling -----------------------------------------------------------------------------------------------------------


def test_logprobs_are_the_models(client: openai.OpenAI, llm: LLM):
    answer = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    ids = llm.chat_ids(ASK)
    tokens = llm.generate([ids], SamplingParams(max_tokens=6))[0].outputs[0].token_ids
    with torch.inference_mode():
        expected = llm.model(torch.tensor([ids + tokens]))[0, len(ids) - 1 : -1].log_softmax(-1)
    assert len(content) == 6
    for entry, row, token in zip(content, expected, tokens):
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-3)
        assert bytes(entry.bytes) == llm.tokenizer.token_bytes(token) and entry.token == bytes(entry.bytes).decode("utf-8", "replace")
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    streamed = [c.choices[0].logprobs.content for c in client.chat.completions.create(
        model="tiny", messages=ASK, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3, stream=True) if c.choices[0].logprobs]
    assert [e.logprob for part in streamed for e in part] == [e.logprob for e in content], "each token is told once"


def test_echo_and_the_prompts_logprobs(client: openai.OpenAI, llm: LLM):
    answer = client.completions.create(model="tiny", prompt="one two three", temperature=0, max_tokens=3, echo=True, logprobs=2)
    ids = llm.tokenizer.encode("one two three")
    told = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith("one two three") and len(told.tokens) == len(ids) + 3
    with torch.inference_mode():
        expected = llm.model(torch.tensor([ids]))[0].log_softmax(-1)
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[1 : len(ids)] == pytest.approx([expected[i, ids[i + 1]].item() for i in range(len(ids) - 1)], abs=1e-3)
    assert "".join(told.tokens[: len(ids)]) == "one two three" and told.text_offset[1] == len(told.tokens[0])
    scored = client.completions.create(model="tiny", prompt="one two three", max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == "one two three" and len(scored.choices[0].logprobs.tokens) == len(ids)
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(told.token_logprobs[1 : len(ids)], abs=1e-4)
    streamed = list(client.completions.create(model="tiny", prompt="one two three", temperature=0, max_tokens=3, echo=True, logprobs=2, stream=True))
    assert "".join(c.choices[0].text for c in streamed) == answer.choices[0].text
    assert [t for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens] == told.tokens
    own = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=1, extra_body={"prompt_logprobs": 1}).model_extra["prompt_logprobs"]
    assert own[0] is None and len(own) == len(llm.chat_ids(ASK)) and all("decoded_token" in v for row in own[1:] for v in row.values())


def test_the_best_of_several(client: openai.OpenAI):
    every = client.completions.create(model="tiny", prompt="one two", seed=1, max_tokens=8, n=5, logprobs=0)
    scores = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in every.choices]
    best = client.completions.create(model="tiny", prompt="one two", seed=1, max_tokens=8, best_of=5, n=2)
    order = sorted(range(5), key=lambda i: -scores[i])
    assert [c.text for c in best.choices] == [every.choices[i].text for i in order[:2]] and [c.index for c in best.choices] == [0, 1]
    assert best.usage.completion_tokens == every.usage.completion_tokens and best.choices[0].logprobs is None


def test_bias_penalties_and_stop_tokens(client: openai.OpenAI, llm: LLM):
    token = llm.tokenizer.encode(" fox")[0]
    word = llm.tokenizer.decode([token])
    answer = client.completions.create(model="tiny", prompt="one", temperature=0, max_tokens=5, logit_bias={str(token): 100})
    assert answer.choices[0].text == word * 5
    answer = client.completions.create(model="tiny", prompt="one", temperature=0, max_tokens=5, logit_bias={str(token): 100}, extra_body={"stop_token_ids": [token]})
    assert answer.choices[0].text == "" and answer.choices[0].finish_reason == "stop"
    answer = client.completions.create(model="tiny", prompt="one", temperature=0, max_tokens=9, logit_bias={str(token): 20}, stop=word, extra_body={"min_tokens": 4})
    assert answer.usage.completion_tokens >= 4
    plain = client.completions.create(model="tiny", prompt="one", temperature=0, max_tokens=40)
    fresh = client.completions.create(model="tiny", prompt="one", temperature=0, max_tokens=40, frequency_penalty=2, presence_penalty=2)
    assert plain.choices[0].text != fresh.choices[0].text


def test_streams_of_several_choices_and_prompts(client: openai.OpenAI):
    whole = client.chat.completions.create(model="tiny", messages=ASK, n=3, seed=4, max_tokens=9)
    texts = [""] * 3
    for chunk in client.chat.completions.create(model="tiny", messages=ASK, n=3, seed=4, max_tokens=9, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [c.message.content for c in whole.choices]
    asked = dict(model="tiny", messages=ASK, seed=4, max_tokens=20, logprobs=True, top_logprobs=1, n=2)
    told: list[list[Any]] = [[], []]
    for chunk in client.chat.completions.create(**asked, stream=True):
        told[chunk.choices[0].index] += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert told == [c.logprobs.content for c in client.chat.completions.create(**asked).choices], "each once"
    whole = client.completions.create(model="tiny", prompt=["one", "two"], seed=4, max_tokens=9)
    texts = [""] * 2
    for chunk in client.completions.create(model="tiny", prompt=["one", "two"], seed=4, max_tokens=9, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in whole.choices]
    offsets = [o for chunk in client.completions.create(model="tiny", prompt="one", seed=4, max_tokens=9, logprobs=0, stream=True, echo=True)
               for o in (chunk.choices[0].logprobs.text_offset if chunk.choices[0].logprobs else [])]
    plain = client.completions.create(model="tiny", prompt="one", seed=4, max_tokens=9, logprobs=0, echo=True).choices[0].logprobs
    assert offsets == plain.text_offset and len(set(offsets)) > 5


# --- structured output --------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "ok": {"type": "boolean"}}, "required": ["n", "ok"],
          "additionalProperties": False}


PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}  # a random model's thoughts have no end


class Answer(pydantic.BaseModel):
    n: int
    ok: bool


def test_answers_of_a_form(client: openai.OpenAI):
    for seed in range(3):
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
        answer = client.chat.completions.create(model="tiny", messages=ASK, seed=seed, max_tokens=150, response_format=form, extra_body=PLAIN)
        jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)
        assert answer.choices[0].finish_reason == "stop"
    parsed = client.chat.completions.parse(model="tiny", messages=ASK, seed=1, max_tokens=150, response_format=Answer, extra_body=PLAIN)
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    some = client.chat.completions.create(model="tiny", messages=ASK, seed=1, max_tokens=60, response_format={"type": "json_object"}, extra_body=PLAIN)
    assert some.choices[0].message.content.lstrip().startswith("{")
    for form, fits in (({"regex": "[ab]{3}"}, lambda t: set(t) <= set("ab") and len(t) == 3), ({"choice": ["yes", "no"]}, lambda t: t in ("yes", "no")),
                       ({"json": {"const": 7}}, lambda t: json.loads(t) == 7), ({"grammar": 'root ::= "x" "y"'}, lambda t: t == "xy")):
        text = client.chat.completions.create(model="tiny", messages=ASK, seed=1, max_tokens=60, extra_body={"structured_outputs": form, **PLAIN}).choices[0].message.content
        assert fits(text), (form, text)


def test_calls_that_must_be_made_one_at_a_time():
    call = {"name": "f", "parameters": {}}
    for parallel in (True, False):
        fits = jsonschema.Draft202012Validator(forced_schema({"f": {"type": "object"}, "g": {"type": "object"}}, "", parallel)).is_valid
        assert fits([call]) and fits([call, call]) == parallel and not fits([]) and not fits([{"name": "h", "parameters": {}}])


@pytest.mark.parametrize(("choice", "parallel"), [("required", True), ("required", False), ({"type": "function", "function": {"name": "add"}}, True)])
def test_calls_that_must_be_made(client: openai.OpenAI, choice: Any, parallel: bool):
    number = {"type": "integer", "minimum": 0, "maximum": 99}
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"a": number}, "required": ["a"], "additionalProperties": False}}}
             for name in ("add", "halve")]
    for seed in range(3):
        ask = {"model": "tiny", "messages": ASK, "tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel, "seed": seed, "max_tokens": 350, "extra_body": PLAIN}
        answer = client.chat.completions.create(**ask).choices[0]
        calls = answer.message.tool_calls
        if answer.finish_reason == "length":
            continue
        assert answer.finish_reason == "tool_calls" and answer.message.content is None and calls
        assert parallel or len(calls) == 1
        assert {c.function.name for c in calls} <= ({"add", "halve"} if choice == "required" else {"add"})
        assert all(0 <= json.loads(c.function.arguments)["a"] <= 99 for c in calls)
        streamed: dict[int, list[str]] = {}
        for c in (c for chunk in client.chat.completions.create(**ask, stream=True) for c in chunk.choices[0].delta.tool_calls or []):
            told = streamed.setdefault(c.index, [c.function.name, ""])
            told[1] += c.function.arguments
        assert list(streamed.values()) == [[c.function.name, c.function.arguments] for c in calls]
        break
    else:
        pytest.fail("no seed gave a whole answer")


# --- null -----------------------------------------------------------------------------------------------------------------


def test_null_is_not_given(client: openai.OpenAI, url: str):
    """Every option that the official client knows, as null: the answer is the one without it."""
    kept = {"self", "model", "messages", "prompt", "input", "extra_headers", "extra_query", "extra_body", "timeout"}
    own = {"temperature": 0, "max_tokens": 5}
    for create, given in ((client.chat.completions.create, {"messages": ASK, **own}), (client.completions.create, {"prompt": "one", **own}),
                          (client.responses.create, {"input": "one", "temperature": 0, "max_output_tokens": 5, "store": False}),
                          (client.embeddings.create, {"input": "one"})):
        nulls = dict.fromkeys(set(inspect.signature(create).parameters) - kept - set(given))
        more = dict.fromkeys(("unheard_of", "cache_salt", "priority", "top_k", "chat_template_kwargs"))
        plain, same = create(model="tiny", **given), create(model="tiny", **given, **nulls, extra_body=more)
        for answer in (plain, same):
            for name in ("id", "created", "created_at"):
                if hasattr(answer, name):
                    setattr(answer, name, None)
        assert len(nulls) > 1 and same.to_dict().keys() == plain.to_dict().keys()
        if create == client.responses.create:
            assert same.output_text == plain.output_text and same.reasoning == plain.reasoning
        else:
            assert same == plain


def test_null_deep_inside(client: openai.OpenAI, url: str):
    tool = {"type": "function", "function": {"name": "f", "description": None, "strict": None, "parameters": {"type": "object", "properties": {}, "default": None}}, "x": None}
    message = {"role": "user", "content": [{"type": "text", "text": "one", "cache_control": None}], "name": None, "tool_calls": None, "refusal": None, "function_call": None}
    body = {"model": "tiny", "messages": [message], "tools": [tool], "max_tokens": 3, "stream": False, "stream_options": None, "response_format": None,
            "chat_template_kwargs": {"enable_thinking": None, "unheard_of": None}}
    assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
    ask = {"model": "tiny", "messages": ASK, "max_tokens": 3}
    streamed = {**ask, "stream": True, "stream_options": {"include_usage": None, "include_obfuscation": None}}
    assert "[DONE]" in httpx.post(f"{url}/v1/chat/completions", json=streamed).text
    item = {"type": None, "role": "user", "status": None, "content": [{"type": "input_text", "text": "one", "annotations": None}], "phase": None, "x": None}
    assert httpx.post(f"{url}/v1/responses", json={"model": "tiny", "input": [item], "max_output_tokens": 2, "text": {"format": None, "verbosity": None}}).status_code == 200
    for wrong, named in (({"messages": None}, "messages"), ({"model": None}, "model"), ({"messages": [{"role": None, "content": "x"}]}, "messages.0.role"),
                         ({"unheard_of": 1}, "unheard_of"), ({"modalities": ["audio"]}, "modalities"), ({"messages": [{"role": "user", "content": None}]}, "messages.0")):
        refused = httpx.post(f"{url}/v1/chat/completions", json={**ask, **wrong})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == named, refused.text
    nothing = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"a": {"enum": [None]}}, "required": ["a"], "additionalProperties": False}}}
    text = client.chat.completions.create(**{**ask, "max_tokens": 40}, response_format=nothing, extra_body=PLAIN).choices[0].message.content
    assert json.loads(text) == {"a": None}, "a null inside of a schema is the schema's"


def test_summaries_of_thoughts(stage: openai.OpenAI, actor: Actor):
    for summary in (None, "auto"):
        actor.say("<think>\nsum\n</think>\n\nthree")
        answer = stage.responses.create(model="actor", input="one two", reasoning={"summary": summary, "effort": None})
        assert answer.output_text == "three" and answer.output[0].summary == [] and answer.output[0].content[0].text == "sum"
        assert answer.reasoning.summary == summary
    with pytest.raises(openai.BadRequestError, match="auto"):
        stage.responses.create(model="actor", input="one two", reasoning={"summary": "detailed"})


# --- responses ------------------------------------------------------------------------------------------------------------

FLAT = [{"type": "function", **TOOLS[0]["function"]}]


def test_a_response_and_its_stream(stage: openai.OpenAI, actor: Actor):
    actor.say("<think>\nsum\n</think>\n\nthree")
    answer = stage.responses.create(model="actor", input="one two", instructions="be short", store=False)
    assert answer.output_text == "three" and answer.status == "completed" and answer.object == "response"
    assert [item.type for item in answer.output] == ["reasoning", "message"] and answer.output[0].content[0].text == "sum"
    assert answer.usage.input_tokens == len(actor.llm.chat_ids([{"role": "system", "content": "be short"}, {"role": "user", "content": "one two"}]))
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    actor.say("<think>\nsum\n</think>\n\nthree")
    with stage.responses.stream(model="actor", input="one two") as events:
        kinds = [(e.type, e.sequence_number) for e in events]
        final = events.get_final_response()
    assert final.output_text == "three" and [n for _, n in kinds] == list(range(len(kinds)))
    assert kinds[0][0] == "response.created" and kinds[-1][0] == "response.completed"
    for name in ("response.output_item.added", "response.content_part.added", "response.output_text.delta", "response.output_text.done",
                 "response.content_part.done", "response.output_item.done"):
        assert name in [k for k, _ in kinds]


def test_tools_in_responses_with_and_without_a_kept_conversation(stage: openai.OpenAI, actor: Actor):
    actor.say(f"Let me see. {CALL}")
    first = stage.responses.create(model="actor", input="one two", tools=FLAT)
    message, call = first.output
    assert (message.type, call.type, call.name, json.loads(call.arguments)) == ("message", "function_call", "calculator", {"expression": "1+2"})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    actor.say("3")
    kept = stage.responses.create(model="actor", input=[result], previous_response_id=first.id, tools=FLAT)
    actor.say("3")
    sent = stage.responses.create(model="actor", tools=FLAT, input=[{"role": "user", "content": "one two"}, *[i.model_dump(exclude_none=True) for i in first.output], result])
    assert kept.output_text == sent.output_text == "3" and kept.usage.input_tokens == sent.usage.input_tokens
    assert stage.responses.retrieve(first.id).output == first.output
    stage.responses.delete(first.id)
    for gone in (lambda: stage.responses.retrieve(first.id), lambda: stage.responses.create(model="actor", input="x", previous_response_id=first.id)):
        with pytest.raises(openai.NotFoundError, match="are kept"):
            gone()
    actor.say(CALL)
    kinds = [e.type for e in stage.responses.create(model="actor", input="one two", tools=FLAT, stream=True)]
    assert "response.function_call_arguments.done" in kinds and kinds[-1] == "response.completed"


def test_responses_of_a_form_and_cut_ones(client: openai.OpenAI):
    answer = client.responses.parse(model="tiny", input="x", text_format=Answer, max_output_tokens=200, reasoning={"effort": "none"})
    assert isinstance(answer.output_parsed, Answer)
    cut = client.responses.create(model="tiny", input="x", max_output_tokens=2, temperature=0)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    for change, status in (({"previous_response_id": "resp_x"}, 404), ({"model": "gpt"}, 404), ({"input": []}, 400), ({"truncation": "auto"}, 400),
                           ({"tools": [{"type": "web_search"}]}, 400), ({"tool_choice": "required"}, 400), ({"background": True}, 400)):
        with pytest.raises(openai.APIStatusError) as caught:
            client.responses.create(**{"model": "tiny", "input": "x", **change})
        assert caught.value.status_code == status and caught.value.body["message"]


# --- vectors ------------------------------------------------------------------------------------------------------------


def test_embeddings(client: openai.OpenAI, url: str, llm: LLM):
    texts = ["one two", "the quick brown fox", "x" * 40]
    expected = llm.embed(texts).numpy()
    answer = client.embeddings.create(model="tiny", input=texts)  # asks for base64
    np.testing.assert_allclose([d.embedding for d in answer.data], expected, atol=1e-5)
    plain = client.embeddings.create(model="tiny", input=texts[0], encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, expected[0], atol=1e-5)
    ids = client.embeddings.create(model="tiny", input=llm.tokenizer.encode(texts[0]))
    np.testing.assert_allclose(ids.data[0].embedding, expected[0], atol=1e-5)
    short = client.embeddings.create(model="tiny", input=texts[0], dimensions=8)
    np.testing.assert_allclose(short.data[0].embedding, expected[0][:8] / np.linalg.norm(expected[0][:8]), atol=1e-5)
    raw = httpx.post(f"{url}/v1/embeddings", json={"model": "tiny", "input": texts[0], "encoding_format": "base64"}).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(raw), "<f4"), expected[0], atol=1e-5)
    assert answer.usage.prompt_tokens == sum(len(llm.tokenizer.encode(t)) for t in texts)
    for wrong in ({"input": []}, {"input": ""}, {"input": ["a", ""]}, {"input": [99999]}, {"input": "a b " * 999}, {"dimensions": 999}, {"encoding_format": "int"}):
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(**{"model": "tiny", "input": "x", **wrong})


def test_rerank_and_score(url: str, llm: LLM):
    documents = ["one two three", "the lazy dog", "quick"]
    vectors = llm.embed(["one two", *documents])
    expected = (vectors[1:] @ vectors[0]).tolist()
    answer = httpx.post(f"{url}/v1/rerank", json={"model": "tiny", "query": "one two", "documents": [documents[0], {"text": documents[1]}, documents[2]], "top_n": 2}).json()
    order = sorted(range(3), key=lambda i: -expected[i])[:2]
    assert [r["index"] for r in answer["results"]] == order and [r["document"]["text"] for r in answer["results"]] == [documents[i] for i in order]
    assert [r["relevance_score"] for r in answer["results"]] == pytest.approx([expected[i] for i in order], abs=1e-5)
    scores = httpx.post(f"{url}/v1/score", json={"model": "tiny", "text_1": "one two", "text_2": documents}).json()
    assert [d["score"] for d in scores["data"]] == pytest.approx(expected, abs=1e-5)
    pairs = httpx.post(f"{url}/v1/score", json={"model": "tiny", "text_1": ["one two"] * 3, "text_2": documents}).json()
    assert pairs["data"] == scores["data"]
    assert httpx.post(f"{url}/v1/score", json={"model": "tiny", "text_1": ["a", "b"], "text_2": documents}).status_code == 400
    likely = httpx.post(f"{url}/v1/score", json={"model": "tiny", "text_1": "one two", "text_2": documents, "how": "likelihood"}).json()
    assert [d["score"] for d in likely["data"]] == pytest.approx(llm.score("one two", documents, how="likelihood"), abs=1e-4)


# --- about -----------------------------------------------------------------------------------------------------------------


def test_several_models(client: openai.OpenAI):
    assert [m.id for m in client.models.list()] == ["tiny", "other"]
    assert client.chat.completions.create(model="other", messages=ASK, max_tokens=1).model == "other"
    assert client.models.retrieve("other").model_extra["max_model_len"] == 256


def test_tokens_and_back(url: str, llm: LLM):
    found = httpx.post(f"{url}/tokenize", json={"prompt": "one two", "return_token_strs": True}).json()
    assert found["tokens"] == llm.tokenizer.encode("one two") and found["count"] == len(found["tokens"]) and "".join(found["token_strs"]) == "one two"
    assert httpx.post(f"{url}/detokenize", json={"model": "tiny", "tokens": found["tokens"]}).json() == {"prompt": "one two"}
    chat = httpx.post(f"{url}/tokenize", json={"model": "tiny", "messages": ASK}).json()
    assert chat["tokens"] == llm.chat_ids(ASK)
    for path, body in (("tokenize", {}), ("tokenize", {"prompt": "a", "messages": ASK}), ("detokenize", {"tokens": [-1]}), ("detokenize", {"tokens": [llm.model.spec.vocab]})):
        assert httpx.post(f"{url}/{path}", json=body).status_code == 400
