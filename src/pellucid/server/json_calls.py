"""Calls whose arguments are JSON where they stand: they are passed on letter by letter."""

from __future__ import annotations

import json
from typing import Any

from pellucid.server.calls import Calls, Reader, Schemas
from pellucid.server.tape import Reading, Tape


def arguments(tape: Tape, calls: Calls, name: Any) -> Reading[None]:
    """An object, told as it comes; or, as some models write it, a string that holds its JSON."""
    if (yield from tape.sees("{")):
        calls.begin(name)
        yield from tape.json(calls.more)
        calls.end()
    else:
        inner = json.loads((yield from tape.json()))
        if not isinstance(inner, str):
            raise ValueError("arguments are an object")
        calls.whole(name, json.loads(inner))


def call_object(tape: Tape, calls: Calls, keys: tuple[str, ...], known: set[str] | None = None, default: str | None = None) -> Reading[None]:
    """`{"name": ..., KEY: {...}}` in any order.  keys: those that may hold the arguments.  known: no others may be there."""
    yield from tape.need("{")
    name, held, seen = None, default, set[str]()
    told = False
    while not (yield from tape.take("}")):
        if seen:
            yield from tape.need(",")
        key = yield from tape.string()
        yield from tape.need(":")
        if key in seen or (key in keys and seen & set(keys)) or (known is not None and key not in known):
            raise ValueError(f"{key} cannot stand here")
        seen.add(key)
        if key == "name":
            name = json.loads((yield from tape.json()))
        elif key in keys and name is not None:
            yield from arguments(tape, calls, name)
            told = True
        elif key in keys:
            held = yield from tape.json()
        else:
            yield from tape.json()
    if not told:
        yield from arguments(Tape(held or "", ended=True), calls, name)


def call_list(tape: Tape, calls: Calls, keys: tuple[str, ...]) -> Reading[None]:
    """`[{...}, {...}]`"""
    yield from tape.need("[")
    while True:
        yield from call_object(tape, calls, keys)
        if not (yield from tape.take(",")):
            break
    yield from tape.need("]")
    yield from at_end(tape)


def at_end(tape: Tape) -> Reading[None]:
    if (yield from tape.left()):
        raise ValueError("something follows")


def hermes(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
    yield from call_object(tape, calls, ("arguments",), {"name", "arguments"}, "{}")
    yield from at_end(tape)


def llama_json(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
    """`{"name": ..., "parameters": {...}}`, several with `;` between."""
    while (yield from tape.left()):
        yield from call_object(tape, calls, ("parameters", "arguments"), {"name", "parameters", "arguments", "type"})
        yield from tape.take(";")


def mistral(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
    if (yield from tape.sees("[")):
        yield from call_list(tape, calls, ("arguments",))
        return
    while (yield from tape.left()):
        name = (yield from tape.until("[ARGS]")).partition("[CALL_ID]")[0].strip()
        yield from arguments(tape, calls, name)
        yield from tape.take("[TOOL_CALLS]")


def deepseek(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
    """V3 and R1: a type word, the name on a line, JSON in a fence. V3.1: the name, then JSON."""
    while (yield from tape.left()):
        yield from tape.need("<｜tool▁call▁begin｜>")
        name = (yield from tape.until("<｜tool▁sep｜>")).strip()
        if name == "function":
            name = (yield from tape.until("\n")).strip()
        fenced = yield from tape.take("```json")
        yield from arguments(tape, calls, name)
        if fenced:
            yield from tape.need("```")
        yield from tape.need("<｜tool▁call▁end｜>")


def forced(name: str) -> Reader:
    """An answer whose form the server has fixed: the arguments of the tool `name`, or a list of {"name", "parameters"}."""
    def read(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
        if not name:
            yield from call_list(tape, calls, ("parameters",))
            return
        yield from arguments(tape, calls, name)
        yield from at_end(tape)

    return read
