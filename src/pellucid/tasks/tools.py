"""The calculator a model can call: a safe parser with limits, and its schema as OpenAI clients send it."""

from __future__ import annotations

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
