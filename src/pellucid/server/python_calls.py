"""Calls as a Python list: arguments are passed on one by one. Read word by word, never evaluated."""

from __future__ import annotations

import ast
import re
from typing import Any

from pellucid.server.calls import Calls, Schemas, as_json
from pellucid.server.json_calls import at_end
from pellucid.server.tape import Reading, Tape


def pythonic(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
    """A Python list of calls with keywords and literals. It is read by its words: Python's own parser can be broken by deep nesting."""
    words = Words(tape)
    yield from tape.need("[")
    while True:
        calls.begin((yield from words.name()))
        yield from tape.need("(")
        before = "{"
        while not (yield from tape.take(")")):
            key = yield from words.name()
            yield from tape.need("=")
            value = yield from words.value()
            calls.more(f"{before}{as_json(key)}: {as_json(value)}")
            before = ", "
            if not (yield from tape.sees(")")):
                yield from tape.need(",")
        calls.more("{}" if before == "{" else "}")
        calls.end()
        if (yield from tape.take("]")):
            yield from at_end(tape)
            return
        yield from tape.need(",")


WORD = re.compile(r"""(?P<text> \'\'\'.*?\'\'\' | \"{3}.*?\"{3} | '(?:\\.|[^'\\\n])*' | "(?:\\.|[^"\\\n])*" )
    | (?P<number> -?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)? ) | (?P<name> [^\W\d]\w*(?:\.[^\W\d]\w*)* )""", re.VERBOSE | re.DOTALL)
RUN = re.compile(r"[\w.+-]*")
CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


class Words:
    """Python's literals, word by word, nested at most 64 deep. ValueError where something else stands."""

    def __init__(self, tape: Tape):
        self.tape = tape

    def next(self) -> Reading[tuple[str, str]]:
        """(text | number | name, the word)"""
        tape = self.tape
        if not (yield from tape.left()):
            raise ValueError("the text ends")
        while tape.text[tape.at].isspace():
            tape.at += 1
        while True:
            found = WORD.match(tape.text, tape.at, tape.limit)
            if not self._may_go_on(found):
                break
            yield from tape.more()
        if found is None or found.lastgroup is None:
            raise ValueError("no literal")
        tape.at = found.end()
        return found.lastgroup, found[found.lastgroup]

    def _may_go_on(self, found: re.Match[str] | None) -> bool:
        """Whether more text could make another word of this one."""
        tape = self.tape
        if tape.ended:
            return False
        quote = tape.text[tape.at]
        if quote not in "'\"":
            run = RUN.match(tape.text, tape.at, tape.limit)
            return run is not None and run.end() == tape.limit
        head = tape.text[tape.at : min(tape.limit, tape.at + 3)]
        if head == quote * 3:
            return found is None or len(found[0]) < 6
        return found is None or head == quote * 2

    def name(self) -> Reading[str]:
        kind, word = yield from self.next()
        if kind != "name":
            raise ValueError("no name")
        return word

    def value(self, depth: int = 0) -> Reading[Any]:
        if depth > 64:
            raise ValueError("nested too deeply")
        for opens, closes in ("[]", "()"):
            if (yield from self.tape.take(opens)):
                return (yield from self._list(closes, depth + 1))
        if (yield from self.tape.take("{")):
            return (yield from self._table(depth + 1))
        kind, word = yield from self.next()
        if kind == "text":
            return ast.literal_eval(word)
        if kind == "number":
            return float(word) if set(word) & set(".eE") else int(word)
        if word not in CONSTANTS:
            raise ValueError("no value")
        return CONSTANTS[word]

    def _list(self, closes: str, depth: int) -> Reading[list[Any]]:
        values: list[Any] = []
        while not (yield from self.tape.take(closes)):
            values.append((yield from self.value(depth)))
            if not (yield from self.tape.sees(closes)):
                yield from self.tape.need(",")
        return values

    def _table(self, depth: int) -> Reading[dict[str, Any]]:
        table: dict[str, Any] = {}
        while not (yield from self.tape.take("}")):
            key = yield from self.value(depth)
            yield from self.tape.need(":")
            table[str(key)] = yield from self.value(depth)
            if not (yield from self.tape.sees("}")):
                yield from self.tape.need(",")
        return table
