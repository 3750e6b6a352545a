"""A verb as `tests/house/test_cli.py` needs it: emits every kind of event, prints a result, fails on request."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pellucid.cli.base import Common, Positional, prepare
from pellucid.errors import BadInput, Interrupted, PellucidError
from pellucid.events import Event, emit, note


@dataclass(frozen=True)
class Demo(Common):
    """Show what a verb looks like.
    演示一个动词的样子。

    $ pellucid demo runs/first --max-steps 3 --tasks sorting countdown
    """

    model: Positional[Path]
    """Model folder.
    模型目录。"""
    max_steps: int = 3
    """How many steps to take.
    步数。"""
    tasks: tuple[str, ...] = ("countdown",)
    """Tasks to do.
    任务。"""
    end: Literal["well", "bad", "fail", "bug", "saved", "wait", "five"] = "well"
    """How it ends.
    结局。"""
    packing: bool = True
    """Pack samples.
    打包样本。"""
    ratio: float | None = None
    """A number, or nothing.
    一个数，或没有。"""


@dataclass
class Record(Event):
    """Any event of the display's kinds, without declaring them twice: fields as given."""

    kind = "demo_record"
    fields: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "time": self.time, **self.fields}


def record(kind: str, **fields: Any) -> Record:
    made = Record(fields=fields)
    made.__dict__["kind"] = kind
    return made


def stage_begin(**change: Any) -> Record:
    return record("stage_begin", **{"stage": "sft", "index": 2, "count": 7, "title": "fine-tuning", "seconds_planned": 60.0,
                                    **change})


def step(number: int, progress: float, **metrics: float) -> Record:
    return record("step", stage="sft", step=number, progress=progress, eta_seconds=60 * (1 - progress), metrics=metrics)


def stage_end(**change: Any) -> Record:
    return record("stage_end", **{"stage": "sft", "seconds": 125.0, "before": 0.0, "after": 0.41, "metric": "pass@1",
                                  "unit": "", "higher_is_better": True, **change})


def sample(**change: Any) -> Record:
    return record("sample", **{"stage": "sft", "prompt": "3 4 5 → 23?", "completion": "<think>\n3*4\n</think>\n23",
                               "rewards": {"correct": 1.0}, **change})


def evaluation() -> Record:
    return record("evaluation", stage="sft", name="pass@1", value=0.4125, details={})


def demo(config: Demo) -> int | None:
    prepare(config)
    emit(stage_begin())
    for i in range(1, config.max_steps + 1):
        emit(step(i, i / config.max_steps, loss=1 / i))
    emit(sample())
    emit(evaluation())
    emit(stage_end())
    note(f"tasks {' '.join(config.tasks)}")
    print("RESULT", config.model, config.ratio, config.packing)
    match config.end:
        case "bad":
            raise BadInput("the model folder is empty", "it holds no config.json", "pellucid inspect OTHER")
        case "fail":
            raise PellucidError("could not write", "the disk is full")
        case "bug":
            raise ZeroDivisionError("division by zero\nsecond line")
        case "saved":
            raise Interrupted("interrupted; step 3 is saved", next="pellucid demo --resume")
        case "five":
            return 5
        case "wait":
            print("waiting", file=sys.stderr, flush=True)
            time.sleep(60)
    return None
