"""Clients that we did not write: LangChain, LlamaIndex, and Open WebUI's requests as it sends them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pydantic
import pytest
from served_models import Actor, random_llm
from test_openai_client import CALL

from pellucid.engine import LLM
from pellucid.server import running_server


@pytest.fixture(scope="module")
def actor() -> Actor:
    return Actor(2048)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return random_llm(1024)


@pytest.fixture(scope="module")
def url(actor: Actor, llm: LLM) -> Iterator[str]:
    with running_server({"actor": actor.llm, "tiny": llm}) as url:
        yield url


# --- LangChain ----------------------------------------------------------------------------------------------------------


class Sum(pydantic.BaseModel):
    """A sum."""

    expression: str


def test_langchain_chat(url: str, actor: Actor):
    openai = pytest.importorskip("langchain_openai")
    chat = openai.ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="actor", max_retries=0, timeout=60)
    actor.say("<think>\nhm\n</think>\n\nthree")
    answer = chat.invoke([("system", "be short"), ("human", "one two")])
    assert answer.content == "three" and answer.usage_metadata["output_tokens"] > 0 and answer.response_metadata["finish_reason"] == "stop"
    actor.say("one two three")
    parts = list(chat.stream("count"))
    assert "".join(p.content for p in parts) == "one two three" and len(parts) > 3


def test_langchain_tools_and_their_results(url: str, actor: Actor):
    openai = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def calculator(expression: str) -> str:
        """Computes."""
        return "3" if expression == "1+2" else "?"

    chat = openai.ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="actor", max_retries=0, timeout=60).bind_tools([calculator])
    actor.say(CALL)
    answer = chat.invoke("1+2")
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("calculator", {"expression": "1+2"})
    actor.say("3")
    last = chat.invoke([HumanMessage("1+2"), answer, ToolMessage(calculator.invoke(call["args"]), tool_call_id=call["id"])])
    assert last.content == "3"
    actor.say(CALL)
    streamed = None
    for part in chat.stream("1+2"):
        streamed = part if streamed is None else streamed + part
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [("calculator", {"expression": "1+2"})]


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structured_output(url: str, llm: LLM, method: str):
    openai = pytest.importorskip("langchain_openai")
    chat = openai.ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="tiny", max_retries=0, timeout=60, temperature=0, max_tokens=200,
                             extra_body={"chat_template_kwargs": {"enable_thinking": False}, "logit_bias": {str(ord('"')): 30}})
    found = chat.with_structured_output(Sum, method=method, include_raw=True).invoke("Answer in JSON: a sum")
    if method == "json_mode":  # any object: what is in it is the model's business
        assert found["raw"].content.startswith("{")
    else:
        assert isinstance(found["parsed"], Sum), found


def test_langchain_embeddings(url: str, llm: LLM):
    openai = pytest.importorskip("langchain_openai")
    embeddings = openai.OpenAIEmbeddings(base_url=f"{url}/v1", api_key="none", model="tiny", check_embedding_ctx_length=False)
    vectors = embeddings.embed_documents(["one two", "three"])
    assert vectors[0] == pytest.approx(llm.embed(["one two"])[0].tolist(), abs=1e-5) and len(vectors) == 2


# --- LlamaIndex ---------------------------------------------------------------------------------------------------------


def test_llama_index_chat_completion_and_tools(url: str, actor: Actor):
    like = pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool

    options = {"api_base": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60}
    chat = like.OpenAILike(model="actor", is_chat_model=True, is_function_calling_model=True, **options)
    actor.say("three")
    assert chat.chat([ChatMessage(role="user", content="one two")]).message.content == "three"
    actor.say("one two three")
    assert [r.delta for r in chat.stream_chat([ChatMessage(role="user", content="count")])][-1] is not None
    actor.say("one two three")
    assert "".join(r.delta or "" for r in chat.stream_complete("count")) == "one two three"

    def calculator(expression: str) -> str:
        """Computes."""
        return "3"

    actor.say(CALL)
    answer = chat.chat_with_tools([FunctionTool.from_defaults(calculator)], user_msg="1+2")
    (call,) = chat.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("calculator", {"expression": "1+2"})
    plain = like.OpenAILike(model="actor", is_chat_model=False, **options)
    actor.say(" three")
    assert plain.complete("one two").text == " three"


# --- Open WebUI: what it sends, as its requests were recorded ----------------------------------------------------------------


def test_open_webui(url: str, actor: Actor):
    headers = {"Authorization": "Bearer none", "Content-Type": "application/json", "X-OpenWebUI-User-Name": "a", "X-OpenWebUI-User-Id": "1"}
    models = httpx.get(f"{url}/v1/models", headers=headers).json()
    assert {m["id"] for m in models["data"]} == {"actor", "tiny"} and all(m["object"] == "model" for m in models["data"])
    actor.say("<think>\nhm\n</think>\n\nHello")
    talk = {"stream": True, "model": "actor", "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
            "stream_options": {"include_usage": True}, "temperature": 0.8, "top_k": 40, "max_tokens": 100, "frequency_penalty": 0.1, "seed": 42, "stop": ["###"]}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=talk, headers=headers, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(e) for e in events[:-1]]
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    assert "".join(d.get("content") or "" for d in deltas) == "Hello" and "".join(d.get("reasoning_content") or "" for d in deltas) == "hm"
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    actor.say('{"title": "Hi"}')  # the title of a conversation is asked for apart
    title = {"model": "actor", "messages": [{"role": "user", "content": "### Task:\nGenerate a title"}], "stream": False, "max_completion_tokens": 100}
    assert httpx.post(f"{url}/v1/chat/completions", json=title, headers=headers, timeout=60).json()["choices"][0]["message"]["content"] == '{"title": "Hi"}'
    vectors = httpx.post(f"{url}/v1/embeddings", json={"input": ["a", "b"], "model": "tiny"}, headers=headers).json()
    assert [len(d["embedding"]) for d in vectors["data"]] == [32, 32]
    rerank = {"model": "tiny", "query": "a", "documents": ["b", "a"], "top_n": 2}
    assert {r["index"] for r in httpx.post(f"{url}/v1/rerank", json=rerank, headers=headers).json()["results"]} == {0, 1}


def test_open_webui_goes_on_behind_a_tool(url: str, actor: Actor):
    """Its two ways to send a conversation with a call and its result, by chat completions and by responses, are one prompt here."""
    calculator = {"name": "calculator", "description": "Computes.", "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}}}
    arguments = '{"expression": "1+2"}'
    talk = {"model": "actor", "stream": True, "stream_options": {"include_usage": True}, "tools": [{"type": "function", "function": calculator}], "messages": [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "1+2"}]},
        {"role": "assistant", "content": "", "tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "calculator", "arguments": arguments}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"}]}
    items = {"model": "actor", "stream": True, "tools": [{"type": "function", **calculator}], "instructions": "be kind", "max_output_tokens": 100, "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "1+2"}]},
        {"type": "function_call", "call_id": "c1", "name": "calculator", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c1", "output": "3"}]}
    used = []
    for path, body, words in (("chat/completions", talk, ("prompt_tokens", "usage")), ("responses", items, ("input_tokens", "response"))):
        actor.say("It is 3.")
        answer = httpx.post(f"{url}/v1/{path}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        last = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")][-1]
        used.append((last["usage"] if words[1] == "usage" else last["response"]["usage"])[words[0]])
    assert used[0] == used[1] > 20
