"""The one event stream: everything worth seeing is a small typed record.

A room declares its records as dataclasses that derive from `Event`, and calls `emit(Step(...))`. Readers subscribe:
the run log, the progress display, `--json`, the metrics endpoint, the report and the lab are all subscribers.
Nothing that computes imports what shows.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Tick(Event):
    ...     kind = "tick"
    ...     step: int
    >>> seen = []
    >>> with subscribed(seen.append):
    ...     emit(Tick(step=3))
    >>> seen[0].kind, seen[0].step
    ('tick', 3)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import threading
import time as clock
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from pellucid.errors import PellucidError

SCHEMA_VERSION = 1
Subscriber = Callable[["Event"], None]

_subscribers: list[Subscriber] = []
_lock = threading.Lock()
_here = threading.local()


@dataclasses.dataclass
class Event:
    """Base of all records. A subclass sets `kind` and adds fields; `time` (Unix seconds) is filled when it is made."""

    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[Event]]] = {}
    flat: ClassVar[str] = ""  # the field, a dict, whose keys are written beside the others instead of inside it
    time: float = dataclasses.field(default_factory=clock.time, kw_only=True)

    def __init_subclass__(cls, **kw: Any) -> None:
        super().__init_subclass__(**kw)
        known = Event.kinds.get(cls.kind)
        if not cls.kind or (known and known.__qualname__ != cls.__qualname__):
            raise TypeError(f"event class {cls.__name__} needs a `kind` of its own, not {cls.kind!r}")
        Event.kinds[cls.kind] = cls

    def as_dict(self) -> dict[str, Any]:
        record = {"kind": self.kind, **{f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}
        return record | record.pop(self.flat) if self.flat else record


@dataclasses.dataclass
class Note(Event):
    """One line for people: a choice and its reason, a warning, a hint."""

    kind = "note"
    text: str
    level: str = "info"  # info | warning


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: dataclasses become dicts, tensors numbers or lists, NaN and infinities None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def emit(event: Event) -> None:
    """Hand `event` to every subscriber, in the order in which they subscribed."""
    if (kept := getattr(_here, "kept", None)) is not None:
        kept.append(event)
        return
    with _lock:
        readers = list(_subscribers)
    for reader in readers:
        reader(event)


def note(text: str, level: str = "info") -> None:
    emit(Note(text, level))


@contextlib.contextmanager
def held() -> Iterator[list[Event]]:
    """What this thread emits inside the `with` block goes into the list, and to no subscriber: another thread emits it, when it pleases."""
    before, _here.kept = getattr(_here, "kept", None), []
    try:
        yield _here.kept
    finally:
        _here.kept = before


@contextlib.contextmanager
def subscribed(reader: Subscriber) -> Iterator[Subscriber]:
    """`reader` receives every event emitted inside the `with` block."""
    with _lock:
        _subscribers.append(reader)
    try:
        yield reader
    finally:
        with _lock:
            _subscribers.remove(reader)


class RunLog:
    """Appends every event as one JSON line to `events.jsonl`; a torn last line of a killed run is cut off first."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            whole = self.path.read_bytes()
            if whole and not whole.endswith(b"\n"):
                self.path.write_bytes(whole[: whole.rfind(b"\n") + 1])
        self._file = self.path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        try:
            self._file.write(json.dumps(event.as_dict(), ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:  # most often a full disk
            raise PellucidError(f"could not write {self.path}", str(error),
                                "free some space, then go on with --resume") from error

    def close(self) -> None:
        self._file.close()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The events of a run as dicts, oldest first."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of every known event, discriminated by `kind`."""
    variants = []
    for kind, cls in sorted(Event.kinds.items()):
        hints = typing.get_type_hints(cls)
        fields = [f for f in dataclasses.fields(cls) if f.name != cls.flat]
        properties = {"kind": {"const": kind}, **{f.name: _schema(hints[f.name]) for f in fields}}
        needed = ["kind"] + [f.name for f in fields]
        doc = (cls.__doc__ or "").strip().split("\n")[0]
        variants.append({"type": "object", "description": doc, "properties": properties, "required": needed})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"pellucid events, version {SCHEMA_VERSION}",
        "oneOf": variants,
    }


def _schema(hint: Any) -> dict[str, Any]:
    scalar = {str: "string", int: "integer", bool: "boolean", type(None): "null"}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is float:
        return {"type": ["number", "null"]}  # NaN and infinities are written as null
    if hint in scalar:
        return {"type": scalar[hint]}
    if origin in (list, tuple, set):
        return {"type": "array", "items": _schema(args[0]) if args else {}}
    if origin is dict or hint is dict:
        return {"type": "object"}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(a) for a in args]}
    return {}


# --- the records that every long job shares ---------------------------------------------------------------------------


@dataclasses.dataclass
class StageBegin(Event):
    """A stage of a job starts: number `index` (from 1) of `count`."""

    kind = "stage_begin"
    stage: str
    index: int
    count: int
    title: str
    seconds_planned: float | None = None


@dataclasses.dataclass
class StageEnd(Event):
    """A stage is done. before, after: its held-out `metric` in `unit`."""

    kind = "stage_end"
    stage: str
    seconds: float
    before: float | None = None
    after: float | None = None
    metric: str = ""
    unit: str = ""
    higher_is_better: bool = True


@dataclasses.dataclass
class Step(Event):
    """One optimizer step. progress in [0, 1]; metrics by name, the first ones are what matters most."""

    kind = "step"
    stage: str
    step: int
    progress: float
    eta_seconds: float | None
    metrics: dict[str, float]


@dataclasses.dataclass
class Evaluation(Event):
    """A measurement on held-out data."""

    kind = "evaluation"
    stage: str
    name: str
    value: float
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class SampleShown(Event):
    """One prompt with what the model wrote and, where it was graded, its reward components."""

    kind = "sample"
    stage: str
    prompt: str
    completion: str
    rewards: dict[str, float] = dataclasses.field(default_factory=dict)
