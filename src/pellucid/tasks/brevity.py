"""Accuracy against length: arithmetic with a limit on the thought.

    Add 4 7 2 + 8 6 5. Think in 30 characters.      ... in 10 characters.      ... in 2 characters.
    <think>                                         <think>                    <think>
    2+5+0=7                                         7,13,13
    7+6+0=13                                        </think>                   </think>
    4+8+1=13
    </think>                                        1 3 3 7                    1 3 3 7

    1 3 3 7

The demonstration is the longest of three ways to think that fits the limit.  `length` is 1 within the limit and falls
to 0 at twice the limit; it is rewarded for wrong answers, too, unless the reward is conditioned on `correct` (which is
what GDPO, arXiv 2601.05242, does).  Only a well-formed completion has a length.  The split is by the pair of operands.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from pellucid.tasks.arithmetic import columns, key_of, spaced
from pellucid.tasks.task import (
    Problem,
    Split,
    check_operations,
    check_whole,
    completion,
    draw_in_split,
    matching,
    parse_answer,
    scores,
)

OPERATIONS = "+-"
RULES = (" Think between <think> and </think>, in no more characters than that,"
         " then answer with the number only, its digits apart like here.")
_NUMBER = re.compile(r"[0-9]+|[0-9](?: [0-9])+")


@dataclass(frozen=True)
class BrevityDials:
    min_digits: int = 2
    """The fewest digits an operand has."""
    max_digits: int = 3
    """The most digits an operand has."""
    operations: str = OPERATIONS
    """Which operations are asked for."""
    least: int = 0
    """The tightest limit, in percent of the written-out columns."""
    most: int = 120
    """The loosest limit, in percent of the written-out columns."""
    explain: bool = False
    """Spell out the rules in the prompt, for models that have not learned from the demonstrations."""

    def __post_init__(self) -> None:
        check_whole(self, "min_digits", 1, 30)
        check_whole(self, "max_digits", self.min_digits, 30)
        check_operations(self, OPERATIONS)
        check_whole(self, "least", 0, 1000)
        check_whole(self, "most", self.least, 1000)


class Brevity:
    """See the module.  `Problem.answer` is (a, operation, b, result, limit) with a >= b."""

    name = "brevity"
    weights = {"correct": 1.0, "length": 0.5, "format": 0.2}

    def __init__(self, dials: BrevityDials | None = None):
        self.dials = dials or BrevityDials()

    def sample(self, rng: random.Random, split: Split) -> Problem:
        """Operands as in `arithmetic`; the limit is uniform between `least` and `most`."""
        d = self.dials

        def draw(rng: random.Random) -> tuple[int, int]:
            digits = rng.randint(d.min_digits, d.max_digits)
            low, high = 10 ** (digits - 1), 10**digits - 1
            return rng.randint(low, high), rng.randint(low, high)

        a, b = draw_in_split(rng, split, self.name, draw, key_of)
        operation = rng.choice(d.operations)
        if operation == "-":
            a, b = max(a, b), min(a, b)
        limit = len(ways(a, operation, b)[0]) * rng.randint(d.least, d.most) // 100
        verb = "Add" if operation == "+" else "Subtract"
        prompt = f"{verb} {spaced(a)} {operation} {spaced(b)}. Think in {limit} characters."
        result = a + b if operation == "+" else a - b
        return Problem(self.name, prompt + (RULES if d.explain else ""), (a, operation, b, result, limit), key_of((a, b)))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """The longest of the three ways that fits; `rng` is not used."""
        a, operation, b, result, limit = problem.answer
        thought = next(way for way in ways(a, operation, b) if len(way) <= limit)
        return completion(thought, spaced(result))

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        """correct: the answer is the result, however long the thought.  `length` in [0, 1]: see the module.

        progress: digits of the answer, compared from the right.
        """
        _, _, _, result, limit = problem.answer
        parsed = parse_answer(text)
        if parsed is None or len(parsed.answer) > 200 or not _NUMBER.fullmatch(parsed.answer):
            return scores(False, False, 0.0) | {"length": 0.0}
        digits = parsed.answer.replace(" ", "")
        over = len(parsed.thought) - limit
        length = 1.0 if over <= 0 else max(0.0, 1.0 - over / max(limit, 10))
        credit = matching(list(digits[::-1]), list(str(result)[::-1]))
        return scores(True, digits == str(result), credit) | {"length": length}


def ways(a: int, operation: str, b: int) -> tuple[str, str, str]:
    """Three thoughts, from long to short: the columns, their results, nothing."""
    lines = columns(a, operation, b)
    return "\n".join(lines), ",".join(line.split("=")[1] for line in lines), ""
