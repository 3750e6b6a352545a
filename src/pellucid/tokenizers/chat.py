"""Messages -> the text that a model reads, by the checkpoint's own Jinja template.

Templates come from the Hub and are untrusted code: they run in a sandbox (`sandbox.py`), see only plain JSON values,
and get the same few helpers as in transformers, so that text is equal character for character: `tojson` (which must
not escape `<>&'`, spell Chinese as \\uXXXX or sort keys, as Jinja's own does), `raise_exception`, `strftime_now`, and
`{% generation %} ... {% endgeneration %}` around what the assistant writes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
from jinja2.ext import Extension, loopcontrols

from pellucid.errors import BadInput
from pellucid.tokenizers.sandbox import Exceeded, Sandbox, budget

Message = Mapping[str, Any]

OUR_TEMPLATE = Path(__file__).with_name("template.jinja").read_text(encoding="utf-8")

# Noncharacters (never valid in exchanged text) that mark the rendered text for `spans.py`.
BROKEN, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"

LARGEST_TEMPLATE = 1 << 20
"""Characters; the longest on the Hub have some 20,000."""

# The names under which a message's reasoning arrives; templates read the first.
REASONING = ("reasoning_content", "thinking", "reasoning")


class Generation(Extension):
    """`{% generation %}`: shows its body; in a tracking environment between OPEN and CLOSE."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Any) -> str:
        return OPEN + caller() + CLOSE if getattr(self.environment, "tracking", False) else caller()


def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
           sort_keys: bool = False) -> str:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    # A mark must survive escaping (an escaped backslash before it is text, and stays).
    return re.sub(r"(?<!\\)((?:\\\\)*)\\ufdd0", rf"\g<1>{BROKEN}", text) if ensure_ascii else text


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=32)
def compile_template(source: str, tracking: bool) -> jinja2.Template:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.extend(tracking=tracking)
    environment.add_filter("tojson", tojson)
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda form: datetime.now().strftime(form)}
    mend = "mend chat_template.jinja in the model's folder"
    if len(source) > LARGEST_TEMPLATE:
        raise BadInput("the chat template is too long", f"{len(source)} characters, at most {LARGEST_TEMPLATE}", mend)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise BadInput("the chat template is not valid Jinja", f"line {error.lineno}: {error.message}", mend) from error
    except Exception as error:  # nested too deep for Jinja's parser, or for Python's
        raise BadInput("the chat template cannot be compiled", f"{type(error).__name__}: {error}", mend) from error


def render(source: str, messages: Sequence[Message], tools: list[dict] | None = None, tracking: bool = False,
           **variables: Any) -> str:
    """The text of a conversation.

    source: the template.  variables: what it may read besides `messages` and `tools` (`add_generation_prompt`,
    `enable_thinking`, `bos_token` ...).  tracking: leave OPEN and CLOSE around generation blocks.

    Raises `BadInput` when messages are no messages, or the template refuses them, or runs without end.
    """
    template = compile_template(source, tracking)
    messages, tools = checked(messages), checked_tools(tools)
    try:
        with budget():
            return template.render({"documents": None, **plain(variables), "messages": messages, "tools": tools})
    except Exceeded as error:
        raise BadInput("the chat template runs too long or writes too much", str(error),
                       "send fewer messages, or use another template: this one may be hostile") from error
    except Exception as error:  # a template is a program: anything may go wrong in it
        raise BadInput("the chat template refuses these messages", f"{type(error).__name__}: {error}",
                       "check the order of roles and the type of each content") from error


def checked(messages: Sequence[Message]) -> list[dict]:
    """Plain dictionaries without None, the reasoning under its usual name (both as transformers does)."""
    if not isinstance(messages, list | tuple) or not messages:
        raise BadInput("messages must be a list of at least one message", f"got {str(messages)[:80]!r}",
                       'give [{"role": "user", "content": "..."}]')
    result = []
    for message in map(_plain, messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadInput("a message needs a role", f"got {str(message)[:80]!r}",
                           'give {"role": "user", "content": "..."}')
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[name] for name in REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        result.append(message)
    return result


def checked_tools(tools: list[dict] | None) -> list[dict] | None:
    if tools is None:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadInput("tools must be a list of JSON schemas", f"got {str(tools)[:80]!r}",
                       'give [{"type": "function", "function": {"name": ..., "parameters": {...}}}]')
    return [_plain(tool) for tool in tools]


def _plain(value: Any) -> Any:
    try:
        return plain(value)
    except RecursionError:
        raise BadInput("messages or tools are nested too deep", "a thousand lists inside one another, or a ring",
                       "give flat JSON") from None


def plain(value: Any) -> Any:
    """JSON values only: a template must not reach the methods of rich objects, which the sandbox does not know."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # an enumeration, say
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(plain(item) for item in value)
    if (numpy := sys.modules.get("numpy")) and isinstance(value, numpy.generic):
        return plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return plain(value.model_dump())
    return f"<{type(value).__name__}>"


@lru_cache(maxsize=32)
def has_generation(source: str) -> bool:
    """Whether the template says itself what the assistant writes."""
    return re.search(r"\{%[-+]?\s*generation\b", source) is not None


@lru_cache(maxsize=32)
def variables(source: str) -> frozenset[str]:
    """The names that the template reads, of those that it is given."""
    environment = compile_template(source, False).environment
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source))) - set(environment.globals)


@lru_cache(maxsize=32)
def literals(source: str) -> str:
    """The text that a template itself can write: its raw text and its string constants, apart from one another."""
    tree = compile_template(source, False).environment.parse(source)
    constants = (node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str))
    return "\0".join([*(node.data for node in tree.find_all(jinja2.nodes.TemplateData)), *constants])
