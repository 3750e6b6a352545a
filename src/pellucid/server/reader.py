"""From one sample's tokens to what an answer is made of: pieces of text, calls, and the tokens' log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.server.calls import BlockReader, Piece
from pellucid.server.json_calls import forced
from pellucid.server.registry import Served


class Parser(Protocol):
    stopped: bool
    deaf: bool

    @property
    def in_thought(self) -> bool: ...

    def feed(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]: ...


@dataclass
class Update:
    """What one step brought of a sample. places: of the sample's tokens whose log-probabilities are told now."""

    pieces: list[Piece]
    places: range
    finish_reason: str | None


class AnswerReader:
    """A `Reader` of the engine: decoder, then parser. Reads until the parser has seen a stop text."""

    def __init__(self, model: Served, parser: Parser, params: SamplingParams, with_logprobs: bool = False):
        self.decoder, self.parser, self.with_logprobs = model.tokenizer.stream(), parser, with_logprobs
        self.hidden, self.ends, self.least = model.hidden, {*model.tokenizer.eos_ids, *params.stop_token_ids}, params.min_tokens
        self.finish_reason: str | None = None
        self.said = 0  # tokens that are part of the answer
        self.thought = 0  # of these, those of the thought
        self._told = 0  # of these, whose log-probabilities were told

    def read(self, request: Request, tokens: list[int]) -> Update | None:
        pieces: list[Piece] = []
        if not tokens and request.finish_reason:  # it failed
            pieces, self.finish_reason = self.parser.feed(self.decoder.finish()) + self.parser.finish(), request.finish_reason
        for i, token in enumerate(tokens):
            last = request.finish_reason if i == len(tokens) - 1 else None
            if last == "stop" and token in self.ends:
                text = ""
            else:
                text = "" if token in self.hidden else self.decoder.add(token)
                self.said += 1
            if last:
                text += self.decoder.finish()
            self.parser.deaf = self.said < self.least
            before = self.parser.in_thought
            pieces += self.parser.feed(text)
            self.thought += before or self.parser.in_thought
            if self.parser.stopped:
                self.finish_reason = "stop"
                break
            if last:
                pieces += self.parser.finish()
                self.finish_reason = "stop" if self.parser.stopped else last
        if not (pieces or self.finish_reason):
            return None
        places = range(self._told, self.said) if self.with_logprobs else range(0)
        self._told = self.said
        return Update(pieces, places, self.finish_reason)


class ForcedCalls:
    """A `Parser` of an answer whose form the server has fixed: the arguments of the tool `name`, or a list of {"name", "parameters"}.
    Behind a thought, where the model writes one.  live: as in `AnswerParser`."""

    def __init__(self, name: str, thoughts: Parser, live: bool = False):
        self.thoughts, self.live, self.stopped, self.deaf = thoughts, live, False, False
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
