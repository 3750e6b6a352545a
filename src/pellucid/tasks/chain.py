"""A chain of operations modulo a small number, worked out step by step.  The longer the chain, the longer the thought.

    Modulo 10: 7 +5 *3 -4.
    <think>
    7+5=2
    2*3=6
    6-4=2
    </think>

    2

A line is one of 300 facts (for modulus 10), however long the chain is; at a glance the answer is out of reach.  The
split is by windows of three steps: a chain is held out if any of its windows is, so that no training chain contains a
held-out chain, at its beginning, its end or anywhere inside.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pellucid.tasks.task import (
    Problem,
    Split,
    check_operations,
    check_whole,
    completion,
    draw_in_split,
    is_heldout,
    lines_of,
    matching,
    parse_completion,
    scores,
)

OPERATIONS = "+-*"
WINDOW = 3
RULES = (" Work from left to right, one step a line, between <think> and </think>,"
         " then answer with the last result only.")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class ChainDials:
    min_steps: int = 3
    """The fewest operations."""
    max_steps: int = 6
    """The most operations."""
    modulus: int = 10
    """All results are remainders of a division by it."""
    operations: str = OPERATIONS
    """Which operations occur."""
    explain: bool = False
    """Spell out the rules in the prompt, for models that have not learned from the demonstrations."""

    def __post_init__(self) -> None:
        check_whole(self, "min_steps", WINDOW, 100)
        check_whole(self, "max_steps", self.min_steps, 100)
        check_whole(self, "modulus", 3, 1000)
        check_operations(self, OPERATIONS)


class Chain:
    """See the module.  `Problem.answer` is (start, steps such as "+5", modulus)."""

    name = "chain"

    def __init__(self, dials: ChainDials | None = None):
        self.dials = dials or ChainDials()

    def sample(self, rng: random.Random, split: Split) -> Problem:
        """A uniform length, then uniform operations and operands.

        On the training side each step is drawn again until its window is a training window: of long chains, hardly
        any would be without a held-out window by chance.
        """
        d = self.dials

        def step(rng: random.Random) -> str:
            return f"{rng.choice(d.operations)}{rng.randint(1, d.modulus - 1)}"

        def draw(rng: random.Random) -> list[str]:
            steps: list[str] = []
            for _ in range(rng.randint(d.min_steps, d.max_steps)):
                new = step(rng)
                for _ in range(50 if split == "train" and len(steps) >= WINDOW - 1 else 0):
                    if not is_heldout(self.name, windows([*steps, new])[-1]):
                        break
                    new = step(rng)
                steps.append(new)
            return steps

        steps = draw_in_split(rng, split, self.name, draw, key_of)
        start = rng.randrange(d.modulus)
        prompt = f"Modulo {d.modulus}: {start} {' '.join(steps)}." + (RULES if d.explain else "")
        return Problem(self.name, prompt, (start, tuple(steps), d.modulus), key_of(steps))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """One line a step; there is one way only, so `rng` is not used."""
        lines = worked(*problem.answer)
        return completion("\n".join(lines), lines[-1].split("=")[1])

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        """correct: the answer is the last result.  progress: the share of lines that are as they should be.

        The answer alone earns no partial credit: one of ten is right by chance.
        """
        parsed = parse_completion(text)
        if parsed is None:
            return scores(False, False, 0.0)
        wanted = worked(*problem.answer)
        credit = matching(lines_of(parsed.thought), wanted)
        if not _NUMBER.fullmatch(parsed.answer):
            return scores(False, False, credit)
        return scores(True, parsed.answer == wanted[-1].split("=")[1], credit)


def windows(steps: Sequence[str]) -> list[str]:
    """Every run of three steps, as text."""
    return [" ".join(steps[i : i + WINDOW]) for i in range(len(steps) - WINDOW + 1)]


def key_of(steps: Sequence[str]) -> str:
    """The first window that is held out, else the first window."""
    every = windows(steps)
    return next((window for window in every if is_heldout(Chain.name, window)), every[0])


def worked(start: int, steps: Sequence[str], modulus: int) -> list[str]:
    """The lines of the thought."""
    value, lines = start, []
    for step in steps:
        operand = int(step[1:])
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[step[0]] % modulus
        lines.append(f"{value}{step}={result}")
        value = result
    return lines
