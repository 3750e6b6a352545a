"""A question that takes several calls of a tool: each answer is the key to the next (multi-turn tool calling).

    user       What is the pet of the boss of Ann?
    assistant  <think>
               the boss of Ann
               </think>

               <tool_call>
               {"name": "lookup", "arguments": {"key": "Ann.boss"}}
               </tool_call>
    tool       Tom
    assistant  <think>
               Tom, the pet
               </think>

               <tool_call>
               {"name": "lookup", "arguments": {"key": "Tom.pet"}}
               </tool_call>
    tool       cat
    assistant  <think>
               cat
               </think>

               cat

What the tool knows is drawn anew for each problem, so it cannot be learned by heart, and an answer counts only if it
was really looked up: the grader replays the calls and believes no reply that a completion writes itself.  Wrong keys
lead to wrong but plausible answers (Ann has a pet, too).  The split is by the question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pellucid.tasks.task import (
    Problem,
    Split,
    check_whole,
    completion,
    draw_in_split,
    parse_completion,
    scores,
)
from pellucid.tasks.tools import call_text, parse_call

LOOKUP_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
    },
}
PEOPLE = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jack", "Kim", "Leo", "Mia", "Ned", "Olga",
          "Paul", "Rita", "Sam", "Tom", "Uma", "Vera", "Will", "Yan", "Zoe")
PERSONAL = ("boss", "friend", "neighbour", "teacher")  # relations whose value is a person
PLAIN: dict[str, tuple[str, ...]] = {
    "pet": ("cat", "dog", "fox", "hen", "owl", "rat", "bee", "cow", "pig", "ant"),
    "city": ("Rome", "Oslo", "Lima", "Cork", "Bonn", "Nice", "Kyoto", "Graz", "Pisa", "Baku"),
    "colour": ("red", "blue", "green", "white", "black", "grey", "pink", "gold", "brown", "lilac"),
    "food": ("rice", "soup", "bread", "fish", "cake", "corn", "beans", "eggs", "pie", "figs"),
}
RULES = (' Think between <think> and </think>, then call lookup with a key such as "Ann.boss", or give the answer as one'
         " word once you know it.")
UNKNOWN = "error: nothing is known by this key"
_WORD = re.compile(r"[A-Za-z]{1,20}")


@dataclass(frozen=True)
class LookupDials:
    min_calls: int = 2
    """The fewest calls a question needs."""
    max_calls: int = 2
    """The most calls a question needs."""
    spare_calls: int = 2
    """How many calls more than needed are answered before the episode ends."""
    explain: bool = False
    """Spell out the rules in the prompt, for models that have not learned from the demonstrations."""

    def __post_init__(self) -> None:
        check_whole(self, "min_calls", 1, 6)
        check_whole(self, "max_calls", self.min_calls, 6)
        check_whole(self, "spare_calls", 0, 10)


class Lookup:
    """See the module; a `Dialogue`.  `Problem.answer` is (keys to look up in order, value, everything the tool knows)."""

    name = "lookup"
    schemas = [LOOKUP_SCHEMA]

    def __init__(self, dials: LookupDials | None = None):
        self.dials = dials or LookupDials()

    @property
    def max_turns(self) -> int:
        return self.dials.max_calls + self.dials.spare_calls + 1

    def sample(self, rng: random.Random, split: Split) -> Problem:
        """Person, relations and everything that is known are uniform; the people on the way are all different."""
        d = self.dials

        def draw(rng: random.Random) -> tuple[str, ...]:
            personal = rng.choices(PERSONAL, k=rng.randint(d.min_calls, d.max_calls) - 1)
            return rng.choice(PEOPLE), *personal, rng.choice(sorted(PLAIN))

        person, *relations = draw_in_split(rng, split, self.name, draw, question)
        others = [other for other in PEOPLE if other != person]
        way = [person, *rng.sample(others, len(relations) - 1)]
        known: dict[str, str] = {}
        for someone in way:
            known |= {f"{someone}.{relation}": rng.choice(PEOPLE) for relation in PERSONAL}
            known |= {f"{someone}.{relation}": rng.choice(values) for relation, values in PLAIN.items()}
        keys = [f"{someone}.{relation}" for someone, relation in zip(way, relations)]
        known |= dict(zip(keys, way[1:]))
        asked = question((person, *relations))
        return Problem(self.name, asked + (RULES if d.explain else ""), (tuple(keys), known[keys[-1]], known), asked,
                       tools=("lookup",))

    # --- one turn -----------------------------------------------------------------------------------------------------

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """The first turn; `dialogue` has them all."""
        return self.turns(problem)[0]

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        """The first turn by itself: correct if it looks up the right key; half the credit for the right person."""
        key = call_in(text)
        if key is None:
            return scores(False, False, 0.0)
        wanted = problem.answer[0][0]
        return scores(True, key == wanted, 0.5 * (key.partition(".")[0] == wanted.partition(".")[0]))

    # --- the whole dialogue -------------------------------------------------------------------------------------------

    def reply(self, problem: Problem, turns: Sequence[str]) -> str | None:
        """What the tool says to the call in the last turn; None after an answer, a broken turn or too many calls."""
        key = call_in(turns[-1])
        if key is None or len(turns) >= self.max_turns:
            return None
        return problem.answer[2].get(key, UNKNOWN)

    def grade_turns(self, problem: Problem, turns: Sequence[str]) -> dict[str, float]:
        """format: every turn but the last is a call, the last is an answer of one word.

        correct: the answer is the value, and all the keys that lead to it were looked up, in order.
        progress: equal shares for each key looked up in order, and for the answer after them.
        """
        keys, value, _ = problem.answer
        if not turns or len(turns) > self.max_turns:
            return scores(False, False, 0.0)
        asked = [call_in(turn) for turn in turns[:-1]]
        found = 0
        for key in asked:
            found += found < len(keys) and key == keys[found]
        last = parse_completion(turns[-1])
        formed = None not in asked and last is not None and _WORD.fullmatch(last.answer) is not None
        if call_in(turns[-1]) is not None:  # cut off before the answer: the call in it counts, too
            found += found < len(keys) and call_in(turns[-1]) == keys[found]
        correct = formed and found == len(keys) and last is not None and last.answer == value
        return scores(formed, correct, found / (len(keys) + 1))

    def dialogue(self, problem: Problem, rng: random.Random) -> list[dict[str, str]]:
        """user, assistant, tool, ..., assistant; the shortest way."""
        messages, turns = [{"role": "user", "content": problem.prompt}], self.turns(problem)
        for number, turn in enumerate(turns, 1):
            messages.append({"role": "assistant", "content": turn})
            if (answer := self.reply(problem, turns[:number])) is not None:
                messages.append({"role": "tool", "content": answer})
        return messages

    def turns(self, problem: Problem) -> list[str]:
        """The assistant's turns on the shortest way."""
        keys, value, _ = problem.answer
        turns = []
        for number, key in enumerate(keys):
            person, _, relation = key.partition(".")
            thought = f"{person}, the {relation}" if number else f"the {relation} of {person}"
            turns.append(completion(thought, call_text("lookup", "key", key)))
        return [*turns, completion(value, value)]


def question(drawn: Sequence[str]) -> str:
    """(Ann, boss, pet) -> `What is the pet of the boss of Ann?`"""
    person, *relations = drawn
    return f"What is {' of '.join(f'the {relation}' for relation in reversed(relations))} of {person}?"


def call_in(turn: str) -> str | None:
    """The key that a turn looks up, if it is one thought and one well-formed call."""
    parsed = parse_completion(turn)
    return parse_call(parsed.answer, "lookup", "key") if parsed else None
