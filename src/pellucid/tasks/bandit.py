"""A bandit whose every outcome can be listed: what an estimator of the policy gradient should give is then known.

    Pull 3 1.     ->     b d

There are `arms`^`pulls` answers.  Pulling arm a at place t under the shown number c pays what arm (a + c) modulo the
number of arms pays at that place, a fixed number in [0, 1]; `payoff` is the mean over places.  So J = sum over outcomes
of probability x payoff and its gradient can be computed exactly (`outcomes`, `payoff_of`), and a policy that has learned
the rule knows the best answer for numbers that it has never seen.  The split is by the shown numbers.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from pellucid.tasks.task import Problem, Split, check_symbols, check_whole, draw_in_split, parse_answer, scores

RULES = " Answer with one letter for each number, with a space between them."


@dataclass(frozen=True)
class BanditDials:
    arms: str = "abcd"
    """One letter for each arm."""
    pulls: int = 2
    """Letters in an answer."""
    contexts: int = 30
    """The shown numbers are smaller than this."""
    seed: int = 0
    """Which arm pays what."""
    explain: bool = False
    """Spell out the rules in the prompt, for models that have not learned from the demonstrations."""

    def __post_init__(self) -> None:
        check_symbols(self, "arms", 2)
        check_whole(self, "pulls", 1, 8)
        check_whole(self, "contexts", 2, 1000)
        check_whole(self, "seed", 0, 2**31)


class Bandit:
    """See the module.  `Problem.answer` is the shown numbers."""

    name = "bandit"
    weights = {"payoff": 1.0}

    def __init__(self, dials: BanditDials | None = None):
        self.dials = dials or BanditDials()
        rng, n = random.Random(self.dials.seed), len(self.dials.arms)
        self.table = [[pay / (n - 1) for pay in rng.sample(range(n), n)] for _ in range(self.dials.pulls)]

    def sample(self, rng: random.Random, split: Split) -> Problem:
        """Uniform numbers."""
        d = self.dials

        def draw(rng: random.Random) -> tuple[int, ...]:
            return tuple(rng.randrange(d.contexts) for _ in range(d.pulls))

        shown = draw_in_split(rng, split, self.name, draw, key_of)
        return Problem(self.name, f"Pull {' '.join(map(str, shown))}." + (RULES if d.explain else ""), shown, key_of(shown))

    def outcomes(self) -> list[str]:
        """Every answer there is, in a fixed order."""
        return [" ".join(letters) for letters in itertools.product(self.dials.arms, repeat=self.dials.pulls)]

    def payoff_of(self, problem: Problem, outcome: str) -> float:
        """The payoff of one of `outcomes()`."""
        arms = self.dials.arms
        paid = [row[(arms.index(letter) + shown) % len(arms)]
                for row, letter, shown in zip(self.table, outcome.split(" "), problem.answer)]
        return sum(paid) / len(paid)

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """The best answer, which is one only; `rng` is not used."""
        arms = self.dials.arms
        return " ".join(arms[(row.index(1.0) - shown) % len(arms)] for row, shown in zip(self.table, problem.answer))

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        """`payoff` in [0, 1], 0 for what is no answer; correct: the best answer."""
        parsed = parse_answer(text)
        letters = parsed.answer.split(" ", self.dials.pulls) if parsed else []
        if len(letters) != self.dials.pulls or any(len(a) != 1 or a not in self.dials.arms for a in letters):
            return scores(False, False, 0.0) | {"payoff": 0.0}
        payoff = self.payoff_of(problem, " ".join(letters))
        return scores(True, payoff == 1.0, payoff) | {"payoff": payoff}


def key_of(shown: Sequence[int]) -> str:
    """The shown numbers."""
    return " ".join(map(str, shown))
