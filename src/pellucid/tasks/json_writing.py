"""Write a JSON object of a given shape: the form is everything, the values are free.

    Write JSON: name text, age number, tags 2 texts.
    <think>
    "name": "oak"
    "age": 7
    "tags": ["red", "sun"]
    </think>

    {"name": "oak", "age": 7, "tags": ["red", "sun"]}

Graded by parsing, strictly: RFC 8259 (no NaN), no key twice, exactly the keys asked for, each with a value of its type.
The split is by the set of fields with their types, in any order.
"""

from __future__ import annotations

import json
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
from pellucid.tasks.tools import without_duplicates

KEYS = ("name", "age", "city", "tags", "size", "open", "code", "team", "note", "rank", "kind", "list")
WORDS = ("oak", "red", "sun", "sea", "fox", "map", "ice", "jam", "key", "lot", "win", "yes")
RULES = (" Write each member on a line between <think> and </think>, then answer with the JSON object only."
         " text is a string, number a whole number, flag true or false.")
MAX_CHARS = 2000

Field = tuple[str, str]  # key, type: "text", "number", "flag", or a list such as "2 texts", "3 numbers"


@dataclass(frozen=True)
class JsonWritingDials:
    min_fields: int = 2
    """The fewest members."""
    max_fields: int = 4
    """The most members."""
    max_items: int = 3
    """The longest list; 1: no lists."""
    explain: bool = False
    """Spell out the rules in the prompt, for models that have not learned from the demonstrations."""

    def __post_init__(self) -> None:
        check_whole(self, "min_fields", 1, len(KEYS))
        check_whole(self, "max_fields", self.min_fields, len(KEYS))
        check_whole(self, "max_items", 1, 9)


class JsonWriting:
    """See the module.  `Problem.answer` is the fields, (key, type) each."""

    name = "json"

    def __init__(self, dials: JsonWritingDials | None = None):
        self.dials = dials or JsonWritingDials()

    def sample(self, rng: random.Random, split: Split) -> Problem:
        """Different keys in uniform order, each with a uniform type."""
        d = self.dials
        types = ["text", "number", "flag"]
        types += [f"{n} {kind}s" for n in range(2, d.max_items + 1) for kind in ("text", "number")]

        def draw(rng: random.Random) -> tuple[Field, ...]:
            return tuple((key, rng.choice(types)) for key in rng.sample(KEYS, rng.randint(d.min_fields, d.max_fields)))

        fields = draw_in_split(rng, split, self.name, draw, key_of)
        prompt = f"Write JSON: {', '.join(f'{k} {t}' for k, t in fields)}." + (RULES if d.explain else "")
        return Problem(self.name, prompt, fields, key_of(fields))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """An object with values of our choice, member by member and then whole."""
        members = [f"{json.dumps(key)}: {json.dumps(example(kind, rng))}" for key, kind in problem.answer]
        return completion("\n".join(members), "{" + ", ".join(members) + "}")

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        """format: a JSON object and nothing else.  correct: its members are the asked ones, each of its type.

        progress: the share of right members; missing and surplus ones count against it.
        """
        parsed = parse_completion(text)
        members = parse_object(parsed.answer) if parsed else None
        if members is None:
            return scores(False, False, 0.0)
        right = sum(key in members and has_type(members[key], kind) for key, kind in problem.answer)
        share = right / max(len(problem.answer), len(members))
        return scores(True, share == 1.0, share)


def key_of(fields: Sequence[Field]) -> str:
    """The fields in alphabetical order."""
    return ", ".join(f"{key} {kind}" for key, kind in sorted(fields))


def example(kind: str, rng: random.Random) -> Any:
    """A value of that type."""
    if kind == "flag":
        return rng.random() < 0.5
    if kind in ("text", "number"):
        return rng.choice(WORDS) if kind == "text" else rng.randrange(100)
    count, _, items = kind.partition(" ")
    return [example(items.removesuffix("s"), rng) for _ in range(int(count))]


def has_type(value: Any, kind: str) -> bool:
    """Whether a parsed value has the type; True is no number, and 7.0 is not written as a whole number."""
    if kind in ("text", "number", "flag"):
        return type(value) is {"text": str, "number": int, "flag": bool}[kind]
    count, _, items = kind.partition(" ")
    return isinstance(value, list) and len(value) == int(count) and all(has_type(v, items[:-1]) for v in value)


def parse_object(answer: str) -> dict[str, Any] | None:
    """The members of a JSON object that is the whole of `answer`, else None."""
    if len(answer) > MAX_CHARS or re.search(r"[^ -~\n]", answer):
        return None

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(answer, object_pairs_hook=without_duplicates, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
