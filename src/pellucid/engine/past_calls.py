"""Calls of tools in a conversation's past, in the form that the chat template reads.

OpenAI's messages hold a call's arguments as a text of JSON. Some templates write that text as it is (DeepSeek V3, our own), others expect
an object: they would quote the text once more (Qwen 2.5, Llama 3), or refuse it (Qwen3-Coder, GLM). A template is asked once, with a call
of its own. The text is left where it may be: it is word for word what the model wrote, and the cache knows it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from pellucid.errors import BadInput
from pellucid.tokenizers import Tokenizer

Messages = Sequence[dict[str, Any]]
PROBE = '{"a b":"c d"}'
KNOWN: WeakKeyDictionary[Tokenizer, dict[str, bool]] = WeakKeyDictionary()


def past_calls(tokenizer: Tokenizer, messages: Messages, tools: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The messages; arguments that are a text become objects where the template wants those."""
    given: Any = list(messages) if isinstance(messages, list | tuple) else messages  # what is no list is refused by who reads it
    if not isinstance(given, list) or not any(isinstance(m, dict) and m.get("tool_calls") for m in given) or takes_text(tokenizer, tools):
        return given  # type: ignore[no-any-return]
    return [{**m, "tool_calls": [with_object(c) for c in m["tool_calls"]]} if isinstance(m, dict) and isinstance(m.get("tool_calls"), list) else m
            for m in given]


def with_object(call: Any) -> Any:
    """A call whose arguments are an object, if they can be read as one."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": with_object(call["function"])}
    try:
        found = json.loads(call.get("arguments", ""))
    except (TypeError, ValueError, RecursionError):
        return call
    return {**call, "arguments": found} if isinstance(found, dict) else call


def takes_text(tokenizer: Tokenizer, tools: list[dict[str, Any]] | None = None) -> bool:
    """Whether the template writes arguments that are a text as they are."""
    template, known = tokenizer.template(tools), KNOWN.setdefault(tokenizer, {})
    if template not in known:
        known[template] = PROBE in asked(tokenizer, PROBE, tools) or not asked(tokenizer, json.loads(PROBE), tools)
    return known[template]


def asked(tokenizer: Tokenizer, arguments: Any, tools: list[dict[str, Any]] | None) -> str:
    """What the template makes of a conversation with such a call; nothing where it refuses it."""
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": arguments}}
    try:
        return tokenizer.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
                                 {"role": "tool", "content": "1", "name": "f", "tool_call_id": "123456789"}], tools)
    except BadInput:
        return ""
