"""Rule-based rewards: form, exact match, mathematics, JSON, length.  Each is made by a function and called as any reward.

What they look at is a `part` of the completion: the whole, the `thought` (before `</think>`), or the `answer` (behind it;
the whole where nothing was thought).  Where the right answer is missing they say None.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any, Literal

import regex
import torch

from pellucid.align.components import soft_overlong
from pellucid.align.json_schema import JsonSchema
from pellucid.align.math_answers import final_answer, same_answer
from pellucid.align.rewards import Content, text_of
from pellucid.errors import BadInput

Part = Literal["whole", "thought", "answer"]
Checker = Callable[..., list[float | None]]
PATTERN_SECONDS = 0.1  # for one completion; a pattern that backtracks for longer does not match


def part_of(content: Content, part: Part) -> str:
    """The part of a completion, without outer white space."""
    text = text_of(content)
    if part == "whole":
        return text
    thought, closed, answer = text.rpartition("</think>")
    if part == "answer":
        return answer.strip()
    return thought.strip().removeprefix("<think>").strip() if closed else ""


def matches(pattern: str, part: Part = "whole", seconds: float = PATTERN_SECONDS) -> Checker:
    """1 where the regular expression fits the whole of the part (`.` includes line ends), within bounded time."""
    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except regex.error as error:
        raise BadInput(f"{pattern!r} is no regular expression", str(error), "mend it") from error

    def check(completions: list[Content]) -> list[float | None]:
        return [float(fits(compiled, part_of(content, part), seconds)) for content in completions]

    return check


def fits(compiled: Any, text: str, seconds: float) -> bool:
    """Whether the pattern matches all of `text`; False where that takes too long to find out."""
    try:
        return compiled.fullmatch(text, timeout=seconds) is not None
    except TimeoutError:
        return False


def think() -> Checker:
    """1 where the completion is one `<think>...</think>` and what follows it (trl's `think_format_reward`)."""

    def check(completions: list[Content]) -> list[float | None]:
        texts = map(text_of, completions)
        return [float(t.startswith("<think>") and t.count("<think>") == 1 and "</think>" in t) for t in texts]

    return check


def exact(column: str = "answer", part: Part = "answer", case: bool = True) -> Checker:
    """1 where the part is the text in that column; white space counts as one space, and capitals unless case=False."""

    def same(text: str, wanted: Any) -> float | None:
        if wanted is None:
            return None
        one, other = " ".join(text.split()), " ".join(str(wanted).split())
        return float(one == other if case else one.casefold() == other.casefold())

    return Against(column, lambda content, wanted: same(part_of(content, part), wanted))


def math(column: str = "answer", part: Part = "answer") -> Checker:
    """1 where the final answer (boxed, behind ####, behind "the answer is", or the last number) equals that column's.

    The column may hold a whole solution: what it boxes, or says behind #### or "the answer is", is taken.
    """

    def check(content: Content, wanted: Any) -> float | None:
        gold = None if wanted is None else final_answer(str(wanted), last_number=False) or str(wanted).strip()
        return float(same_answer(final_answer(part_of(content, part)) or "", gold)) if gold else None

    return Against(column, check)


def json_valid(schema: Any = None, column: str | None = None, part: Part = "answer") -> Checker:
    """1 where the part is JSON and nothing else, and fits the schema (given here, or in a column as object or text)."""
    fixed = None if schema is None else JsonSchema(json.loads(schema) if isinstance(schema, str) else schema)

    def check(content: Content, wanted: Any) -> float | None:
        if column is not None and wanted is None:
            return None
        form = fixed if column is None else JsonSchema(json.loads(wanted) if isinstance(wanted, str) else wanted)
        try:
            value = json.loads(part_of(content, part), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return 0.0
        return float(form is None or form.is_valid(value))

    return Against(column, check) if column else lambda completions: [check(content, None) for content in completions]


def overlong(longest: int, margin: int) -> Checker:
    """0 up to `longest - margin` tokens, falling to -1 at `longest` (DAPO's soft overlong punishment)."""
    soft_overlong(torch.zeros(1), longest, margin)  # refuses what does not fit

    def check(completion_ids: list[list[int]]) -> list[float | None]:
        return [*soft_overlong(torch.tensor([float(len(ids)) for ids in completion_ids]), longest, margin).tolist()]

    return check


def within(tokens: int, part: Part | None = None) -> Checker:
    """1 up to that many tokens, falling to 0 at twice as many.  With a part: its characters are counted instead."""
    if tokens < 1:
        raise BadInput(f"within {tokens} tokens nothing can be said", next="give 1 or more")

    def check(completions: list[Content], completion_ids: list[list[int]] | None = None) -> list[float | None]:
        if part is None and completion_ids is None:
            return [None] * len(completions)
        sizes = [len(part_of(c, part)) for c in completions] if part else list(map(len, completion_ids or []))
        return [min(1.0, max(0.0, 2.0 - n / tokens)) for n in sizes]

    return check


def repetition(ngram: int = 3, worst: float = -1.0) -> Checker:
    """`worst` times the share of repeated n-grams of tokens (arXiv 2502.03373, appendix C.2)."""
    if ngram < 1 or worst > 0:
        raise BadInput(f"repetition with ngram={ngram}, worst={worst} is not possible", "ngram is at least 1, worst at most 0")

    def check(completion_ids: list[list[int]]) -> list[float | None]:
        grams = [[tuple(ids[i : i + ngram]) for i in range(len(ids) - ngram + 1)] for ids in completion_ids]
        return [worst * (1 - len(set(g)) / len(g)) if g else 0.0 for g in grams]

    return check


CHECKERS: dict[str, Callable[..., Checker]] = {
    "matches": matches, "think": think, "exact": exact, "math": math, "json": json_valid, "overlong": overlong,
    "within": within, "repetition": repetition}


class Against:
    """A check of each completion against a column; it says which one, so that a missing column is told before the run."""

    def __init__(self, column: str, check: Callable[[Content, Any], float | None]):
        self.column, self.check = column, check
        keyword = inspect.Parameter.KEYWORD_ONLY
        self.__signature__ = inspect.Signature([inspect.Parameter("completions", keyword), inspect.Parameter(column, keyword)])

    def __call__(self, completions: list[Content], **columns: list[Any]) -> list[float | None]:
        return [self.check(content, wanted) for content, wanted in zip(completions, columns[self.column])]


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
