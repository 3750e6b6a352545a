"""Calls whose arguments stand one by one between tags: texts are passed on as they come, other values when they are whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pellucid.server.calls import Calls, Schemas, as_json
from pellucid.server.tape import Reading, Tape


def tagged(tape: Tape, calls: Calls, opens: str, closes: str, end: str, kind: Callable[[str], tuple[str, Callable[[str], Any] | None]],
           trim: bool) -> Reading[None]:
    """`OPENS head>value CLOSES` up to `end`. A value may hold CLOSES: it ends where another begins, or all do.

    kind: head -> the argument's name, and what makes its value of the text; None: it is the text itself, and is told as it comes.
    trim: a line break at each end is not part of a value.
    """
    before = "{"
    while not (yield from tape.take(end)):
        yield from tape.need(opens)
        key, convert = kind((yield from tape.until(">")))
        calls.more(f"{before}{as_json(key)}: ")
        text = Spoken(calls.more if convert is None else None, trim)
        yield from tape.until(closes, text.add)
        while not ((yield from tape.sees(opens)) or (yield from tape.sees(end))):
            text.add(closes)
            yield from tape.until(closes, text.add)
        text.finish()
        if convert is not None:
            calls.more(as_json(convert(text.all)))
        before = ", "
    calls.more("{}" if before == "{" else "}")
    calls.end()


class Spoken:
    """A text in pieces, told as the inside of a JSON string."""

    def __init__(self, tell: Callable[[str], None] | None, trim: bool):
        self.tell, self.trim = tell, trim
        self.all, self._held, self._begun = "", "", False
        if tell is not None:
            tell('"')

    def add(self, text: str) -> None:
        if not text:
            return
        if self.trim and not self._begun:
            text = text.removeprefix("\n")
        self._begun = True
        text = self._held + text
        self._held = "\n" if self.trim and text.endswith("\n") else ""  # the last one is not part of the value
        self._say(text.removesuffix(self._held))

    def _say(self, text: str) -> None:
        if self.tell is None:
            self.all += text
        elif text:
            self.tell(as_json(text)[1:-1])

    def finish(self) -> None:
        if self.tell is not None:
            self.tell('"')


def qwen3_coder(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
    """Values are text: the schema says what they mean. One line break at each end is not part of a value."""
    while (yield from tape.left()):
        yield from tape.need("<function=")
        name = (yield from tape.until(">")).strip()
        properties = schemas.get(name, {}).get("properties", {})

        def kind(key: str, properties: dict[str, Any] = properties) -> tuple[str, Callable[[str], Any] | None]:
            schema = properties.get(key)
            return key, None if is_text(schema) else lambda text: typed(text, schema)

        calls.begin(name)
        yield from tagged(tape, calls, "<parameter=", "</parameter>", "</function>", kind, trim=True)


def types_of(schema: Any) -> set[str]:
    options = [schema, *schema.get("anyOf", []), *schema.get("oneOf", [])] if isinstance(schema, dict) else []
    words = [o.get("type") for o in options if isinstance(o, dict)]
    return {t for word in words for t in (word if isinstance(word, list) else [word]) if t}


def is_text(schema: Any) -> bool:
    """Whether every text is a value."""
    types = types_of(schema)
    return not types or ("string" in types and "null" not in types)


def typed(text: str, schema: Any) -> Any:
    """A value by its schema: text where it may be text, otherwise JSON; text too where it is no JSON."""
    types = types_of(schema)
    if not types or ("string" in types and not (text == "null" and "null" in types)):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


def dsml(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
    """`string="false"`: the value is JSON."""
    def kind(head: str) -> tuple[str, Callable[[str], Any] | None]:
        key, _, word = head.partition('" string="')
        if word not in ('true"', 'false"'):
            raise ValueError("no kind")
        return key, None if word == 'true"' else json.loads

    while (yield from tape.left()):
        yield from tape.need('<｜DSML｜invoke name="')
        calls.begin((yield from tape.until('">')))
        yield from tagged(tape, calls, '<｜DSML｜parameter name="', "</｜DSML｜parameter>", "</｜DSML｜invoke>", kind, trim=False)
