"""Short texts of single operations, for pretraining: what the thoughts of the tasks are made of.

A text is a few lines, each one step as the demonstrations write it (`18-12=6`, `7+6+1=14`, `7<52,31,88`), and never
a whole problem of a task: three numbers with their target, a long sum, a sorted list or a tool call.  Lists whose
sorting is held out do not occur either.
"""

from __future__ import annotations

import random

from pellucid.tasks.sorting import Sorting, key_of
from pellucid.tasks.task import is_heldout

LINES = 12


def facts(rng: random.Random, lines: int = LINES) -> str:
    """`lines` lines of single operations, each of a random kind."""
    kinds = (combine, combine, column_sum, column_difference, smallest, in_words)
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
        if not is_heldout(Sorting.name, key_of(numbers)):
            break
    first, others = min(numbers), [n for n in numbers if n != min(numbers)]
    return f"{first}<{','.join(map(str, others))}"


def in_words(rng: random.Random) -> str:
    """An operation in words and in symbols, with numbers the calculator task never uses together: equal ones."""
    operator, word = rng.choice((("+", "plus"), ("-", "minus"), ("*", "times")))
    return f"{(n := rng.randint(2, 99))} {word} {n}: {n}{operator}{n}"
