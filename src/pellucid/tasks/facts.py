"""Short texts of single operations, for pretraining: what the thoughts of the tasks are made of.

A text is a few lines, each one step as the demonstrations write it (`18-12=6`, `7+6+1=14`, `7<52,31,88`,
`50 minus 12: 50-12`), and never
a whole problem of a task: three numbers with their target, a long sum, a sorted list or a tool call.  Lists whose
sorting is held out, and requests whose tool call is, do not occur either.
"""

from __future__ import annotations

import random

from pellucid.tasks import calculator, sorting
from pellucid.tasks.task import is_heldout

LINES = 12


def facts(rng: random.Random, lines: int = LINES) -> str:
    """`lines` lines of single operations, each of a random kind."""
    kinds = (combine, combine, column_sum, column_difference, smallest, request)
    return "\n".join(rng.choice(kinds)(rng) for _ in range(lines)) + "\n"


def combine(rng: random.Random) -> str:
    """A step of countdown: larger number first, result in 1..99."""
    while True:
        a, b = rng.randint(1, 99), rng.randint(1, 20)
        a, b, operator = max(a, b), min(a, b), rng.choice("+-*")
        if operator == "*":
            a = rng.randint(b, max(b, 99 // b))
        result = {"+": a + b, "-": a - b, "*": a * b}[operator]
        if 1 <= result <= 99:
            return f"{a}{operator}{b}={result}"


def column_sum(rng: random.Random) -> str:
    """A column of an addition, with what was carried in."""
    x, y, carried = rng.randint(0, 9), rng.randint(0, 9), rng.randint(0, 1)
    return f"{x}+{y}+{carried}={x + y + carried}"


def column_difference(rng: random.Random) -> str:
    """A column of a subtraction, ten borrowed where needed."""
    x, y, carried = rng.randint(0, 9), rng.randint(0, 9), rng.randint(0, 1)
    x += 10 * (x < y + carried)
    return f"{x}-{y}-{carried}={x - y - carried}"


def smallest(rng: random.Random) -> str:
    """A line of a selection sort: the smallest, then the others in any order."""
    while True:
        numbers = rng.sample(range(100), rng.randint(2, 5))
        if not is_heldout(sorting.Sorting.name, sorting.key_of(numbers)):
            break
    first, others = min(numbers), [n for n in numbers if n != min(numbers)]
    return f"{first}<{','.join(map(str, others))}"


def request(rng: random.Random) -> str:
    """An operation in words and in symbols, as the calculator task puts it."""
    while True:
        a, operator, b = rng.randint(2, 99), rng.choice("+-*"), rng.randint(2, 99)
        answer = (max(a, b), operator, min(a, b)) if operator == "-" else (a, operator, b)
        if not is_heldout(calculator.Calculator.name, calculator.key_of(answer)):
            return f"{calculator.in_words(answer)}: {calculator.in_symbols(answer)}"
