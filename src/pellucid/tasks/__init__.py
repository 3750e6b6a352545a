"""Generated, verifiable tasks: problems, demonstrations that think before they answer, graders, held-out splits."""

from __future__ import annotations

from typing import Any

from pellucid.errors import BadInput, nearest
from pellucid.tasks.arithmetic import Arithmetic, ArithmeticDials
from pellucid.tasks.calculator import Calculator, CalculatorDials
from pellucid.tasks.countdown import Countdown, CountdownDials
from pellucid.tasks.evaluate import Completion, Sample, TaskScores, evaluate, finished_only, pass_at_k
from pellucid.tasks.facts import facts
from pellucid.tasks.mixture import Mixture
from pellucid.tasks.sorting import Sorting, SortingDials
from pellucid.tasks.task import Parsed, Problem, Split, Task, build_dials, is_heldout, parse_completion
from pellucid.tasks.tools import CALCULATOR_SCHEMA, TOOLS, Tool, calculate

TASKS: dict[str, type] = {"countdown": Countdown, "arithmetic": Arithmetic, "sorting": Sorting,
                          "calculator": Calculator}
DIALS: dict[str, type] = {"countdown": CountdownDials, "arithmetic": ArithmeticDials, "sorting": SortingDials,
                          "calculator": CalculatorDials}


def make(name: str, **dials: Any) -> Task:
    """The task of that name with its dials set; unknown names and dials are BadInput."""
    if name not in TASKS:
        raise BadInput(f"unknown task {name!r}{nearest(name, list(TASKS))}", f"there are {', '.join(TASKS)}",
                       "use one of these")
    return TASKS[name](build_dials(DIALS[name], dials))


__all__ = ["CALCULATOR_SCHEMA", "Completion", "DIALS", "Mixture", "Parsed", "Problem", "Sample", "Split", "TASKS",
           "TOOLS", "Task", "TaskScores", "Tool", "calculate", "evaluate", "facts", "finished_only", "is_heldout", "make",
           "parse_completion", "pass_at_k"]
