"""How well a generator solves a task on problems it has never trained on.

pass@k is the chance that at least one of k completions is correct, estimated without bias from n >= k of them, c
correct (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1):

    pass@k = 1 - C(n - c, k) / C(n, k)

Greedy and sampled accuracy are different measures; the scores say at which temperature they were taken.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pellucid.errors import BadInput
from pellucid.tasks.task import Problem, Split, Task, dialogue_of


@dataclass(frozen=True)
class Completion:
    """What a generator gives back for one draw."""

    text: str
    tokens: int
    """Its length in tokens."""
    finished: bool
    """False when it was cut off at the token limit."""
    turns: tuple[str, ...] = ()
    """The assistant's turns, where the problem was answered in a dialogue; `text` is then for people only."""


Generate = Callable[[list[Problem], int, float], Sequence[Sequence[Completion]]]


@dataclass(frozen=True)
class Sample:
    """One problem with its first completion, for people to read."""

    task: str
    prompt: str
    completion: str
    scores: dict[str, float]
    tokens: int
    finished: bool


@dataclass(frozen=True)
class TaskScores:
    """Means over problems; every rate is in [0, 1]."""

    pass_at_1: float
    """Mean share of correct completions (at temperature 0: greedy accuracy)."""
    pass_at_k: float
    """Chance that one of k is correct."""
    format: float
    """Share of completions in the right form."""
    progress: float
    """Mean partial credit."""
    reasoning: float | None
    """Share of correct completions among those in the right form; None if there are none.  Apart from `format`, so
    that a repaired form is not mistaken for better reasoning."""
    mean_length: float
    """Tokens per completion."""
    truncated: float
    """Share of completions cut off at the token limit."""
    n: int
    """Problems."""
    k: int
    """The k of pass_at_k."""
    draws: int
    """Completions per problem."""
    temperature: float
    standard_error: float
    """Of pass_at_1, over problems."""
    by_task: dict[str, dict[str, Any]]
    """The same means for each task."""
    samples: list[Sample]
    """The first few problems."""

    def record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k draws is correct, from n draws of which c are."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise BadInput(f"pass@{k} cannot be estimated from {n} draws with {c} correct", "it needs 1 <= k <= draws",
                       "raise draws or lower k")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(task: Task, generate: Generate, n: int, k: int = 1, seed: int = 0, *, split: Split = "heldout",
             draws: int | None = None, temperature: float | None = None, keep: int = 8) -> TaskScores:
    """Score `generate` on n distinct problems, equal for equal seeds.

    generate(problems, draws, temperature) gives `draws` completions for each problem.  draws: k unless given;
    temperature: 0 (greedy) for one draw, 1 for more, unless given.  keep: how many samples to return.
    """
    draws = k if draws is None else draws
    temperature = (0.0 if draws == 1 else 1.0) if temperature is None else temperature
    if n < 1 or not 1 <= k <= draws:
        raise BadInput(f"cannot evaluate with n={n}, k={k}, draws={draws}", "it needs n >= 1 and 1 <= k <= draws",
                       "for instance n=200, k=8")
    if draws > 1 and temperature == 0:
        raise BadInput(f"{draws} draws at temperature 0 are all the same", "greedy decoding has one result",
                       "use draws=1 for greedy accuracy, or temperature=1")
    problems = distinct_problems(task, n, random.Random(seed), split)
    groups = generate(problems, draws, temperature)
    if len(groups) != n or any(len(group) != draws for group in groups):
        raise ValueError(f"generate gave {[len(g) for g in groups][:5]}..., wanted {n} groups of {draws}")
    graded = [[finished_only(grade(task, problem, c), c.finished) for c in group]
              for problem, group in zip(problems, groups)]
    rows = [_row(scores, group, k) for scores, group in zip(graded, groups)]
    names = sorted({p.task for p in problems})
    by_task = {name: _means([row for row, p in zip(rows, problems) if p.task == name]) for name in names}
    samples = [Sample(p.task, p.prompt, g[0].text, s[0], g[0].tokens, g[0].finished)
               for p, g, s in zip(problems[:keep], groups, graded)]
    means = _means(rows)
    del means["n"]
    return TaskScores(**means, n=n, k=k, draws=draws, temperature=temperature, by_task=by_task, samples=samples)


def grade(task: Task, problem: Problem, completion: Completion) -> dict[str, float]:
    """The components of a completion, or of a dialogue where it is one."""
    dialogue = dialogue_of(task, problem) if completion.turns else None
    if dialogue is not None:
        return dialogue.grade_turns(problem, completion.turns)
    return task.grade(problem, completion.text)


def finished_only(scores: dict[str, float], finished: bool) -> dict[str, float]:
    """An answer that did not end is no answer: format and correct are 0, partial credit stays below 1."""
    if finished:
        return scores
    return scores | {"format": 0.0, "correct": 0.0, "progress": min(scores.get("progress", 0.0), 0.9)}


def distinct_problems(task: Task, n: int, rng: random.Random, split: Split = "heldout") -> list[Problem]:
    """n problems with different prompts; BadInput if the dials do not allow as many."""
    found: dict[str, Problem] = {}
    for _ in range(100 * n + 1000):
        problem = task.sample(rng, split)
        found.setdefault(problem.prompt, problem)
        if len(found) == n:
            return list(found.values())
    raise BadInput(f"only {len(found)} different {split} problems found, {n} wanted",
                   f"the dials of {task.name} allow few problems", "ask for fewer problems or widen the dials")


def _row(scores: list[dict[str, float]], group: Sequence[Completion], k: int) -> dict[str, float]:
    """One problem's measures, as means over its draws."""
    draws = len(group)
    correct = sum(s["correct"] == 1.0 for s in scores)
    return {"pass_at_1": correct / draws, "pass_at_k": pass_at_k(draws, correct, k),
            "format": sum(s["format"] for s in scores) / draws,
            "progress": sum(s.get("progress", s["correct"]) for s in scores) / draws,
            "mean_length": sum(c.tokens for c in group) / draws,
            "truncated": sum(not c.finished for c in group) / draws}


def _means(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Means over problems, with their number, `reasoning` and the standard error of pass@1."""
    n = len(rows)
    means: dict[str, Any] = {name: sum(row[name] for row in rows) / n for name in rows[0]}
    means["reasoning"] = means["pass_at_1"] / means["format"] if means["format"] else None
    spread = sum((row["pass_at_1"] - means["pass_at_1"]) ** 2 for row in rows)
    return {**means, "n": n, "standard_error": math.sqrt(spread / (n - 1) / n) if n > 1 else 0.0}
