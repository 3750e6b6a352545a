"""A task of one's own: one small class, in any file.

    # parity.py
    from pellucid.tasks import OwnTask

    class Parity(OwnTask):
        def draw(self, rng):
            bits = "".join(rng.choices("01", k=8))
            return f"Is the number of ones in {bits} even?", "yes" if bits.count("1") % 2 == 0 else "no"

    $ pellucid eval runs/grow/model --tasks parity.py:Parity

That is all a task needs: a question and its answer.  The rest has defaults that can be replaced one by one: `think`
(the thought of a demonstration), `check` (what counts as right, with partial credit), `key` (what decides the split),
`weights`, and a constructor whose keywords are the dials.  A class that has `name`, `dials`, `sample`, `demonstrate` and
`grade` of its own, as the tasks here have, needs nothing from `OwnTask`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import random
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from pellucid.errors import BadInput, nearest
from pellucid.tasks.task import (
    Problem,
    Split,
    Task,
    completion,
    draw_in_split,
    parse_answer,
    parse_completion,
    scores,
)

OURS = Path(__file__).resolve().parents[1]


class OwnTask:
    """Derive from this and write `draw`; see the module."""

    name: str = ""
    """By default the name of the class, in lower case."""
    dials: Any = None
    thinks: bool = False
    """Whether a completion must think before it answers."""

    def __init_subclass__(cls, **kw: Any) -> None:
        super().__init_subclass__(**kw)
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()

    def draw(self, rng: random.Random) -> tuple[str, Any]:
        """(question, answer); all chance comes from `rng`."""
        raise NotImplementedError(f"{type(self).__name__} needs a method draw(self, rng) -> (question, answer)")

    def key(self, question: str, answer: Any) -> str:
        """What decides the split: questions with equal keys are on the same side."""
        return question

    def write(self, answer: Any) -> str:
        """The answer as a demonstration writes it."""
        return str(answer)

    def think(self, question: str, answer: Any, rng: random.Random) -> str:
        """The thought of a demonstration; empty: none."""
        return ""

    def check(self, answer: Any, given: str) -> bool | float:
        """Whether the text `given` (without thought and outer spaces) is right; or partial credit, 1.0 for right."""
        return given == self.write(answer)

    # --- what follows from these --------------------------------------------------------------------------------------

    def sample(self, rng: random.Random, split: Split) -> Problem:
        question, answer = draw_in_split(rng, split, self.name, self.draw, lambda drawn: self.key(*drawn))
        return Problem(self.name, question, answer, self.key(question, answer))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        thought, answer = self.think(problem.prompt, problem.answer, rng), self.write(problem.answer)
        return completion(thought, answer) if thought else answer

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        parsed = parse_completion(text) if self.thinks else parse_answer(text)
        if parsed is None:
            return scores(False, False, 0.0)
        credit = float(self.check(problem.answer, parsed.answer))
        if not 0.0 <= credit <= 1.0:
            raise BadInput(f"{self.name}.check gave {credit}", "it must be True, False or a number from 0 to 1")
        return scores(True, credit == 1.0, credit)


def own_task(spec: str, **dials: Any) -> Task:
    """The task of `module:Class` or `file.py:Class`, built with `dials` and tried once.  Errors: BadInput."""
    kind = load_object(spec)
    if not inspect.isclass(kind):
        raise BadInput(f"{spec} is no class", f"it is a {type(kind).__name__}", "name a class with a method draw")
    lacking = [name for name in ("sample", "demonstrate", "grade") if not callable(getattr(kind, name, None))]
    if lacking:
        raise BadInput(f"{spec} is no task", f"it has no {', '.join(lacking)}", "derive it from pellucid.tasks.OwnTask")
    try:
        task = cast(Task, kind(**dials))
    except TypeError as error:
        raise BadInput(f"{spec} cannot be built", str(error), "give the dials that its constructor takes") from error
    if not isinstance(getattr(task, "name", None), str) or not task.name:
        raise BadInput(f"{spec} has no name", next='give the class a line such as name = "parity"')
    _try(task, spec)
    return task


def _try(task: Task, spec: str) -> None:
    """A mistake in the task is told before the run, not in the middle of it."""
    rng = random.Random(0)
    try:
        for split in ("train", "heldout"):
            problem = task.sample(rng, split)  # type: ignore[arg-type]
            shown = task.demonstrate(problem, rng)
            graded = task.grade(problem, shown)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"the task {spec} fails", where_it_failed(error), "mend the class") from error
    if not isinstance(graded, dict) or graded.get("correct") != 1.0 or "format" not in graded:
        raise BadInput(f"the task {spec} does not grade its own demonstration as correct",
                       f"it gives {graded} to {shown[:80]!r}", "mend demonstrate (think, write) or grade (check)")


def load_object(spec: str) -> Any:
    """What `module:name` or `folder/file.py:name` names.  This runs that file: give only files that you trust.

    The current folder can be imported from.  Errors: BadInput for a missing file, module or name, or a failing import.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.replace(".", "").isidentifier():
        raise BadInput(f"{spec!r} names nothing to load", "it has no module and name",
                       "write module:name or path/to/file.py:name")
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    except BadInput:
        raise
    except Exception as error:  # whatever the file does at import
        raise BadInput(f"{place} cannot be imported", where_it_failed(error), "mend the file") from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(module) if not n.startswith("_")]
            raise BadInput(f"{place} has no {name}{nearest(name, names)}", f"it has {', '.join(names[:12]) or 'nothing'}",
                           "check the name after the colon")
        found = getattr(found, part)
    return found


def _module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:  # a console script does not have it, `python -m` has
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise BadInput(f"there is no module {name!r}", "it is neither in this folder nor installed",
                           "check the name, or give a file: path/to/file.py:name") from error
        raise


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadInput(f"there is no file {path}", next="check the path before the colon")
    path = path.resolve()
    known = next((m for m in list(sys.modules.values()) if getattr(m, "__pellucid_file__", None) == path), None)
    if known is not None:  # one module for all that is taken from it, so that its parts share their state
        return known
    name = f"pellucid_own_{path.stem}_{len(sys.modules)}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module.__dict__["__pellucid_file__"] = path
    sys.modules[name] = module  # dataclasses look their module up by name
    sys.path.insert(0, str(path.parent))  # a file may import its neighbours
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def where_it_failed(error: BaseException, most: int = 3) -> str:
    """`ZeroDivisionError: division by zero (rewards.py:12 in check)`: the error, and the last few places it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith((str(OURS), "<frozen importlib"))] or frames
    places = [f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in theirs[-most:]]
    text = f"{type(error).__name__}: {error}"
    return f"{text[:300]} ({' < '.join(reversed(places))})" if places else text[:300]
