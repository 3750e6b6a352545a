"""A run folder: what happened is written there as it happens, and read again later.

    with recorded(folder, loop):          # events.jsonl, with a `group` of every step and the alarms
        loop.run()
    run = read_run(folder)                # .steps, .evaluations, .groups, .alarms
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pellucid import events
from pellucid.align.alarms import Alarms, replay
from pellucid.errors import BadInput

if TYPE_CHECKING:
    from pellucid.train import Run

Record = dict[str, Any]


@contextlib.contextmanager
def recorded(folder: str | Path, loop: Run[Any, Any] | None = None) -> Iterator[Alarms]:
    """Everything emitted inside goes to `folder/events.jsonl`; the alarms watch; an online `loop` shows its groups."""
    from pellucid.align.inspector import Recorder
    from pellucid.align.online import OnlineLoop

    log, alarms = events.RunLog(Path(folder) / "events.jsonl"), Alarms()
    with contextlib.ExitStack() as stack:
        stack.callback(log.close)
        stack.enter_context(events.subscribed(log))
        if isinstance(loop, OnlineLoop):
            stack.enter_context(events.subscribed(Recorder(loop)))
        stack.enter_context(events.subscribed(alarms))
        yield alarms


@dataclass(frozen=True)
class RunRecord:
    """The events of one run in the order of its steps, and the alarms that they raise."""

    steps: list[Record]
    evaluations: list[Record]
    groups: list[Record]
    alarms: list[Record]
    notes: list[str]

    def group_at(self, step: int | None) -> Record | None:
        """The recorded group of that step or of the nearest before it (else the first); None: the last one."""
        before = [g for g in self.groups if step is None or g["step"] <= step]
        return before[-1] if before else self.groups[0] if self.groups else None


def read_run(folder: str | Path) -> RunRecord:
    """A run folder, or its events.jsonl. A torn last line (a run that goes on, or was killed) is left out.

    Where a run was resumed or begun again in the same folder, a step that came again replaces what the first attempt wrote
    from there on. Errors: BadInput where there is no log, or none of a run.
    """
    file = Path(folder) / "events.jsonl" if Path(folder).is_dir() else Path(folder)
    if not file.is_file():
        raise BadInput(f"there is no log in {folder}", f"{file.name} is not there",
                       "give the folder that --out named (the verbs of `pellucid align` write events.jsonl into it)")
    kept = _latest(_events(file))
    of = {kind: [e for e in kept if e["kind"] == kind] for kind in ("step", "evaluation", "group", "alarm", "note")}
    if not of["step"]:
        raise BadInput(f"{file} holds no step of a run", "nothing was trained yet", "wait for its first step, or give another folder")
    logged = {(a["stage"], a["step"], a["name"]) for a in of["alarm"]}
    found = [a.as_dict() for a in replay(kept) if (a.stage, a.step, a.name) not in logged]  # of logs without alarms
    return RunRecord(of["step"], of["evaluation"], of["group"], sorted(of["alarm"] + found, key=lambda a: a["step"]),
                     [n["text"] for n in of["note"]])


def _events(file: Path) -> list[Record]:
    found = []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or "kind" not in event:
                raise ValueError("not an event")
        except ValueError as error:
            if number == len(lines):  # no line end behind it: it is being written
                break
            raise BadInput(f"{file}, line {number} is no event", str(error), "give the events.jsonl of a run") from None
        found.append(event)
    return found


def _latest(log: list[Record]) -> list[Record]:
    """The events without those of attempts that a later one went over again."""
    kept: list[Record] = []
    highest: dict[str, int] = {}  # stage -> its latest step so far
    for event in log:
        if event["kind"] == "step":
            stage, step = event["stage"], event["step"]
            if step <= highest.get(stage, 0):
                kept = _before(kept, stage, step)
            highest[stage] = step
        kept.append(event)
    return kept


def _before(kept: list[Record], stage: str, step: int) -> list[Record]:
    """Without what this stage wrote from that step on; evaluations belong to the step before them."""
    out, at = [], 0
    for event in kept:
        if event.get("stage") == stage:
            at = event.get("step", at)
            if at >= step:
                continue
        out.append(event)
    return out
