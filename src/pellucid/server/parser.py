"""From a model's text to its parts: thought, answer, tool calls. Incremental, and the same however the text is cut.

    <think>            ->  reasoning        (only where the answer begins with it)
    Hello              ->  content
    <tool_call>        ->  tool_call        {"name": ..., "arguments": {...}}, read when its block is closed
    {...}
    </tool_call>

White space around blocks belongs to none of the parts. What is no valid call stays content, word for word. Stop texts
end the answer when they appear in its content; a thought is not searched for them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

THINK, END_THINK, CALL, END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Piece:
    """A bit of text, or one whole call (`text`: its arguments as JSON)."""

    kind: Literal["reasoning", "content", "tool_call"]
    text: str
    name: str = ""


class AnswerParser:
    """`feed(text)` and at the end `finish()` give the pieces that have become certain.

    thinking: the prompt ends inside a thought (some templates write `<think>` themselves).  tools: look for calls.
    plain: look for nothing but stop texts.  `stopped` turns True when a stop text has ended the answer: nothing more will come.
    """

    def __init__(self, thinking: bool = False, tools: bool = True, stops: Sequence[str] = (), plain: bool = False):
        self.tools, self.stops = tools and not plain, tuple(stops)
        self.stopped = False
        self._state: Literal["start", "thought", "content", "call"] = (
            "content" if plain else "thought" if thinking else "start")
        self._text = ""  # not yet given out
        self._gap = ""  # white space before an open call
        self._trim = thinking  # white space at the front is to be dropped
        self._held = ""  # content that may be the beginning of a stop text

    def feed(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while not self.stopped and self._step(pieces):
            pass
        return [] if not pieces else self._stop_at(pieces)

    def finish(self) -> list[Piece]:
        """What is left: an unfinished thought, text, or a call that was never closed."""
        if self.stopped:
            return []
        rest = self._gap + CALL + self._text if self._state == "call" else self._text
        kind: Literal["reasoning", "content"] = "content"
        if self._state == "thought":
            kind, rest = "reasoning", (rest.lstrip() if self._trim else rest).rstrip()
        elif self._state == "content" and self._trim:
            rest = rest.lstrip()
        pieces = self._stop_at([Piece(kind, rest)] if rest else [])
        if self._held and not self.stopped:
            pieces.append(Piece("content", self._held))
        self._text = self._held = ""
        return pieces

    def _step(self, pieces: list[Piece]) -> bool:
        """Take what can be taken from the front of the text; True when something was."""
        if self._state == "start":
            text = self._text.lstrip()
            if THINK.startswith(text[: len(THINK)]) and len(text) < len(THINK):
                return False
            thinks = text.startswith(THINK)
            self._state = "thought" if thinks else "content"
            if thinks:
                self._text, self._trim = text[len(THINK):], True
            return True
        if self._state == "call":
            return self._take_call(pieces)
        if self._trim:
            self._text = self._text.lstrip()
            if not self._text:
                return False
            self._trim = False
        return self._take_text(pieces)

    def _take_text(self, pieces: list[Piece]) -> bool:
        thought = self._state == "thought"
        tag = END_THINK if thought else CALL
        at = self._text.find(tag) if thought or self.tools else -1
        # Held back: what may be the beginning of the tag, and white space, which may turn out to stand before it.
        end = at if at >= 0 else len(self._text) - (unfinished(self._text, [tag]) if thought or self.tools else 0)
        ready = self._text[:end].rstrip() if thought or self.tools else self._text[:end]
        if ready:
            pieces.append(Piece("reasoning" if thought else "content", ready))
        self._gap, self._text = self._text[len(ready):end], self._text[len(ready):]
        if at < 0:
            return False
        self._text = self._text[len(self._gap) + len(tag):]
        self._state, self._trim = ("content", True) if thought else ("call", False)
        return True

    def _take_call(self, pieces: list[Piece]) -> bool:
        body, closed, rest = self._text.partition(END_CALL)
        if not closed:
            return False
        call = parse_call(body)
        pieces.append(call or Piece("content", self._gap + CALL + body + END_CALL))
        self._text, self._state, self._trim, self._gap = rest, "content", call is not None, ""
        return True

    def _stop_at(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces up to the first stop text in the content; the beginning of one is held back."""
        if not self.stops:
            return pieces
        kept: list[Piece] = []
        for piece in pieces:
            if piece.kind == "content":
                text = self._held + piece.text
                first = min((i for i in (text.find(s) for s in self.stops) if i >= 0), default=-1)
                self.stopped = first >= 0
                end = first if self.stopped else len(text) - unfinished(text, self.stops)
                self._held = "" if self.stopped else text[end:]
                kept += [Piece("content", text[:end])] if end else []
                if self.stopped:
                    break
            else:
                kept += [Piece("content", self._held)] if self._held else []
                self._held = ""
                kept.append(piece)
        return kept


def unfinished(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of `tags` begins, without being whole."""
    longest = min(len(text), max(map(len, tags)) - 1)
    return next((n for n in range(longest, 0, -1) if any(t.startswith(text[-n:]) for t in tags if len(t) > n)), 0)


def parse_call(body: str) -> Piece | None:
    """`{"name": ..., "arguments": {...}}` as a tool_call; None when it is anything else."""
    try:
        call: Any = json.loads(body)
        if not isinstance(call, dict) or set(call) - {"name", "arguments"}:
            return None
        name, arguments = call.get("name"), call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return Piece("tool_call", json.dumps(arguments, ensure_ascii=False), name)


def parse_answer(text: str, **options: Any) -> tuple[str, str, list[Piece]]:
    """A whole text as (reasoning, content, calls)."""
    parser = AnswerParser(**options)
    pieces = parser.feed(text) + parser.finish()
    reasoning, content = ("".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "content"))
    return reasoning, content, [p for p in pieces if p.kind == "tool_call"]
