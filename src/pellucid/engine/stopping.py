"""Texts that end an answer, looked for while it is written."""

from __future__ import annotations

from collections.abc import Sequence

from pellucid.engine.request import Request
from pellucid.tokenizers import Tokenizer


class StopTexts:
    """Called after each token: whether a stop text has appeared."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, request: Request) -> bool:
        return appears(self.tokenizer, request.tokens, len(request.prompt), request.params.stop)


def appears(tokenizer: Tokenizer, tokens: Sequence[int], start: int, stops: Sequence[str]) -> bool:
    """Whether one of the texts stands at the end of what follows `start`. Only the tail is decoded: a text of n characters has at
    most 4n bytes."""
    longest = 4 * max(map(len, stops)) + 4
    tail = tokenizer.decode(tokens[max(start, len(tokens) - longest) :])
    return any(s in tail for s in stops)


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first stop text."""
    ends = [i for i in (text.find(s) for s in stops) if i >= 0]
    return text[: min(ends)] if ends else text
