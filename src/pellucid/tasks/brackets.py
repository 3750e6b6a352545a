"""Close what is open: the stack of brackets, character by character (the Dyck languages of BIG-bench).

    Close ([]{(
    <think>
    ( (
    [ ([
    ] (
    { ({
    ( ({(
    </think>

    )})

A line shows the next bracket and what is open after it.  The split is by the answer: which brackets are open in the
end, whatever stood between them.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from pellucid.errors import BadInput
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

PAIRS = {"(": ")", "[": "]", "{": "}"}
RULES = (" Write each bracket with those that are open after it, one a line, between <think> and </think>,"
         " then answer with the missing closing brackets only.")
_ANSWER = re.compile(r"[)\]}]+")


@dataclass(frozen=True)
class BracketsDials:
    min_open: int = 3
    """The fewest brackets left open."""
    max_open: int = 6
    """The most brackets open at once."""
    closed: int = 4
    """The most pairs that are opened and closed again on the way."""
    kinds: str = "([{"
    """Which opening brackets occur: two or three of ( [ {"""
    explain: bool = False
    """Spell out the rules in the prompt, for models that have not learned from the demonstrations."""

    def __post_init__(self) -> None:
        check_whole(self, "min_open", 2, 30)
        check_whole(self, "max_open", self.min_open, 30)
        check_whole(self, "closed", 0, 40)
        kinds = self.kinds
        if not isinstance(kinds, str) or len(kinds) < 2 or len(set(kinds)) != len(kinds) or set(kinds) - set(PAIRS):
            raise BadInput(f"BracketsDials.kinds={kinds!r} is not usable", "it holds two or three of ( [ { without "
                           "repeats (with one kind, only the depth would differ)", "for instance kinds='([{'")


class Brackets:
    """See the module.  `Problem.answer` is the brackets as in the prompt."""

    name = "brackets"

    def __init__(self, dials: BracketsDials | None = None):
        self.dials = dials or BracketsDials()

    def sample(self, rng: random.Random, split: Split) -> Problem:
        """A uniform stack of open brackets, with up to `closed` pairs at uniform places on the way."""
        d = self.dials

        def draw(rng: random.Random) -> str:
            return "".join(rng.choices(d.kinds, k=rng.randint(d.min_open, d.max_open)))

        left = draw_in_split(rng, split, self.name, draw, closing)
        text = left
        for _ in range(rng.randint(0, d.closed)):
            at, kind = rng.randint(0, len(text)), rng.choice(d.kinds)
            longer = text[:at] + kind + PAIRS[kind] + text[at:]
            if max(map(len, stacks(longer))) <= d.max_open:
                text = longer
        prompt = f"Close {text}" + (RULES if d.explain else "")
        return Problem(self.name, prompt, text, closing(left))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """The stack after each bracket; there is one way only, so `rng` is not used."""
        return completion("\n".join(lines(problem.answer)), closing(problem.answer))

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        """correct: exactly the missing brackets.  progress: half for lines, half for places of the answer."""
        parsed = parse_completion(text)
        if parsed is None:
            return scores(False, False, 0.0)
        credit = 0.5 * matching(lines_of(parsed.thought, 200), lines(problem.answer))
        if len(parsed.answer) > 200 or not _ANSWER.fullmatch(parsed.answer):
            return scores(False, False, credit)
        wanted = closing(problem.answer)
        return scores(True, parsed.answer == wanted, credit + 0.5 * matching(list(parsed.answer), list(wanted)))


def stacks(text: str) -> list[str]:
    """What is open after each bracket of `text`."""
    now, every = "", []
    for bracket in text:
        now = now + bracket if bracket in PAIRS else now[:-1]
        every.append(now)
    return every


def lines(text: str) -> list[str]:
    """The lines of the thought; nothing open is written as a dot."""
    return [f"{bracket} {now or '.'}" for bracket, now in zip(text, stacks(text))]


def closing(text: str) -> str:
    """The brackets that close what `text` leaves open."""
    return "".join(PAIRS[bracket] for bracket in reversed(stacks(text)[-1]))
