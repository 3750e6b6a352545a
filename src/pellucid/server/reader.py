"""From one sample's tokens to what an answer is made of: pieces of text, calls, and the tokens' log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.server.calls import BlockReader, Piece
from pellucid.server.json_calls import forced
from pellucid.server.registry import Served


class Parser(Protocol):
    """stopped: nothing more will come; because of the text `stopped_by`, if there is one.  deaf: stop texts do not count yet."""

    deaf: bool

    @property
    def stopped(self) -> bool: ...

    @property
    def stopped_by(self) -> str | None: ...

    @property
    def in_thought(self) -> bool: ...

    def feed(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]: ...


@dataclass
class Update:
    """What one step brought of a sample. places: of the sample's tokens whose log-probabilities are told now.  tokens: that were read
    since the last one, with the one that ended the answer."""

    pieces: list[Piece]
    places: range
    finish_reason: str | None
    tokens: list[int] = field(default_factory=list)


class AnswerReader:
    """A `Reader` of the engine: decoder, then parser. Reads until the parser has seen a stop text.  bare: show all control tokens."""

    def __init__(self, model: Served, parser: Parser, params: SamplingParams, with_logprobs: bool = False, bare: bool = False):
        self.decoder, self.parser, self.with_logprobs = model.tokenizer.stream(), parser, with_logprobs
        self.hidden, self.least = frozenset() if bare else model.hidden, params.min_tokens
        self.ends, self.asked_ends = {*model.tokenizer.eos_ids, *params.stop_token_ids}, params.stop_token_ids
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None  # the text, or the token among those asked for, that ended it (as vLLM tells it)
        self.tokens: list[int] = []  # all that were read
        self.said = 0  # tokens that are part of the answer
        self.thought = 0  # of these, those of the thought
        self._told = 0  # of these, whose log-probabilities were told
        self._given = 0  # of the tokens, which were part of an update

    def read(self, request: Request, tokens: list[int]) -> Update | None:
        pieces: list[Piece] = []
        if not tokens and request.finish_reason:  # it failed
            pieces, self.finish_reason = self.parser.feed(self.decoder.finish()) + self.parser.finish(), request.finish_reason
        for i, token in enumerate(tokens):
            last = request.finish_reason if i == len(tokens) - 1 else None
            self.tokens.append(token)
            if last == "stop" and token in self.ends:
                text, self.stop_reason = "", token if token in self.asked_ends else None
            else:
                text = "" if token in self.hidden else self.decoder.add(token)
                self.said += 1
            if last:
                text += self.decoder.finish()
            self.parser.deaf = self.said < self.least
            before = self.parser.in_thought
            pieces += self.parser.feed(text)
            self.thought += before or self.parser.in_thought
            if last and not self.parser.stopped:
                pieces += self.parser.finish()
                self.finish_reason = last
            if self.parser.stopped:
                self.finish_reason, self.stop_reason = "stop", self.parser.stopped_by
                break
        if not (pieces or self.finish_reason):
            return None
        places = range(self._told, self.said) if self.with_logprobs else range(0)
        self._told, given, self._given = self.said, self._given, len(self.tokens)
        return Update(pieces, places, self.finish_reason, self.tokens[given:])


class ForcedCalls:
    """A `Parser` of an answer whose form the server has fixed: the arguments of the tool `name`, or a list of {"name", "parameters"}.
    Behind a thought, where the model writes one.  live: as in `AnswerParser`."""

    def __init__(self, name: str, thoughts: Parser, live: bool = False):
        self.thoughts, self.live, self.stopped, self.stopped_by, self.deaf = thoughts, live, False, None, False
        self._text = ""
        self._reader = BlockReader(forced(name), {})

    @property
    def in_thought(self) -> bool:
        return self.thoughts.in_thought

    def feed(self, text: str) -> list[Piece]:
        pieces = self._keep(self.thoughts.feed(text))
        said = self._reader.feed(self._text, len(self._text))
        return pieces + (said if self.live else [])

    def finish(self) -> list[Piece]:
        pieces = self._keep(self.thoughts.finish())
        calls = self._reader.end(self._text, self.live)
        if calls:
            return pieces + calls
        return pieces + (self._reader.lost() if self.live else []) + ([Piece("content", self._text)] if self._text else [])

    def _keep(self, pieces: list[Piece]) -> list[Piece]:
        self._text += "".join(p.text for p in pieces if p.kind == "content")
        return [p for p in pieces if p.kind == "reasoning"]


class OneCall:
    """A `Parser` of an answer with one call at most (parallel_tool_calls false): it ends behind the first one."""

    def __init__(self, parser: Parser):
        self.parser = parser
        self._done = False
        self._open = 0  # calls that have begun, and neither ended nor got lost

    @property
    def in_thought(self) -> bool:
        return self.parser.in_thought

    @property
    def stopped(self) -> bool:
        return self._done or self.parser.stopped

    @property
    def stopped_by(self) -> str | None:
        return self.parser.stopped_by

    @property
    def deaf(self) -> bool:
        return self.parser.deaf

    @deaf.setter
    def deaf(self, value: bool) -> None:
        self.parser.deaf = value

    def feed(self, text: str) -> list[Piece]:
        return self._first(self.parser.feed(text))

    def finish(self) -> list[Piece]:
        return self._first(self.parser.finish())

    def _first(self, pieces: list[Piece]) -> list[Piece]:
        """Without the calls behind the first, in its block too, and what stands behind it."""
        kept: list[Piece] = []
        for piece in pieces:
            if self._done:
                break
            self._open += (piece.part == "begin") - (piece.part == "lost")
            self._done = piece.kind == "tool_call" and piece.part in ("whole", "end")
            if piece.kind != "tool_call" or self._done or self._open == (piece.part != "lost"):
                kept.append(piece)
        return kept
