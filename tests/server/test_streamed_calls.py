"""Calls told while they are written, through the real client: what its helpers accumulate is the plain answer, in every format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from served_models import Actor
from test_call_formats import BARE, CODER, DS, DSML, FENCED, PARAMETER
from test_openai_client import ASK, client_of

from pellucid.server import running_server
from pellucid.server.formats import FORMATS

NAMES = ["hermes", "llama-json", "mistral", "deepseek", "harmony", "qwen3-coder", "deepseek-dsml", "pythonic"]
TEXT = "one two three four five six seven eight nine ten " * 3
TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
    "a": {"type": "integer"}, "b": {"type": "string"}}}}}]
FLAT = [{"type": "function", "name": "f", "parameters": TOOLS[0]["function"]["parameters"]}]
A, B = json.dumps({"b": TEXT, "a": 7}), json.dumps({"a": 1})
SAYS = {
    "hermes": f"<tool_call>{{\"name\": \"f\", \"arguments\": {A}}}</tool_call>\n<tool_call>{{\"name\": \"f\", \"arguments\": {B}}}</tool_call>",
    "llama-json": f'{{"name": "f", "parameters": {A}}}; {{"name": "f", "parameters": {B}}}',
    "mistral": f"[TOOL_CALLS]f[ARGS]{A}[TOOL_CALLS]f[ARGS]{B}",
    "deepseek": DS.format(FENCED.replace("{}", A) + BARE.replace("{}", B)),
    "harmony": f"<|channel|>commentary to=functions.f<|message|>{A}<|call|><|start|>assistant<|channel|>commentary to=functions.f<|message|>{B}<|call|>",
    "qwen3-coder": CODER.format(f"<parameter=b>\n{TEXT}\n</parameter>\n<parameter=a>\n7\n</parameter>\n") + CODER.format("<parameter=a>\n1\n</parameter>\n"),
    "deepseek-dsml": DSML.format("tool_calls", PARAMETER.format("b", "true", TEXT) + PARAMETER.format("a", "false", "7"))
    + DSML.format("tool_calls", PARAMETER.format("a", "false", "1")),
    "pythonic": f"[f(b={TEXT!r}, a=7), f(a=1)]",
}
WHOLE = {"pythonic": 4}  # pieces of arguments: one by one where they must be made


@pytest.fixture(scope="module")
def actor() -> Actor:
    return Actor(2048)


@pytest.fixture(params=NAMES)
def told(request: pytest.FixtureRequest, actor: Actor) -> Iterator[tuple[str, openai.OpenAI]]:
    with running_server(actor.llm, "actor", form=request.param) as url:
        yield request.param, client_of(url)


def test_every_format_is_here():
    assert set(NAMES) == set(FORMATS)


def test_the_clients_helpers_accumulate_the_plain_answer(told: tuple[str, openai.OpenAI], actor: Actor):
    form, client = told
    plain = actor.say(SAYS[form]) and client.chat.completions.create(model="actor", messages=ASK, tools=TOOLS).choices[0]
    calls = plain.message.tool_calls
    assert plain.finish_reason == "tool_calls" and [json.loads(c.function.arguments) for c in calls] == [{"b": TEXT, "a": 7}, {"a": 1}], plain
    actor.say(SAYS[form])
    with client.chat.completions.stream(model="actor", messages=ASK, tools=TOOLS) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and (final.message.content or None) is None
    assert [(c.function.name, c.function.arguments) for c in final.message.tool_calls] == [(c.function.name, c.function.arguments) for c in calls]
    pieces = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert len(pieces) >= WHOLE.get(form, 30) and sum(e.type == "tool_calls.function.arguments.done" for e in events) == 2
    actor.say(SAYS[form])
    with client.responses.stream(model="actor", input="one two", tools=FLAT) as stream:
        kinds = [e.type for e in stream]
        items = stream.get_final_response().output
    assert [(i.type, i.name, i.arguments, i.status) for i in items] == [("function_call", "f", c.function.arguments, "completed") for c in calls]
    assert kinds.count("response.function_call_arguments.delta") >= WHOLE.get(form, 30) and kinds.count("response.function_call_arguments.done") == 2


@pytest.mark.parametrize("told", ["hermes", "mistral", "llama-json"], indirect=True)
def test_a_call_that_is_cut_off(told: tuple[str, openai.OpenAI], actor: Actor):
    """What was told stays; the answer's text is that of the plain answer, and no call is said to have been made."""
    form, client = told
    ask: Any = {"model": "actor", "messages": ASK, "tools": TOOLS, "max_tokens": 40}
    actor.say(SAYS[form])
    plain = client.chat.completions.create(**ask).choices[0]
    assert plain.finish_reason == "length" and plain.message.tool_calls is None and SAYS[form].startswith(plain.message.content)
    actor.say(SAYS[form])
    content, arguments, reason = "", "", None
    for chunk in client.chat.completions.create(**ask, stream=True):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        arguments += "".join(c.function.arguments for c in choice.delta.tool_calls or [])
        reason = choice.finish_reason or reason
    assert (content, reason) == (plain.message.content, "length") and len(arguments) > 20 and A.startswith(arguments)
    actor.say(SAYS[form])
    answer = client.responses.create(model="actor", input="one two", tools=FLAT, max_output_tokens=40, stream=True)
    *_, last = answer
    assert last.type == "response.incomplete"
    assert [(i.type, i.status) for i in last.response.output] == [("function_call", "incomplete"), ("message", "incomplete")]
    actor.say("one two")
    again = client.responses.create(model="actor", input="three", tools=FLAT, previous_response_id=last.response.id)
    assert again.output_text == "one two"
