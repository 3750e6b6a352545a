"""What reaches the chat template: calls of tools in the conversation's past, and the variables that clients may give."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from served_models import Actor, random_llm
from test_openai_client import ASK
from transformers.utils.chat_template_utils import render_jinja_template

from pellucid.engine import LLM
from pellucid.engine.past_calls import takes_text
from pellucid.server import running_server
from pellucid.tokenizers import Tokenizer

post = functools.partial(httpx.post, timeout=60)  # kernels may have to be compiled first

TURN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% for c in m.tool_calls or [] %}{{ '' }}ARGUMENTS{% endfor %}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
WAYS = {  # how families' templates write a call's arguments; the last word: whether a text may stand there
    "qwen2.5, llama3": ("{{ c.function.arguments | tojson }}", False),
    "deepseek v3": ("{{ '```json\\n' + c.function.arguments + '\\n```' }}", True),
    "qwen3-coder, glm": ("{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v if v is string else v | tojson }}</{{ k }}>{% endfor %}", False),
    "qwen3": ("{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}", True),
    "none": ("", False)}
WRITTEN = '{"expression":  "1+2", "deep": {"list": [1, "é\\n"]}}'


def messages(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "call_1", "type": "function", "function": {"name": "calculator", "arguments": arguments}}
    return [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "so:", "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_call_id": "call_1"}, {"role": "user", "content": "and?"}]


def with_template(llm: LLM, template: str) -> LLM:
    made = copy.copy(llm)
    made.tokenizer = Tokenizer(replace(llm.tokenizer.source, templates={"default": template}))
    return made


@pytest.fixture(scope="module")
def llm() -> LLM:
    return random_llm(1024)


@pytest.mark.parametrize("way", WAYS)
def test_arguments_stand_as_the_template_reads_them(llm: LLM, way: str):
    """Equal to transformers' rendering of the object, which its documents ask for; where a template takes a text, it is the model's own."""
    body, text = WAYS[way]
    template = TURN.replace("ARGUMENTS", body)
    made = with_template(llm, template)
    assert takes_text(made.tokenizer) == text
    want = render_jinja_template([messages(WRITTEN if text else json.loads(WRITTEN))], chat_template=template, add_generation_prompt=True)[0][0]
    assert made.tokenizer.decode(made.chat_ids(messages(WRITTEN))) == want
    assert (WRITTEN in want) == text
    if not text:
        assert made.chat_ids(messages(json.loads(WRITTEN))) == made.chat_ids(messages(WRITTEN)), "objects are taken too, as before"


def test_what_is_no_object_is_left_to_the_template(llm: LLM):
    made = with_template(llm, TURN.replace("ARGUMENTS", WAYS["qwen2.5, llama3"][0]))
    for broken in ("{", "[1]", "", "[" * 100_000):
        assert json.dumps(broken) in made.tokenizer.decode(made.chat_ids(messages(broken)))


def test_a_template_that_changes_the_text_and_takes_no_object(llm: LLM):
    made = with_template(llm, TURN.replace("ARGUMENTS", "{{ c.function.arguments.replace(' ', '_') }}"))
    assert 'so:{"a":_1}' in made.tokenizer.decode(made.chat_ids(messages('{"a": 1}')))


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    template = TURN.replace("ARGUMENTS", WAYS["qwen2.5, llama3"][0])
    effort = "{% if style is defined %}({{ style }}){% endif %}{% if reasoning_effort is defined %}<{{ reasoning_effort }}>{% endif %}"
    with running_server({"plain": with_template(llm, template), "effort": with_template(llm, effort + template), "marked": llm}) as url:
        yield url


def prompt_of(url: str, model: str, **more: Any) -> str:
    body = {"model": model, "messages": messages(WRITTEN), "max_tokens": 1, "return_token_ids": True, **more}
    answer = post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(post(f"{url}/detokenize", json={"model": model, "tokens": answer.json()["prompt_token_ids"]}).json()["prompt"])


def test_the_server_gives_them_so(url: str):
    assert 'so:{"expression": "1+2", "deep"' in prompt_of(url, "plain")
    told = post(f"{url}/tokenize", json={"model": "plain", "messages": messages(WRITTEN)}).json()["tokens"]
    assert post(f"{url}/detokenize", json={"model": "plain", "tokens": told}).json()["prompt"] == prompt_of(url, "plain")


def test_an_answer_that_was_begun_goes_on(url: str, llm: LLM):
    """Prompts equal to transformers' (continue_final_message), by templates that mark the assistant's text and those that do not."""
    plain = TURN.replace("ARGUMENTS", WAYS["qwen2.5, llama3"][0])
    begun = [*ASK, {"role": "assistant", "content": "It is 1+"}]
    for model, template in (("plain", plain), ("marked", llm.tokenizer.template())):
        want = render_jinja_template([begun], chat_template=template, continue_final_message=True)[0][0]
        assert want.endswith("It is 1+")
        told = prompt_of(url, model, messages=begun, continue_final_message=True, add_generation_prompt=False)
        assert told == want
        closed = prompt_of(url, model, messages=begun, add_generation_prompt=False)
        assert closed == render_jinja_template([begun], chat_template=template)[0][0]
        assert len(closed) > len(want) or model == "plain"
    for wrong in ({"messages": ASK}, {"add_generation_prompt": True}, {"messages": messages("{}")[:2]}):
        answer = post(f"{url}/v1/chat/completions", json={"model": "plain", "messages": begun, "continue_final_message": True, **wrong})
        assert answer.status_code == 400 and "continue_final_message" in answer.text


def test_a_thought_that_was_begun_goes_on():
    actor = Actor()
    with running_server(actor.llm, "actor") as url:
        for begun, said, thought, content in (("<think>\nso", " it is\n</think>\n\nthree", "it is", "three"), ("It", " is three", None, " is three")):
            actor.say(said)
            body = {"model": "actor", "messages": [*ASK, {"role": "assistant", "content": begun}], "continue_final_message": True}
            message = post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]["message"]
            assert (message.get("reasoning_content"), message["content"]) == (thought, content)


def test_variables_of_the_template(url: str):
    """Effort reaches a template that reads it (gpt-oss); others only hear whether to think. What nobody reads is refused."""
    assert prompt_of(url, "effort", reasoning_effort="high").startswith("<high>")
    assert prompt_of(url, "effort", chat_template_kwargs={"style": "curt", "reasoning_effort": "low"}).startswith("(curt)<low>")
    assert prompt_of(url, "plain", reasoning_effort="high") == prompt_of(url, "plain")
    assert prompt_of(url, "plain", chat_template_kwargs={"enable_thinking": False}) == prompt_of(url, "plain")
    body = {"model": "plain", "messages": messages(WRITTEN), "chat_template_kwargs": {"style": "curt"}}
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = post(url + path, json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "chat_template_kwargs.style" and "style" in answer.text
    for name in ("messages", "tools", "add_generation_prompt", "m", "raise_exception"):
        answer = post(f"{url}/v1/chat/completions", json={**body, "model": "effort", "chat_template_kwargs": {name: []}})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_field", name
    told = post(f"{url}/tokenize", json={**body, "model": "effort", "return_token_strs": True}).json()
    assert "".join(told["token_strs"]).startswith("(curt)")
