"""The event stream: every kind validates against the JSON Schema (read by `jsonschema`), the run log mends itself."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pkgutil
import threading
import types
import typing
from pathlib import Path

import jsonschema
import pytest
import torch

import pellucid
from pellucid import events
from pellucid.events import Event, Note, RunLog, emit, read_log, subscribed


@pytest.fixture(scope="module")
def kinds() -> dict[str, type[Event]]:
    """Every event class that the package declares."""
    for info in pkgutil.walk_packages(pellucid.__path__, "pellucid."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
    return {k: c for k, c in Event.kinds.items() if c.__module__.startswith("pellucid.")}


@pytest.fixture
def schema(kinds, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(Event, "kinds", kinds)
    return events.json_schema()


def value_for(hint: typing.Any) -> typing.Any:
    """Some value of the annotated type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return value_for(args[0])
    if origin is typing.Literal:
        return args[0]
    if origin in (list, tuple, set):
        return origin([value_for(args[0])] if args else [])
    if origin is dict or hint is dict:
        return {"a": value_for(args[1])} if args else {}
    if dataclasses.is_dataclass(hint):
        return hint(**{name: value_for(h) for name, h in typing.get_type_hints(hint).items()})
    return {str: "文字 text", int: 3, float: 0.5, bool: True, type(None): None}.get(hint, "any")


def records(kinds: dict[str, type[Event]]) -> list[Event]:
    made = []
    for cls in kinds.values():
        hints = typing.get_type_hints(cls)
        made.append(cls(**{f.name: value_for(hints[f.name]) for f in dataclasses.fields(cls) if f.name != "time"}))
    return made


def test_every_kind_validates_what_it_emits(kinds, schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    checker = jsonschema.Draft202012Validator(schema)
    seen: list[Event] = []
    with subscribed(seen.append):
        for record in records(kinds):
            emit(record)
    assert {e.kind for e in seen} == set(kinds) >= {"note", "error"}
    for event in seen:
        checker.validate(json.loads(json.dumps(event.as_dict())))


@pytest.mark.parametrize("broken", [{}, {"kind": "nothing"}, {"kind": "note", "time": 0.0}, {
    "kind": "note", "time": 0.0, "text": 3, "level": "info"}])
def test_the_schema_refuses_what_is_not_an_event(schema, broken: dict):
    assert not jsonschema.Draft202012Validator(schema).is_valid(broken)


def test_every_kind_is_described(kinds):
    """The schema documents itself: a docstring, not the signature that `dataclass` writes where there is none."""
    assert not [k for k, c in kinds.items() if not c.__doc__ or c.__doc__.startswith(f"{c.__name__}(")]


def test_json_never_holds_nan_tensors_or_paths():
    got = events.plain({"a": math.nan, "b": [math.inf, 1.5], "c": torch.tensor([1, 2]), "d": Path("x"),
                        "e": torch.tensor(0.5), 3: Note("t", "info")})
    assert got["a"] is None and got["b"] == [None, 1.5] and got["c"] == [1, 2] and got["d"] == "x" and got["e"] == 0.5
    assert got["3"]["text"] == "t"
    json.dumps(got, allow_nan=False)


def test_the_log_cuts_a_torn_line_and_goes_on(tmp_path: Path):
    path = tmp_path / "run" / "events.jsonl"
    log = RunLog(path)
    with subscribed(log):
        events.note("一")
        events.note("two")
    log.close()
    with path.open("a", encoding="utf-8") as f:
        f.write('{"kind": "note", "text": "torn')  # killed in the middle of a write
    log = RunLog(path)
    with subscribed(log):
        events.note("three")
    log.close()
    assert [r["text"] for r in read_log(path)] == ["一", "two", "three"]


def test_subscribers_hear_in_order_and_only_while_subscribed():
    heard: list[str] = []
    with subscribed(lambda e: heard.append("first")), subscribed(lambda e: heard.append("second")):
        events.note("x")
    events.note("y")
    assert heard == ["first", "second"]


def test_a_subscriber_leaves_even_after_a_failure():
    heard: list[Event] = []
    with pytest.raises(RuntimeError), subscribed(heard.append):
        raise RuntimeError
    events.note("x")
    assert not heard


def test_events_from_many_threads_are_all_heard():
    heard: list[Event] = []
    with subscribed(heard.append):
        threads = [threading.Thread(target=lambda: [events.note("x") for _ in range(200)]) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(heard) == 800


def test_two_classes_cannot_share_a_kind():
    with pytest.raises(TypeError, match="kind"):
        type("Other", (Event,), {"kind": "note"})
    with pytest.raises(TypeError, match="kind"):
        type("Nameless", (Event,), {})
