"""Tool calls as text, and the calculator a model can call: a safe parser with limits, and its schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pellucid.tasks import expression

# As small as a schema can be: its rendering is part of every prompt that may call the tool, and a model of one
# million parameters reads each of its tokens.
CALCULATOR_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


@dataclass(frozen=True)
class Tool:
    """A tool: what clients are told of it, and what runs."""

    schema: dict[str, Any]
    run: Callable[..., str]


MAX_CALL_CHARS = 300
_CALL = re.compile(r"<tool_call>\n?([^<>]+?)\n?</tool_call>")


def call_text(name: str, argument: str, value: str) -> str:
    """The call as the chat template writes it."""
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": {argument: value}}) + "\n</tool_call>"


def parse_call(answer: str, name: str, argument: str) -> str | None:
    """The text given as `argument` by exactly one well-formed call of `name` with nothing beside it, else None."""
    found = _CALL.fullmatch(answer) if len(answer) <= MAX_CALL_CHARS else None
    if not found:
        return None
    try:
        call = json.loads(found[1], object_pairs_hook=without_duplicates)
    except ValueError:  # not JSON, or a key given twice
        return None
    if not isinstance(call, dict) or set(call) != {"name", "arguments"} or call["name"] != name:
        return None
    arguments = call["arguments"]
    if not isinstance(arguments, dict) or set(arguments) != {argument} or not isinstance(arguments[argument], str):
        return None
    return arguments[argument]


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused when a key stands twice (parsers disagree about which one counts)."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def calculate(source: str) -> str:
    """The exact value of an expression of + - * / brackets, signs and decimals, as text.

    Whole numbers are written in full, others with up to ten significant digits.  What cannot be computed gives
    `error: ...`, which a model can read; nothing is raised and nothing is evaluated.
    """
    try:
        result = expression.value(expression.parse(source, "+-*/", signs=True, decimals=True))
    except expression.ExpressionError as error:
        return f"error: {error}"
    return written(result)


def written(number: Fraction) -> str:
    """`84`, `2.5`, `0.3333333333`, `1e+30` only beyond whole numbers."""
    return str(number.numerator) if number.denominator == 1 else f"{float(number):.10g}"


TOOLS: dict[str, Tool] = {"calculator": Tool(CALCULATOR_SCHEMA, lambda expression: calculate(expression))}
