"""From a model's text to its parts: thought, answer, tool calls. Incremental, and the same however the text is cut.

    <think>            ->  reasoning        (only where the answer begins with it)
    Hello              ->  content
    <tool_call>        ->  tool_call        the families' formats are in server/formats.py
    {...}
    </tool_call>

White space around blocks belongs to none of the parts. What is no valid call stays content, word for word. Stop texts
end the answer when they appear in its content; a thought is not searched for them.

With `live` a call is told while it is written: its name, then its arguments in pieces. Those of a call that ends well are, joined, the
same text as without. What turns out to be no call, or is cut off, ends as it does without: as content, behind a piece that says which
call is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from pellucid.server.calls import BlockReader, Piece, Schemas
from pellucid.server.formats import HERMES, Format, parse_call
from pellucid.server.json_calls import forced
from pellucid.server.tape import unfinished

__all__ = ["AnswerParser", "Piece", "parse_answer", "parse_call", "unfinished"]
THINK = "<think>"
HEADER = 256  # characters at most of a message's header in the harmony format


class Parts(Protocol):
    """`feed(text)` and at the end `finish()` give the pieces that have become certain."""

    @property
    def in_thought(self) -> bool: ...

    def feed(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]: ...


class AnswerParser:
    """`feed(text)` and at the end `finish()` give the pieces that have become certain.

    thinking: the prompt ends inside a thought (some templates write `<think>` themselves).  tools: look for calls.
    plain: look for nothing but stop texts.  form: the family's format.  schemas: of the tools offered, None where none were.
    live: tell calls as they are written.
    `stopped` turns True when a stop text has ended the answer, `stopped_by`: nothing more will come.  deaf: stop texts do not count yet.
    keeps_stop: the stop text is part of the answer.
    """

    def __init__(self, thinking: bool = False, tools: bool = True, stops: Sequence[str] = (), plain: bool = False,
                 form: Format = HERMES, schemas: Schemas | None = None, live: bool = False, keeps_stop: bool = False):
        self.stops, self.stopped, self.deaf, self.keeps_stop = tuple(stops), False, False, keeps_stop
        self.stopped_by: str | None = None
        self._held = ""  # content that may be the beginning of a stop text
        self._parts: Parts
        if form.channels and not plain:
            self._parts = Channels(tools, live)
        else:
            self._parts = Blocks(thinking, tools and not plain, plain, form, schemas, live)

    @property
    def in_thought(self) -> bool:
        return self._parts.in_thought

    def feed(self, text: str) -> list[Piece]:
        return [] if self.stopped else self._stop_at(self._parts.feed(text))

    def finish(self) -> list[Piece]:
        """What is left: an unfinished thought, text, or a call that was never closed."""
        if self.stopped:
            return []
        pieces = self._stop_at(self._parts.finish())
        if self._held and not self.stopped:
            pieces.append(Piece("content", self._held))
        self._held = ""
        return pieces

    def _stop_at(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces up to the first stop text in the content; the beginning of one is held back."""
        if not self.stops or (self.deaf and not self._held):
            return pieces
        kept: list[Piece] = []
        for piece in pieces:
            if piece.kind == "content":
                text = self._held + piece.text
                first, found = min(((i, s) for s in self.stops if (i := text.find(s)) >= 0), default=(-1, ""))
                self.stopped, self.stopped_by = first >= 0, found or None
                end = first + len(found) * self.keeps_stop if self.stopped else len(text) - unfinished(text, self.stops)
                self._held = "" if self.stopped else text[end:]
                kept += [Piece("content", text[:end])] if end else []
                if self.stopped:
                    break
            else:
                kept += [Piece("content", self._held)] if self._held else []
                self._held = ""
                kept.append(piece)
        return kept


class Blocks:
    """A thought at the front, then content with blocks of calls in it."""

    def __init__(self, thinking: bool, tools: bool, plain: bool, form: Format, schemas: Schemas | None, live: bool):
        self.form, self.schemas, self.tools, self.live = form, schemas or {}, tools, live
        self._bare = form.bare if schemas and tools else ""
        self._opens = [opening for opening, _ in form.blocks] if tools else []
        self._state: Literal["start", "thought", "content", "call"] = (
            "content" if plain else "thought" if thinking else "start")
        self._block: tuple[str, str | None] = ("", None)  # the open one
        self._reader = BlockReader(form.read, self.schemas)
        self._text = ""  # not yet given out
        self._gap = ""  # white space before an open call
        self._trim = thinking  # white space at the front is to be dropped
        self._searched = 0  # of an open block's text: no closing text begins before

    @property
    def in_thought(self) -> bool:
        return self._state == "thought"

    def feed(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        if self._state == "call":
            body, self._text = self._text, ""
            return self._end_call(body, self._block[1] is None, self._gap + self._block[0] + body)
        kind: Literal["reasoning", "content"] = "content"
        rest = self._text
        if self._state == "thought":
            kind, rest = "reasoning", (rest.lstrip() if self._trim else rest).rstrip()
        elif self._state == "content" and self._trim:
            rest = rest.lstrip()
        self._text = ""
        return [Piece(kind, rest)] if rest else []

    def _step(self, pieces: list[Piece]) -> bool:
        """Take what can be taken from the front of the text; True when something was."""
        if self._state == "start":
            return self._begin()
        if self._state == "call":
            return self._take_call(pieces)
        if self._trim:
            self._text = self._text.lstrip()
            if not self._text:
                return False
            self._trim = False
            if self._state == "content" and self._begin_bare():
                return True
        return self._take_text(pieces)

    def _begin(self) -> bool:
        text, think = self._text.lstrip(), self.form.think[0]
        if think.startswith(text[: len(think)]) and len(text) < len(think):
            return False
        thinks = text.startswith(think)
        self._state = "thought" if thinks else "content"
        if thinks:
            self._text, self._trim = text[len(think):], True
        else:
            self._begin_bare()
        return True

    def _begin_bare(self) -> bool:
        """An answer that is a call from its first character on."""
        bare = bool(self._bare) and self._text.lstrip().startswith(self._bare)
        if bare:
            text = self._text.lstrip()
            self._gap, self._text = self._text[: len(self._text) - len(text)], text
            self._open_call(("", None))
        self._bare = ""  # only at the beginning
        return bare

    def _take_text(self, pieces: list[Piece]) -> bool:
        thought = self._state == "thought"
        tags = [self.form.think[1]] if thought else self._opens
        at, tag = min(((i, t) for t in tags if (i := self._text.find(t)) >= 0), default=(-1, ""))
        # Held back: what may be the beginning of a tag, and white space, which may turn out to stand before it.
        end = at if at >= 0 else len(self._text) - (unfinished(self._text, tags) if tags else 0)
        ready = self._text[:end].rstrip() if tags else self._text[:end]
        if ready:
            pieces.append(Piece("reasoning" if thought else "content", ready))
        self._gap, self._text = self._text[len(ready):end], self._text[len(ready):]
        if at < 0:
            return False
        self._text = self._text[len(self._gap) + len(tag):]
        self._state, self._trim = "content", thought
        if not thought:
            self._open_call((tag, dict(self.form.blocks)[tag]))
        return True

    def _open_call(self, block: tuple[str, str | None]) -> None:
        self._state, self._block, self._searched = "call", block, 0
        self._reader = BlockReader(self.form.read, self.schemas)

    def _end_call(self, body: str, closed: bool, text: str) -> list[Piece]:
        """text: what is content if the block's body holds no calls."""
        calls = self._reader.end(body, self.live) if closed else None
        if calls:
            return calls
        return [*(self._reader.lost() if self.live else ()), Piece("content", text)]

    def _take_call(self, pieces: list[Piece]) -> bool:
        opening, closing = self._block
        if closing is None:
            self._read(len(self._text), pieces)
            return False
        at = self._text.find(closing, self._searched)
        while at >= 0 and not self.form.whole(self._text[:at]):
            self._searched = at + 1
            at = self._text.find(closing, self._searched)
        if at < 0:
            self._searched = max(self._searched, len(self._text) - len(closing) + 1)
            self._read(len(self._text) - unfinished(self._text, [closing]), pieces)
            return False
        body, rest = self._text[:at], self._text[at + len(closing):]
        found = self._end_call(body, True, self._gap + opening + body + closing)
        pieces += found
        self._text, self._state, self._trim, self._gap = rest, "content", found[-1].kind == "tool_call", ""
        return True

    def _read(self, certain: int, pieces: list[Piece]) -> None:
        said = self._reader.feed(self._text, certain)
        if self.live:
            pieces += said


class Channels:
    """gpt-oss: every message has a header that says what it is. analysis is a thought, `to=functions.NAME` a call.

        <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...
    """

    ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")

    def __init__(self, tools: bool, live: bool):
        self.tools, self.live = tools, live
        self._reader = BlockReader(forced("-"), {})
        self._text, self._head, self._first = "", True, True
        self._kind: Literal["reasoning", "content", "tool_call"] = "content"
        self._name = self._header = ""

    @property
    def in_thought(self) -> bool:
        return self._kind == "reasoning" and not self._head

    def feed(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while self._take_head(pieces) if self._head else self._take_body(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        text, self._text = self._text, ""
        if not self._head:
            return self._end_of_body(text)
        return [Piece("content", text)] if self._first and text else []

    def _take_head(self, pieces: list[Piece]) -> bool:
        before, found, rest = self._text.partition("<|message|>")
        if not found or len(before) > HEADER:
            if len(self._text) < HEADER + len("<|message|>"):
                return False
            self._head, self._first, self._kind = False, False, "content"  # a model that does not write the format
            return True
        self._header, self._text, self._head, self._first = before, rest, False, False
        _, to, name = before.partition("to=functions.")
        channel = before.partition("<|channel|>")[2].split("<|")[0].split()
        self._name = name.split("<|")[0].split()[0] if to and name.split("<|")[0].split() else ""
        self._reader = BlockReader(forced(self._name), {})
        self._kind = "tool_call" if self._name and self.tools else "reasoning" if channel[:1] == ["analysis"] else "content"
        return True

    def _take_body(self, pieces: list[Piece]) -> bool:
        ends = [(i, e) for e in self.ENDS if (i := self._text.find(e)) >= 0]
        if not ends:
            ready = len(self._text) - unfinished(self._text, self.ENDS)
            if self._kind == "tool_call":
                said = self._reader.feed(self._text, ready)
                pieces += said if self.live else []
                return False
            if ready:
                pieces.append(Piece(self._kind, self._text[:ready]))
            self._text = self._text[ready:]
            return False
        at, end = min(ends)
        pieces += self._end_of_body(self._text[:at])
        self._text, self._head = self._text[at + len(end):], True
        return True

    def _end_of_body(self, body: str) -> list[Piece]:
        if self._kind != "tool_call":
            return [Piece(self._kind, body)] if body else []
        calls = self._reader.end(body, self.live)
        return calls or [*(self._reader.lost() if self.live else ()), Piece("content", f"{self._header}<|message|>{body}")]


def parse_answer(text: str, **options: Any) -> tuple[str, str, list[Piece]]:
    """A whole text as (reasoning, content, calls)."""
    parser = AnswerParser(**options)
    pieces = parser.feed(text) + parser.finish()
    reasoning, content = ("".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "content"))
    return reasoning, content, [p for p in pieces if p.kind == "tool_call"]
