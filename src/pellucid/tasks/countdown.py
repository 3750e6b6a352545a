"""Countdown: make a target from given numbers, each used once.  The thought is a search that can be watched.

    Make 26 from 4,12,18.
    <think>
    18-12=6,6*4=24 no
    18-4=14,14+12=26 yes
    </think>

    (18-4)+12

Every step puts the larger number first, so that a fact is seen in one order only and nothing turns negative; wrong
tries come nearer and nearer.  The answer is the last step of the last line with its intermediate result written out.
The split is by the sorted numbers: a held-out set never occurs in training, whatever the target.
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple

from pellucid.errors import BadInput
from pellucid.tasks import expression
from pellucid.tasks.task import (
    Problem,
    Split,
    check_operations,
    check_whole,
    completion,
    draw_in_split,
    lines_of,
    parse_completion,
    scores,
)

OPERATIONS = "+-*"
RULES = (" Use each number exactly once, with + - * and brackets. Think between <think> and </think>,"
         " then answer with the expression only.")
_STEP = re.compile(r"([0-9]{1,4})([-+*])([0-9]{1,4})=([0-9]{1,8})")


@dataclass(frozen=True)
class CountdownDials:
    count: int = 3
    """How many numbers are given (2 to 4)."""
    max_number: int = 20
    """The largest given number."""
    max_value: int = 99
    """The largest intermediate result and target in demonstrations (two digits are one token)."""
    operations: str = OPERATIONS
    """Operations a solution may need."""
    max_tries: int = 4
    """The most tries a demonstration shows, the right one included."""
    explain: bool = False
    """Spell out the rules in the prompt, for models that have not learned from the demonstrations."""

    def __post_init__(self) -> None:
        check_whole(self, "count", 2, 4)
        check_whole(self, "max_number", 2, 99)
        check_whole(self, "max_value", self.max_number, 9999)
        check_whole(self, "max_tries", 1, 20)
        check_operations(self, OPERATIONS)


class Step(NamedTuple):
    """One operation of a try."""

    left: int
    operator: str
    right: int
    value: int

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.value}"


class Try(NamedTuple):
    """One way to use all numbers: its steps in order, and the whole as an expression."""

    steps: tuple[Step, ...]
    expression: str

    @property
    def value(self) -> int:
        return self.steps[-1].value


class Countdown:
    """See the module.  `Problem.answer` is (numbers as in the prompt, target)."""

    name = "countdown"

    def __init__(self, dials: CountdownDials | None = None):
        self.dials = dials or CountdownDials()

    def sample(self, rng: random.Random, split: Split) -> Problem:
        """Numbers uniform in 1..max_number, then a target uniform over all values that can be reached."""
        d = self.dials

        def draw(rng: random.Random) -> tuple[int, ...]:
            return tuple(rng.randint(1, d.max_number) for _ in range(d.count))

        for _ in range(1000):
            numbers = draw_in_split(rng, split, self.name, draw, key_of)
            if targets := sorted({t.value for t in tries(numbers, d.operations, d.max_value)}):
                break
        else:
            raise BadInput(f"no {split} problem of {self.name} has a solution for these dials",
                           f"only {d.operations} with results in 1..{d.max_value}", "widen the dials")
        target = rng.choice(targets)
        prompt = f"Make {target} from {','.join(map(str, numbers))}." + (RULES if d.explain else "")
        return Problem(self.name, prompt, (numbers, target), key_of(numbers))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """Up to max_tries - 1 wrong tries, then the right one."""
        numbers, target = problem.answer
        every = tries(numbers, self.dials.operations, self.dials.max_value)
        right = next((t for t in every if t.value == target), None)
        if right is None:
            raise BadInput(f"these dials do not reach {target} from {key_of(numbers)}",
                           "the problem was made with other operations or a larger max_value",
                           "demonstrate a problem with the dials that made it")
        shown = [*wrong_tries(every, target, rng, self.dials.max_tries - 1), right]
        return completion("\n".join(line_of(t, target) for t in shown), right.expression)

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        """correct: the answer uses exactly the given numbers and has the target as its exact value.

        progress: half for lines of the search that are lawful (given numbers, true sums, true verdict, no
        repetition), a quarter if one of them reaches the target, a quarter if the answer uses the right numbers.
        """
        numbers, target = problem.answer
        parsed = parse_completion(text)
        if parsed is None:
            return scores(False, False, 0.0)
        lines = lines_of(parsed.thought)
        ends = [lawful_end(line, numbers, target) for line in lines]
        lawful = {line for line, end in zip(lines, ends) if end is not None}
        credit = 0.5 * len(lawful) / len(lines) + 0.25 * (target in ends)
        try:
            tree = expression.parse(parsed.answer, OPERATIONS)
        except expression.ExpressionError:
            return scores(False, False, credit)
        uses_numbers = Counter(expression.leaves(tree)) == Counter(map(Fraction, numbers))
        correct = uses_numbers and expression.value(tree) == target
        return scores(True, correct, credit + 0.25 * uses_numbers)


def key_of(numbers: tuple[int, ...]) -> str:
    """The multiset of the numbers."""
    return ",".join(map(str, sorted(numbers)))


def line_of(attempt: Try, target: int) -> str:
    """A try as a line of the thought: `18-12=6,6*4=24 no`."""
    return ",".join(map(str, attempt.steps)) + (" yes" if attempt.value == target else " no")


def tries(numbers: tuple[int, ...], operations: str, max_value: int) -> tuple[Try, ...]:
    """`every_try` whatever the order of the numbers."""
    return every_try(tuple(sorted(numbers)), operations, max_value)


@functools.lru_cache(maxsize=2048)  # all 1,540 sets of the default dials
def every_try(numbers: tuple[int, ...], operations: str, max_value: int) -> tuple[Try, ...]:
    """Every try whose intermediate values lie in 1..max_value, in a fixed order: large numbers combined first."""
    found: list[Try] = []

    def combine(values: list[tuple[int, str]], steps: tuple[Step, ...]) -> None:
        if len(values) == 1:
            found.append(Try(steps, values[0][1]))
            return
        values = sorted(values, key=lambda pair: -pair[0])
        for i, j in combinations(range(len(values)), 2):
            (a, a_text), (b, b_text) = values[i], values[j]  # a >= b
            rest = [values[k] for k in range(len(values)) if k not in (i, j)]
            for operator in operations:
                result = {"+": a + b, "-": a - b, "*": a * b}[operator]
                if 1 <= result <= max_value:
                    text = f"{bracketed(a_text)}{operator}{bracketed(b_text)}"
                    combine([*rest, (result, text)], (*steps, Step(a, operator, b, result)))

    combine([(n, str(n)) for n in numbers], ())
    return tuple(dict.fromkeys(found))


def bracketed(text: str) -> str:
    """A number as it is, anything longer in brackets."""
    return text if text.isdigit() else f"({text})"


def wrong_tries(every: tuple[Try, ...], target: int, rng: random.Random, most: int) -> list[Try]:
    """A few wrong tries with different results, near misses more likely, ordered from far to near (with noise)."""
    wrong = [t for t in every if t.value != target]
    rng.shuffle(wrong)
    distinct = list({t.value: t for t in wrong}.values())
    noisy = {t: abs(t.value - target) * rng.uniform(0.5, 2.0) for t in distinct}
    nearest_first = sorted(distinct, key=noisy.__getitem__)
    return nearest_first[: rng.randint(0, most)][::-1]


def lawful_end(line: str, numbers: tuple[int, ...], target: int) -> int | None:
    """The result of a line of the search, or None if the line breaks a rule.

    Rules: true sums, each number or intermediate result used once, all of them used, and `yes` exactly at the target.
    """
    body, _, verdict = line.partition(" ")
    steps = body.split(",", len(numbers))
    if len(steps) != len(numbers) - 1:
        return None
    have = Counter(numbers)
    result = 0
    for step in steps:
        found = _STEP.fullmatch(step)
        if not found:
            return None
        left, operator, right, result = int(found[1]), found[2], int(found[3]), int(found[4])
        have.subtract([left, right])
        if min(have.values()) < 0 or {"+": left + right, "-": left - right, "*": left * right}[operator] != result:
            return None
        have[result] += 1
    return result if verdict == ("yes" if result == target else "no") else None
