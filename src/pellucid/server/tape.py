"""A text that is still being written, read by coroutines: where it ends too early they wait (`yield`), and go on when more is there.

So one reader serves both the whole text and the text in pieces. ValueError says that it is not what was looked for, or that it
has ended inside of it. `Tape.json` follows JSON's grammar (RFC 8259) character by character: what it tells while it reads is the
beginning of a JSON value, always.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]

PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
NUMERIC = re.compile(r"[-+.eE0-9]*")
HEX = re.compile(r"[0-9a-fA-F]{4}")
CONSTANTS = ("true", "false", "null")
DEEPEST = 256
"""Arrays and objects inside each other."""


def unfinished(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of `tags` begins, without being whole."""
    longest = min(len(text), max(map(len, tags)) - 1)
    return next((n for n in range(longest, 0, -1) if any(t.startswith(text[-n:]) for t in tags if len(t) > n)), 0)


class Tape:
    """text: as far as it is known; of it, what stands before `limit` may be read.  at: the place that has been reached.  ended: nothing
    more will come. White space before what is looked for does not count."""

    def __init__(self, text: str = "", ended: bool = False):
        self.text, self.limit, self.at, self.ended = text, len(text), 0, ended

    def more(self) -> Reading[None]:
        if self.ended:
            raise ValueError("the text ends")
        yield

    def left(self) -> Reading[bool]:
        """Whether anything but white space follows."""
        return (yield from self._behind_space()) < self.limit

    def _behind_space(self) -> Reading[int]:
        at = self.at
        while True:
            while at < self.limit and self.text[at].isspace():
                at += 1
            if at < self.limit or self.ended:
                return at
            yield

    def _find_here(self, word: str) -> Reading[int]:
        """Where `word` ends, if it is the next; else -1."""
        at = yield from self._behind_space()
        while True:
            here = self.text[at : min(self.limit, at + len(word))]
            if here == word:
                return at + len(word)
            if self.ended or not word.startswith(here):
                return -1
            yield

    def sees(self, word: str) -> Reading[bool]:
        return (yield from self._find_here(word)) >= 0

    def take(self, word: str) -> Reading[bool]:
        """Goes behind `word`, if it is the next."""
        end = yield from self._find_here(word)
        self.at = max(self.at, end)
        return end >= 0

    def need(self, word: str) -> Reading[None]:
        if not (yield from self.take(word)):
            raise ValueError(f"no {word}")

    def until(self, word: str, tell: Callable[[str], None] | None = None) -> Reading[str]:
        """The text before `word`, behind which the tape stands then.  tell: gets it as it comes."""
        start = told = searched = self.at
        while (end := self.text.find(word, searched, self.limit)) < 0:
            searched = self.limit - unfinished(self.text[max(searched, self.limit - len(word)) : self.limit], [word])
            if tell is not None and searched > told:
                tell(self.text[told:searched])
                told = searched
            yield from self.more()
        self.at = end + len(word)
        if tell is not None and end > told:
            tell(self.text[told:end])
        return self.text[start:end]

    # --- JSON ---------------------------------------------------------------------------------------------------------------

    def string(self) -> Reading[Any]:
        """A JSON string's value."""
        if not (yield from self.sees('"')):
            raise ValueError("no string")
        self.at = yield from self._behind_space()
        start = self.at
        yield from self._string(self.more)
        return json.loads(self.text[start : self.at])

    def json(self, tell: Callable[[str], None] | None = None) -> Reading[str]:
        """A JSON value, as it is written.  tell: gets its text as it comes."""
        self.at = yield from self._behind_space()
        start = told = self.at

        def wait() -> Reading[None]:
            nonlocal told
            if tell is not None and self.at > told:
                tell(self.text[told : self.at])
                told = self.at
            yield from self.more()

        yield from self._value(wait)
        if tell is not None and self.at > told:
            tell(self.text[told : self.at])
        return self.text[start : self.at]

    def _value(self, wait: Callable[[], Reading[None]]) -> Reading[None]:
        open_: list[str] = []  # what closes the arrays and objects around
        wanted = "value"  # or: key, ":", next (a comma or what closes); the first key or value may be missing
        first = False
        while True:
            while self.at < self.limit and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at >= self.limit:
                yield from wait()
                continue
            c = self.text[self.at]
            if (first or wanted == "next") and open_ and c == open_[-1]:
                open_.pop()
                self.at += 1
                wanted, first = "next", False
            elif wanted == "value":
                if c in "{[":
                    open_.append("}" if c == "{" else "]")
                    if len(open_) > DEEPEST:
                        raise ValueError("nested too deeply")
                    self.at += 1
                    wanted, first = "key" if c == "{" else "value", True
                else:
                    yield from self._string(wait) if c == '"' else self._scalar(wait)
                    wanted, first = "next", False
            elif wanted == "key" and c == '"':
                yield from self._string(wait)
                wanted, first = ":", False
            elif wanted == ":" and c == ":":
                self.at += 1
                wanted = "value"
            elif wanted == "next" and c == ",":
                self.at += 1
                wanted = "key" if open_[-1] == "}" else "value"
            else:
                raise ValueError(f"{c!r} cannot stand here")
            if wanted == "next" and not open_:
                return

    def _string(self, wait: Callable[[], Reading[None]]) -> Reading[None]:
        """At its first quotation mark."""
        self.at += 1
        while True:
            found = PLAIN.match(self.text, self.at, self.limit)
            assert found is not None
            self.at = found.end()
            here = self.text[self.at : min(self.limit, self.at + 6)]
            if here[:1] == '"':
                self.at += 1
                return
            if here[:1] not in ("", "\\") or (len(here) > 1 and here[1] not in '"\\/bfnrtu'):
                raise ValueError("no such character in a string")
            if here[1:2] == "u" and len(here) == 6:
                if not HEX.fullmatch(here, 2):
                    raise ValueError("no such character in a string")
                self.at += 6
            elif len(here) > 1 and here[1] != "u":
                self.at += 2
            else:
                yield from wait()

    def _scalar(self, wait: Callable[[], Reading[None]]) -> Reading[None]:
        """A number or a constant."""
        while True:
            rest = self.text[self.at : min(self.limit, self.at + 5)]
            if (word := next((w for w in CONSTANTS if rest.startswith(w)), None)) is not None:
                self.at += len(word)
                return
            found = NUMERIC.match(self.text, self.at, self.limit)
            assert found is not None
            cut = found.end() == self.limit and not self.ended
            if not cut and NUMBER.fullmatch(self.text, self.at, found.end()):
                self.at = found.end()
                return
            if not cut and not any(w.startswith(rest) for w in CONSTANTS):
                raise ValueError("no value")
            yield from wait()
