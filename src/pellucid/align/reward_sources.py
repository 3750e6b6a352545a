"""What rewards come from besides a function of one's own: a task's graders, a trained reward model, verl's compute_score."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pellucid.align.prompts import Prompts
from pellucid.align.rewards import Content, Reward, text_of
from pellucid.errors import BadInput
from pellucid.tasks import Problem, Task, dialogue_of, finished_only, reward_weights


class TaskGrader:
    """The grader of a task as a reward function: all its components; those that are no rewards have the weight 0."""

    def __init__(self, task: Task, weights: Mapping[str, float] | None = None):
        if isinstance(task, Prompts):
            raise BadInput("no reward was given", "a data set has no grades of its own",
                           "give a function: --reward rewards.py:function, or a trained model: --reward-model FOLDER")
        self.task, self.weights = task, dict(weights or reward_weights(task))
        rng, names = random.Random(0), dict.fromkeys(("correct", "format", "progress"))
        for part in getattr(task, "tasks", {"": task}).values():
            problem = part.sample(rng, "train")
            names |= dict.fromkeys(part.grade(problem, part.demonstrate(problem, rng)))
        self.names = tuple(names)

    def __call__(self, completions: list[Content], problem: list[Problem], finished: list[bool] | None = None,
                 turns: list[Sequence[str]] | None = None, **_: Any) -> list[dict[str, float]]:
        """problem: a column of `Problem`; finished: False where a completion was cut off; turns: of dialogues."""
        graded = []
        for i, (text, asked) in enumerate(zip(map(text_of, completions), problem)):
            dialogue = dialogue_of(self.task, asked) if turns is not None and turns[i] else None
            components = dialogue.grade_turns(asked, turns[i]) if dialogue and turns else self.task.grade(asked, text)
            graded.append(finished_only(components, finished is None or finished[i]))
        return graded


def task_reward(task: Task, weights: Mapping[str, float] | None = None, **how: Any) -> Reward:
    """A task's own grades as a `Reward` with several components.  weights: in place of those that the task gives; a component
    without a weight is measured and not trained on."""
    grader = TaskGrader(task, weights)
    return Reward(task.name, grader, parts=grader.names, **how)


def model_reward(model: Any, takes: str | None = None) -> Callable[..., list[float]]:
    """A trained reward model as a reward function.

    model: anything with `.score(list) -> list of numbers`.  takes: "ids" (prompt and completion as one list of tokens) or
    "texts" (both as one text); by default what `model.takes` says, else ids.
    """
    takes = takes or getattr(model, "takes", "ids")
    if takes not in ("ids", "texts") or not callable(getattr(model, "score", None)):
        raise BadInput(f"a {type(model).__name__} is no reward model", "it needs a method score(list) -> list of numbers, and "
                       f"takes={takes!r} must be 'ids' or 'texts'", "wrap it in an object that has these")

    def by_ids(prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[float]:
        return _numbers(model.score([p + c for p, c in zip(prompt_ids, completion_ids)]))

    def by_texts(prompts: list[Content], completions: list[Content]) -> list[float]:
        return _numbers(model.score([text_of(p) + text_of(c) for p, c in zip(prompts, completions)]))

    return by_ids if takes == "ids" else by_texts


def verl_reward(compute_score: Callable[..., Any]) -> Callable[..., list[float | None]]:
    """verl's compute_score(data_source, solution_str, ground_truth, extra_info) -> number or dict, as a reward function.

    Of a dict, `score` is the reward; its other numbers are logged as metrics.
    """

    def reward(completions: list[Content], data_source: list[Any], ground_truth: list[Any],
               extra_info: list[Any] | None = None, log_metric: Callable[[str, float], None] | None = None) -> list[float | None]:
        given = [compute_score(data_source=data_source[i], solution_str=text_of(text), ground_truth=ground_truth[i],
                               extra_info=extra_info[i] if extra_info else None) for i, text in enumerate(completions)]
        tables = [g for g in given if isinstance(g, Mapping)]
        for name in sorted({name for table in tables for name in table} - {"score"}):
            numbers = [float(t[name]) for t in tables if isinstance(t.get(name), (int, float))]
            if log_metric and numbers:
                log_metric(name, sum(numbers) / len(numbers))
        return [g["score"] if isinstance(g, Mapping) else g for g in given]

    reward.__name__ = getattr(compute_score, "__name__", "compute_score")
    return reward


def _numbers(values: Any) -> list[float]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
