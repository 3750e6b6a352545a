"""Prompts from a data set as a task for the online loop: what is asked comes from its rows, what is earned from rewards.

    task = Prompts.open("prompts.jsonl")           any format that has a prompt: trl's, ShareGPT's, verl's (data/formats.py)
    OnlineLoop(model, tokenizer, task, config, rewards=reward_set(["rewards.py:short"]))

The split is by a hash of the prompt, so the same prompt is on the same side in every run. Training goes through the rows in
a new order each epoch; where it stands is part of a run's state. All other columns go to the reward functions, by name.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pellucid import events
from pellucid.align.answers import Shuffled
from pellucid.data.formats import Content, PromptRecord
from pellucid.data.formats_files import open_data
from pellucid.data.split import divide_by
from pellucid.errors import BadInput
from pellucid.tasks import TOOLS, Dialogue, Problem, Split

NAME = "data"


@dataclass(frozen=True)
class Row(Problem):
    """A row of a data set as a problem; `prompt` is for people, `content` is what the model reads."""

    content: Content = ""
    """A text, or messages."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The other columns."""
    schemas: list[dict[str, Any]] | None = None
    """Tools that the chat template is told of."""


class Prompts:
    """Rows of a data set, some held out. A `Task` without grades of its own."""

    name = NAME
    dials = None
    weights: Mapping[str, float] = {}

    def __init__(self, records: Iterable[PromptRecord], seed: int = 0, source: str = "the data"):
        self.train, self.heldout = divide_by(map(row_of, records), lambda row: row.key, source, "rows")
        every = set().union(*(row.columns for row in self.train + self.heldout))
        self.train, self.heldout = ([_filled(row, every) for row in side] for side in (self.train, self.heldout))
        self.columns = sorted(every)
        self._stream = Shuffled(len(self.train), 1, seed)

    @classmethod
    def open(cls, source: str, split: str = "train", seed: int = 0) -> Prompts:
        """The prompts of a file, a folder or a Hub id. Errors: BadInput."""
        return cls(open_data(source, split, wanted="prompt-only"), seed, source)  # type: ignore[arg-type]

    def keep(self, fits: Callable[[Row], bool], why: str) -> None:
        """Leaves out the rows that do not fit, and says how many; before the run, since one of them would end it. Errors: BadInput."""
        sides = [[row for row in side if fits(row)] for side in (self.train, self.heldout)]
        left = len(self.train) + len(self.heldout) - sum(map(len, sides))
        if not all(sides):
            raise BadInput(f"{left} prompts {why}", f"none is left to {'measure' if sides[0] else 'learn from'}", "shorten the prompts, or use fewer --max-tokens")
        if left:
            events.note(f"{left} of {left + sum(map(len, sides))} prompts {why} and are left out", "warning")
            self.train, self.heldout = sides
            self._stream = Shuffled(len(self.train), 1, self._stream.seed)

    @property
    def epochs(self) -> float:
        """How often the rows were gone through."""
        return self._stream.taken / len(self.train)

    def sample(self, rng: random.Random, split: Split) -> Row:
        """The next row to train on (`rng` has no say), or one of those held out."""
        return self.train[self._stream.next()[0]] if split == "train" else rng.choice(self.heldout)

    def measured(self, n: int, seed: int = 0) -> list[Problem]:
        """Up to n different rows that were held out."""
        return list(random.Random(seed).sample(self.heldout, min(n, len(self.heldout))))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """The row's own completion, where the data have them."""
        said = problem.columns.get("completion") if isinstance(problem, Row) else None
        if said is None:
            raise BadInput("these data have prompts only", "nothing shows how to answer them", "give rows with a completion")
        return said if isinstance(said, str) else str(said[-1]["content"])

    def grade(self, problem: Problem, completion: str) -> dict[str, float]:
        """Nothing: rewards grade."""
        return {}

    def state(self) -> dict[str, int]:
        return self._stream.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self._stream.load_state(state)


def row_of(record: PromptRecord) -> Row:
    """`answer` is the column that names the right answer, under one of the usual names, for people and graders."""
    content, columns = record.prompt, dict(record.extra)
    text = content if isinstance(content, str) else str(content[-1].get("content") or "")
    answer = next((columns[name] for name in ("answer", "solution", "ground_truth") if name in columns), None)
    return Row(NAME, text, answer, str(content), (), content, columns, record.tools)


def _filled(row: Row, columns: set[str]) -> Row:
    """With None for the columns that other rows have, as reward functions get them whatever rows stand beside each other. (`answer` is
    also found under other names.)"""
    lacking = columns - set(row.columns) - {"answer"}
    return replace(row, columns={**row.columns, **dict.fromkeys(sorted(lacking))}) if lacking else row


def content_of(problem: Problem) -> Content:
    """What a problem asks, as the model is asked it."""
    return problem.content if isinstance(problem, Row) else [{"role": "user", "content": problem.prompt}]


def schemas_of(problem: Problem, dialogue: Dialogue | None) -> list[dict[str, Any]] | None:
    """The tools of a row, of a dialogue, or those of a problem that the package knows."""
    if isinstance(problem, Row):
        return problem.schemas
    if dialogue is not None:
        return dialogue.schemas
    return [TOOLS[name].schema for name in problem.tools if name in TOOLS] or None
