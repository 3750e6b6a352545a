"""Mini-ToolRL: a tool call whose form and content are rewarded apart, on different scales (after arXiv 2504.13958).

    a47,03=            ->    <a>[a(47,03)]

`format` asks for a short thought in angle brackets before the call, 0 or 1.  `correctness` looks at the call alone,
with or without the thought: 6 (name + first + second) / 3 - 3, so -3, -1, 1 or 3; -3 also where there is no call.  A
sum of the two is ruled by correctness, which is what makes the task a test of how objectives treat several rewards.
`warm_start` gives demonstrations with a chosen share of thoughts and of mistakes, for a policy that starts with one
reward rare and the other common.  The split is by the two numbers, in either order.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from pellucid.tasks.task import Problem, Split, check_symbols, check_whole, draw_in_split, scores

RULES = " Answer in the form <x>[x(12,34)]: the tool's letter in angle brackets, then the call of the tool."
_CALL = re.compile(r"\[([A-Za-z0-9])\(([0-9]{1,9}),([0-9]{1,9})\)\]")
_WHOLE = re.compile(r"<[^<>\[\]\n]{1,20}>(\[[^<>\[\]]*\])")


@dataclass(frozen=True)
class ToolRLDials:
    tools: str = "abcd"
    """One letter for each tool."""
    digits: int = 2
    """Digits of each number."""
    explain: bool = False
    """Spell out the rules in the prompt, for models that have not learned from the demonstrations."""

    def __post_init__(self) -> None:
        check_symbols(self, "tools", 2)
        check_whole(self, "digits", 1, 9)


class ToolRL:
    """See the module.  `Problem.answer` is (tool, first number, second number), all texts."""

    name = "toolrl"
    weights = {"correctness": 1.0, "format": 1.0}

    def __init__(self, dials: ToolRLDials | None = None):
        self.dials = dials or ToolRLDials()

    def sample(self, rng: random.Random, split: Split) -> Problem:
        """Tool and numbers are uniform."""
        d = self.dials

        def draw(rng: random.Random) -> tuple[str, str]:
            first, second = (f"{rng.randrange(10**d.digits):0{d.digits}}" for _ in range(2))
            return first, second

        first, second = draw_in_split(rng, split, self.name, draw, key_of)
        tool = rng.choice(d.tools)
        prompt = f"{tool}{first},{second}=" + (RULES if d.explain else "")
        return Problem(self.name, prompt, (tool, first, second), key_of((first, second)))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """The tool's letter as the thought, then the call; `rng` is not used."""
        return f"<{problem.answer[0]}>{call_text(*problem.answer)}"

    def warm_start(self, problem: Problem, rng: random.Random, thoughts: float = 0.05, mistakes: float = 0.6) -> str:
        """A demonstration that has a thought with chance `thoughts`, and one wrong field with chance `mistakes`."""
        fields = list(problem.answer)
        thought = f"<{fields[0]}>" if rng.random() < thoughts else ""
        if rng.random() < mistakes:
            at = rng.randrange(3)
            wrong = [t for t in self.dials.tools if t != fields[0]] if at == 0 else [
                f"{n:0{self.dials.digits}}" for n in range(10**min(self.dials.digits, 3))]
            fields[at] = rng.choice([w for w in wrong if w != fields[at]])
        return thought + call_text(*fields)

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        """`correct`: form and call are both right.  `correctness` in {-3, -1, 1, 3} judges the call alone."""
        text = text.strip(" \n")
        whole = _WHOLE.fullmatch(text) if len(text) <= 100 else None
        call = _CALL.fullmatch(whole[1] if whole else text) if len(text) <= 100 else None
        right = sum(given == wanted for given, wanted in zip(call.groups(), problem.answer)) if call else 0
        formed = whole is not None and call is not None
        return scores(formed, formed and right == 3, right / 3) | {"correctness": 2.0 * right - 3.0}


def key_of(pair: tuple[str, str]) -> str:
    """The unordered pair of numbers."""
    return ",".join(sorted(pair))


def call_text(tool: str, first: str, second: str) -> str:
    """`[a(47,03)]`"""
    return f"[{tool}({first},{second})]"
