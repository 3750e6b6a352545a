"""Copy or reverse a short sequence: the smallest task there is, learned in seconds.

    Copy k d w.        Reverse k d w.

    k d w              w d k

There is nothing to think about, so the demonstration is the answer alone; a model that thinks first is graded by its
answer.  Symbols stand apart so that each is a token of its own.  The split is by the sequence in either direction:
what is held out for copying is not seen while reversing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pellucid.errors import BadInput
from pellucid.tasks.task import (
    Problem,
    Split,
    check_symbols,
    check_whole,
    draw_in_split,
    matching,
    parse_answer,
    scores,
)

KINDS = ("copy", "reverse", "both")
RULES = " Answer with the symbols only, with a space between them."
_ANSWER = re.compile(r"[A-Za-z0-9](?: [A-Za-z0-9])*")


@dataclass(frozen=True)
class CopyingDials:
    min_length: int = 3
    """The fewest symbols."""
    max_length: int = 6
    """The most symbols."""
    symbols: str = "abcdefghij"
    """What sequences are made of."""
    kind: str = "both"
    """copy, reverse, or both (half and half)."""
    explain: bool = False
    """Spell out the rules in the prompt, for models that have not learned from the demonstrations."""

    def __post_init__(self) -> None:
        check_whole(self, "min_length", 1, 100)
        check_whole(self, "max_length", self.min_length, 100)
        check_symbols(self, "symbols", 2)
        if self.kind not in KINDS:
            raise BadInput(f"CopyingDials.kind={self.kind!r} is not usable", f"it is one of {', '.join(KINDS)}",
                           "choose one of these")


class Copying:
    """See the module.  `Problem.answer` is what to write."""

    name = "copying"

    def __init__(self, dials: CopyingDials | None = None):
        self.dials = dials or CopyingDials()

    def sample(self, rng: random.Random, split: Split) -> Problem:
        """A uniform length, then uniform symbols."""
        d = self.dials

        def draw(rng: random.Random) -> list[str]:
            return rng.choices(d.symbols, k=rng.randint(d.min_length, d.max_length))

        shown = draw_in_split(rng, split, self.name, draw, key_of)
        reverse = rng.random() < 0.5 if d.kind == "both" else d.kind == "reverse"
        prompt = f"{'Reverse' if reverse else 'Copy'} {' '.join(shown)}." + (RULES if d.explain else "")
        return Problem(self.name, prompt, " ".join(shown[::-1] if reverse else shown), key_of(shown))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """The answer; `rng` is not used."""
        return problem.answer

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        """correct: exactly the symbols, with single spaces.  progress: share of places with the right symbol."""
        parsed = parse_answer(text)
        if parsed is None or len(parsed.answer) > 1000 or not _ANSWER.fullmatch(parsed.answer):
            return scores(False, False, 0.0)
        credit = matching(parsed.answer.split(" "), problem.answer.split(" "))
        return scores(True, parsed.answer == problem.answer, credit)


def key_of(shown: Sequence[str]) -> str:
    """The sequence or its reverse, whichever comes first in the alphabet."""
    return " ".join(min(list(shown), list(shown)[::-1]))
