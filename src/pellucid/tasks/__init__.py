"""Generated, verifiable tasks: problems, demonstrations that think before they answer, graders, held-out splits."""

from __future__ import annotations

from typing import Any

from pellucid.errors import BadInput, nearest
from pellucid.tasks.arithmetic import Arithmetic, ArithmeticDials
from pellucid.tasks.bandit import Bandit, BanditDials
from pellucid.tasks.brackets import Brackets, BracketsDials
from pellucid.tasks.brevity import Brevity, BrevityDials
from pellucid.tasks.calculator import Calculator, CalculatorDials
from pellucid.tasks.chain import Chain, ChainDials
from pellucid.tasks.copying import Copying, CopyingDials
from pellucid.tasks.countdown import Countdown, CountdownDials
from pellucid.tasks.evaluate import Completion, Sample, TaskScores, evaluate, finished_only, pass_at_k
from pellucid.tasks.facts import facts
from pellucid.tasks.hackable import Hackable, HackableDials
from pellucid.tasks.json_writing import JsonWriting, JsonWritingDials
from pellucid.tasks.lookup import Lookup, LookupDials
from pellucid.tasks.mixture import Mixture
from pellucid.tasks.own import OwnTask, load_object, own_task, where_it_failed
from pellucid.tasks.sorting import Sorting, SortingDials
from pellucid.tasks.task import (
    Dialogue,
    Parsed,
    Problem,
    Split,
    Task,
    build_dials,
    dialogue_of,
    is_heldout,
    parse_answer,
    parse_completion,
    reward_weights,
)
from pellucid.tasks.toolrl import ToolRL, ToolRLDials
from pellucid.tasks.tools import CALCULATOR_SCHEMA, TOOLS, Tool, calculate

TASKS: dict[str, type] = {
    "countdown": Countdown, "arithmetic": Arithmetic, "sorting": Sorting, "calculator": Calculator, "copying": Copying,
    "chain": Chain, "brackets": Brackets, "json": JsonWriting, "lookup": Lookup, "toolrl": ToolRL, "brevity": Brevity,
    "hackable": Hackable, "bandit": Bandit}
DIALS: dict[str, type] = {
    "countdown": CountdownDials, "arithmetic": ArithmeticDials, "sorting": SortingDials, "calculator": CalculatorDials,
    "copying": CopyingDials, "chain": ChainDials, "brackets": BracketsDials, "json": JsonWritingDials,
    "lookup": LookupDials, "toolrl": ToolRLDials, "brevity": BrevityDials, "hackable": HackableDials,
    "bandit": BanditDials}


def make(name: str, **dials: Any) -> Task:
    """The task of that name (or of `module:Class`, see `own.py`) with its dials set; what is unknown is BadInput."""
    if ":" in name:
        return own_task(name, **dials)
    if name not in TASKS:
        raise BadInput(f"unknown task {name!r}{nearest(name, list(TASKS))}", f"there are {', '.join(TASKS)}",
                       "use one of these, or a class of your own: module:Class or file.py:Class")
    return TASKS[name](build_dials(DIALS[name], dials))


__all__ = ["CALCULATOR_SCHEMA", "Completion", "DIALS", "Dialogue", "Mixture", "OwnTask", "Parsed", "Problem", "Sample",
           "Split", "TASKS", "TOOLS", "Task", "TaskScores", "Tool", "calculate", "dialogue_of", "evaluate", "facts",
           "finished_only", "is_heldout", "load_object", "make", "own_task", "parse_answer", "parse_completion",
           "pass_at_k", "reward_weights", "where_it_failed"]
