"""A call as it is told: pieces of it while a model writes, and the reader that follows a block of calls.

A format's reader (json_calls.py, text_calls.py, python_calls.py) follows the text (tape.py) and puts what has become certain into
`Calls`; `BlockReader` runs it, whatever a model writes. What is no valid call stays text, word for word. Nothing is evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pellucid.server.tape import Reading, Tape

Schemas = dict[str, dict[str, Any]]  # a function's name -> JSON Schema of its parameters


@dataclass(frozen=True)
class Piece:
    """A bit of text, or a call.  name, text: its function, and its arguments as JSON.

    part: "whole", or of a call that is told as it is written: "begin" (its name), "more" (what its arguments go on with), "end" (the name
    and all arguments), "lost" (the oldest one that has not ended is none after all; what the model wrote follows as content).
    """

    kind: Literal["reasoning", "content", "tool_call"]
    text: str
    name: str = ""
    part: Literal["whole", "begin", "more", "end", "lost"] = "whole"


class Calls:
    """Where a reader puts what it finds.  found: whole calls.  said: what has become certain of them since it was last emptied."""

    def __init__(self) -> None:
        self.found: list[Piece] = []
        self.said: list[Piece] = []
        self._name = ""
        self._text: list[str] = []

    def begin(self, name: Any) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError("no name")
        name.encode()  # a half of a surrogate pair can be sent to nobody
        self._name, self._text = name, []
        self.said.append(Piece("tool_call", "", name, "begin"))

    def more(self, text: str) -> None:
        text.encode()
        self._text.append(text)
        self.said.append(Piece("tool_call", text, self._name, "more"))

    def end(self) -> None:
        text = "".join(self._text)
        arguments = json.loads(text)
        if not isinstance(arguments, dict):
            raise ValueError("arguments are an object")
        json.dumps(arguments, allow_nan=False)  # numbers beyond those of JSON
        self.found.append(Piece("tool_call", text, self._name))

    def whole(self, name: Any, arguments: Any) -> None:
        """Arguments that were no JSON in their place."""
        self.begin(name)
        self.more(as_json(arguments))
        self.end()


Reader = Callable[[Tape, Calls, Schemas], Reading[None]]


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


FAULTS = (ValueError, SyntaxError, RecursionError, MemoryError, AttributeError, TypeError)
"""What reading may end with, whatever a model writes."""


class BlockReader:
    """A block of calls as it is written: `feed` it the text from the block's beginning, then `end` it."""

    def __init__(self, read: Reader, schemas: Schemas):
        self.tape, self.calls = Tape(), Calls()
        self._steps, self._open = read(self.tape, self.calls, schemas), True
        self.broken = False
        self._begun = 0  # calls whose beginning has been said

    def feed(self, text: str, limit: int) -> list[Piece]:
        """text: all of it so far, of which `limit` characters are certain to be the block's. What has become certain of its calls."""
        said = self._go_on(text, limit)
        self._begun += sum(p.part == "begin" for p in said)
        return said

    def _go_on(self, text: str, limit: int) -> list[Piece]:
        self.tape.text, self.tape.limit = text, limit
        if self._open:
            try:
                next(self._steps)
            except StopIteration:
                self._open = False
            except FAULTS:
                self._open, self.broken = False, True
        said, self.calls.said = self.calls.said, []
        return said

    def end(self, text: str, live: bool = False) -> list[Piece] | None:
        """Its calls, or with `live` what had not been said of them; None where it is no valid block: it stays text."""
        self.tape.ended = True
        said = self._go_on(text, len(text))
        if self.broken or self._open or not self.calls.found:
            return None
        return [*said, *(replace(call, part="end") for call in self.calls.found)] if live else self.calls.found

    def lost(self) -> list[Piece]:
        """To be told where calls had begun and `end` gave none."""
        return [Piece("tool_call", "", "", "lost")] * self._begun
