"""Addition and subtraction of long numbers, digit by digit.  The thought is the columns from the right.

    Add 4 7 2 + 8 6 5.          Subtract 7 0 2 - 4 6 5.
    <think>                     <think>
    2+5+0=7                     12-5-0=7        12: ten was borrowed
    7+6+0=13                    10-6-1=3        -1: for the ten borrowed before
    4+8+1=13                    7-4-1=2
    </think>                    </think>

    1 3 3 7                     2 3 7

Digits stand apart so that each is a token of its own.  A column holds the two digits and what was carried into it,
so that it is one of 200 facts per operation, however long the numbers are.  With `scratchpad=False` the answer stands
alone: the same problems without the room to work them out, to see what thinking is worth.  The split is by the
unordered pair of operands, the same for both operations.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from pellucid.tasks.task import (
    Problem,
    Split,
    check_operations,
    check_whole,
    completion,
    draw_in_split,
    lines_of,
    matching,
    parse_answer,
    parse_completion,
    scores,
)

OPERATIONS = "+-"
RULES = (" Work from the right, one column a line, between <think> and </think>,"
         " then answer with the number only, its digits apart like here.")
BARE_RULES = " Answer with the number only, its digits apart like here."
_NUMBER = re.compile(r"[0-9]+|[0-9](?: [0-9])+")


@dataclass(frozen=True)
class ArithmeticDials:
    min_digits: int = 3
    """The fewest digits an operand has."""
    max_digits: int = 3
    """The most digits an operand has; both operands of a problem are equally long."""
    operations: str = OPERATIONS
    """Which operations are asked for."""
    scratchpad: bool = True
    """Demonstrate and demand the columns; without, a thought may be missing and is not graded."""
    explain: bool = False
    """Spell out the rules in the prompt, for models that have not learned from the demonstrations."""

    def __post_init__(self) -> None:
        check_whole(self, "min_digits", 1, 30)
        check_whole(self, "max_digits", self.min_digits, 30)
        check_operations(self, OPERATIONS)


class Arithmetic:
    """See the module.  `Problem.answer` is (a, operation, b, result) with a >= b."""

    name = "arithmetic"

    def __init__(self, dials: ArithmeticDials | None = None):
        self.dials = dials or ArithmeticDials()

    def sample(self, rng: random.Random, split: Split) -> Problem:
        """Lengths uniform in min_digits..max_digits, operands uniform among the numbers of that length."""
        d = self.dials

        def draw(rng: random.Random) -> tuple[int, int]:
            digits = rng.randint(d.min_digits, d.max_digits)
            low, high = 10 ** (digits - 1), 10**digits - 1
            return rng.randint(low, high), rng.randint(low, high)

        a, b = draw_in_split(rng, split, self.name, draw, key_of)
        operation = rng.choice(d.operations)
        if operation == "-":
            a, b = max(a, b), min(a, b)
        verb = "Add" if operation == "+" else "Subtract"
        prompt = f"{verb} {spaced(a)} {operation} {spaced(b)}."
        prompt += (RULES if d.scratchpad else BARE_RULES) if d.explain else ""
        result = a + b if operation == "+" else a - b
        return Problem(self.name, prompt, (a, operation, b, result), key_of((a, b)))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """The columns; there is one way only, so `rng` is not used."""
        a, operation, b, result = problem.answer
        if not self.dials.scratchpad:
            return spaced(result)
        return completion("\n".join(columns(a, operation, b)), spaced(result))

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        """correct: the answer is the result, in digits all apart or all together.

        progress: half for columns as they should be, half for digits of the answer, compared from the right (without
        a scratchpad, that half alone).
        """
        a, operation, b, result = problem.answer
        parsed = parse_completion(text) if self.dials.scratchpad else parse_answer(text)
        if parsed is None:
            return scores(False, False, 0.0)
        wanted = columns(a, operation, b)
        credit = 0.5 * matching(lines_of(parsed.thought), wanted) if self.dials.scratchpad else 0.0
        if len(parsed.answer) > 200 or not _NUMBER.fullmatch(parsed.answer):
            return scores(False, False, credit)
        digits = parsed.answer.replace(" ", "")
        credit += 0.5 * matching(list(digits[::-1]), list(str(result)[::-1]))
        return scores(True, digits == str(result), credit)


def key_of(pair: tuple[int, int]) -> str:
    """The unordered pair of operands."""
    return f"{min(pair)},{max(pair)}"


def spaced(number: int) -> str:
    """472 -> `4 7 2`."""
    return " ".join(str(number))


def columns(a: int, operation: str, b: int) -> list[str]:
    """The columns from the right, each with what was carried into it (or borrowed from it)."""
    places = max(len(str(a)), len(str(b)))
    lines, carried = [], 0
    for x, y in zip(map(int, f"{a:0{places}}"[::-1]), map(int, f"{b:0{places}}"[::-1])):
        if operation == "+":
            lines.append(f"{x}+{y}+{carried}={x + y + carried}")
            carried = (x + y + carried) // 10
        else:
            borrowed = x - y - carried < 0
            x += 10 * borrowed
            lines.append(f"{x}-{y}-{carried}={x - y - carried}")
            carried = int(borrowed)
    return lines
