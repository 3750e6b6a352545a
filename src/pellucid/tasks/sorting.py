"""Sorting by selection.  Each line of the thought takes the smallest number and lists what is left.

    Sort 52,7,31,88.
    <think>
    7<52,31,88
    31<52,88
    52<88
    </think>

    7,31,52,88

A line reads as a true statement (7 is less than 52, 31 and 88); what is left keeps its order, so that every step is
"find the smallest" and "copy without it".  The split is by the three largest numbers, which every remaining list of
three or more shares with the whole: neither a held-out set in any order nor a remaining list of a longer problem that
equals a held-out set occurs in training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pellucid.tasks.task import (
    Problem,
    Split,
    check_whole,
    completion,
    draw_in_split,
    lines_of,
    matching,
    parse_completion,
    scores,
)

RULES = (" Take the smallest again and again between <think> and </think>,"
         " then answer with the sorted numbers only, separated by commas.")
_LIST = re.compile(r"(?:0|[1-9][0-9]{0,5})(?:, ?(?:0|[1-9][0-9]{0,5}))*")


@dataclass(frozen=True)
class SortingDials:
    min_count: int = 4
    """The fewest numbers to sort."""
    max_count: int = 6
    """The most numbers to sort."""
    max_number: int = 99
    """The largest number; all are different."""
    explain: bool = False
    """Spell out the rules in the prompt, for models that have not learned from the demonstrations."""

    def __post_init__(self) -> None:
        check_whole(self, "min_count", 3, 50)
        check_whole(self, "max_count", self.min_count, 50)
        check_whole(self, "max_number", self.max_count, 9999)


class Sorting:
    """See the module.  `Problem.answer` is the numbers as in the prompt."""

    name = "sorting"

    def __init__(self, dials: SortingDials | None = None):
        self.dials = dials or SortingDials()

    def sample(self, rng: random.Random, split: Split) -> Problem:
        """A uniform count, then different numbers in uniform order."""
        d = self.dials

        def draw(rng: random.Random) -> list[int]:
            return rng.sample(range(d.max_number + 1), rng.randint(d.min_count, d.max_count))

        numbers = draw_in_split(rng, split, self.name, draw, key_of)
        prompt = f"Sort {joined(numbers)}." + (RULES if d.explain else "")
        return Problem(self.name, prompt, tuple(numbers), key_of(numbers))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """Selection sort; there is one way only, so `rng` is not used."""
        return completion("\n".join(selections(problem.answer)), joined(sorted(problem.answer)))

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        """correct: the answer lists the numbers in ascending order.

        progress: half for lines as they should be, half for places of the answer that hold the right number.
        """
        parsed = parse_completion(text)
        if parsed is None:
            return scores(False, False, 0.0)
        credit = 0.5 * matching(lines_of(parsed.thought), selections(problem.answer))
        if len(parsed.answer) > 1000 or not _LIST.fullmatch(parsed.answer):
            return scores(False, False, credit)
        given = parsed.answer.replace(" ", "").split(",")
        wanted = [str(n) for n in sorted(problem.answer)]
        return scores(True, given == wanted, credit + 0.5 * matching(given, wanted))


def key_of(numbers: Iterable[int]) -> str:
    """The three largest numbers."""
    return joined(sorted(numbers)[-3:])


def joined(numbers: Iterable[int]) -> str:
    """`7,31,52`: no spaces, which would be tokens of their own."""
    return ",".join(map(str, numbers))


def selections(numbers: Iterable[int]) -> list[str]:
    """The lines of a selection sort, until one number is left."""
    left, lines = list(numbers), []
    while len(left) > 1:
        smallest = min(left)
        left.remove(smallest)
        lines.append(f"{smallest}<{joined(left)}")
    return lines
