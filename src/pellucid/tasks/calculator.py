"""Tool calls: understand a short request, say the operation, and call the calculator with the right expression.

    Ann has 50 plums and eats 12. How many are left?
    <think>
    50 minus 12
    </think>

    <tool_call>
    {"name": "calculator", "arguments": {"expression": "50-12"}}
    </tool_call>

The call is graded on its parsed JSON and the parsed expression, never on text similarity.  `dialogue` continues with
the tool's real answer and a final reply.  The split is by operands and operation, in either order where the order
does not matter.  The tool itself is `pellucid.tasks.tools`.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pellucid.tasks import expression, tools
from pellucid.tasks.task import (
    Problem,
    Split,
    check_operations,
    check_whole,
    completion,
    draw_in_split,
    matching,
    parse_completion,
    scores,
)

OPERATIONS = "+-*/"
WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
RULES = " Think between <think> and </think>, then call the calculator with one expression."
# {a} stands left of the operation and {b} right of it; some requests name them the other way round.
PLAIN = {
    "+": ["What is {a} plus {b}?", "Add {a} and {b}."],
    "-": ["What is {a} minus {b}?", "Take {b} away from {a}."],
    "*": ["What is {a} times {b}?", "Multiply {a} by {b}."],
    "/": ["What is {a} divided by {b}?", "Divide {a} by {b}."],
}
STORY = {
    "+": ["{name} has {a} {things} and gets {b} more. How many now?",
          "{name} has {a} {things} and {other} has {b}. How many together?"],
    "-": ["{name} has {a} {things} and loses {b}. How many are left?",
          "{name} gives away {b} of {a} {things}. How many are left?"],
    "*": ["A box holds {a} {things}. How many are in {b} boxes?",
          "{name} buys {a} bags of {b} {things}. How many in all?"],
    "/": ["{name} shares {a} {things} among {b} children. How many each?",
          "How many bags of {b} can {name} fill with {a} {things}?"],
}
NAMES = ("Ann", "Ben", "Eva", "Tom", "Mia", "Leo")
THINGS = ("apples", "plums", "pens", "books", "coins", "cards")

Answer = tuple[int, str, int]  # left number, operation, right number


@dataclass(frozen=True)
class CalculatorDials:
    min_number: int = 2
    """The smallest operand."""
    max_number: int = 99
    """The largest operand (of a division: the largest divisor and quotient)."""
    operations: str = "+-*"
    """Which operations are asked for, from + - * and / (which leaves no remainder)."""
    stories: bool = True
    """Word problems beside plain requests."""
    explain: bool = False
    """Spell out the rules in the prompt, for models that have not learned from the demonstrations."""

    def __post_init__(self) -> None:
        check_whole(self, "min_number", 1, 9999)
        check_whole(self, "max_number", self.min_number + 1, 9999)
        check_operations(self, OPERATIONS)


class Calculator:
    """See the module.  `Problem.answer` is (left, operation, right)."""

    name = "calculator"

    def __init__(self, dials: CalculatorDials | None = None):
        self.dials = dials or CalculatorDials()

    def sample(self, rng: random.Random, split: Split) -> Problem:
        """Operation, operands and wording are uniform."""
        d = self.dials

        def draw(rng: random.Random) -> tuple[int, str, int]:
            a, b = rng.randint(d.min_number, d.max_number), rng.randint(d.min_number, d.max_number)
            operation = rng.choice(d.operations)
            if operation == "-":
                a, b = max(a, b), min(a, b)
            return (a * b if operation == "/" else a), operation, b

        a, operation, b = draw_in_split(rng, split, self.name, draw, key_of)
        wordings = PLAIN[operation] + (STORY[operation] if d.stories else [])
        name, other = rng.sample(NAMES, 2)
        prompt = rng.choice(wordings).format(a=a, b=b, name=name, other=other, things=rng.choice(THINGS))
        return Problem(self.name, prompt + (RULES if d.explain else ""), (a, operation, b),
                       key_of((a, operation, b)), tools=("calculator",))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """The operation in words, then the call; there is one way only, so `rng` is not used."""
        return completion(in_words(problem.answer), tools.call_text("calculator", "expression", in_symbols(problem.answer)))

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        """format: one thought, then one well-formed call of the calculator with the argument `expression` alone.

        correct: its expression is the asked operation on the asked numbers; a precomputed result is not.
        progress: a third each for the left number, the operation and the right number.
        """
        parsed = parse_completion(text)
        tree = parse_call(parsed.answer) if parsed else None
        if tree is None:
            return scores(False, False, 0.0)
        credit = agreement(tree, problem.answer)
        return scores(True, credit == 1.0, credit)

    def follow_up(self, problem: Problem) -> tuple[list[dict[str, Any]], str]:
        """The turn after the call: (messages so far, the assistant's completion).

        The messages are as an OpenAI client sends them back: the call without its thought, then the tool's answer.
        """
        result = tools.calculate(in_symbols(problem.answer))
        call = {"id": "call_0", "type": "function",
                "function": {"name": "calculator", "arguments": json.dumps({"expression": in_symbols(problem.answer)})}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": problem.prompt},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_0", "content": result}]
        return messages, completion(f"{in_words(problem.answer)} is {result}", result)

    def grade_follow_up(self, problem: Problem, text: str) -> dict[str, float]:
        """Like `grade`, for the turn after the call: correct when the answer is the tool's result and nothing else."""
        wanted = tools.calculate(in_symbols(problem.answer))
        parsed = parse_completion(text)
        if parsed is None or len(parsed.answer) > 100 or not re.fullmatch(r"-?[0-9]+", parsed.answer):
            return scores(False, False, 0.0)
        return scores(True, parsed.answer == wanted, matching(list(parsed.answer), list(wanted)))


def key_of(answer: Answer) -> str:
    """Operation and operands; in sorted order for + and *, whose order does not matter."""
    left, operation, right = answer
    return f"{operation} {min(left, right)},{max(left, right)}" if operation in "+*" else f"{operation} {left},{right}"


def in_words(answer: Answer) -> str:
    """`50 minus 12`."""
    return f"{answer[0]} {WORDS[answer[1]]} {answer[2]}"


def in_symbols(answer: Answer) -> str:
    """`50-12`."""
    return f"{answer[0]}{answer[1]}{answer[2]}"


def parse_call(answer: str) -> expression.Tree | None:
    """The expression of exactly one well-formed call of the calculator, else None."""
    source = tools.parse_call(answer, "calculator", "expression")
    if source is None:
        return None
    try:
        return expression.parse(source, OPERATIONS, signs=True, decimals=True)
    except expression.ExpressionError:
        return None


def agreement(tree: expression.Tree, answer: Answer) -> float:
    """Share of left number, operation and right number that agree; 1 only if the expression is just these."""
    left, operation, right = answer
    if not isinstance(tree, expression.Binary):
        return 0.0
    orders = [(left, right), (right, left)] if operation in "+*" else [(left, right)]
    numbers = max((tree.left == Fraction(a)) + (tree.right == Fraction(b)) for a, b in orders)
    return (numbers + (tree.operator == operation)) / 3
