"""Texts that end an answer, looked for while it is written. One that is complete before `min_tokens` does not count, then or later."""

from __future__ import annotations

from collections.abc import Sequence

from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.tokenizers import Tokenizer


class StopTexts:
    """Called after each token: whether a stop text has appeared."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, request: Request) -> bool:
        p = request.params
        return request.generated >= p.min_tokens and appears(self.tokenizer, request.tokens, len(request.prompt), p.stop)


def appears(tokenizer: Tokenizer, tokens: Sequence[int], start: int, stops: Sequence[str]) -> bool:
    """Whether the last token completes one of the texts, in what follows `start`. Only the tail is decoded: a text of n characters has
    at most 4n bytes."""
    first = max(start, len(tokens) - 4 * max(map(len, stops)) - 4)
    return ends_at(tokenizer.decode(tokens[first:]), stops, whole(tokenizer, tokens[first:-1])) >= 0


def cut(text: str, stops: Sequence[str], early: int = 0) -> str:
    """`text` up to the first stop text that is not complete within the first `early` characters."""
    end = ends_at(text, stops, early)
    return text[:end] if end >= 0 else text


def early(tokenizer: Tokenizer, output: Sequence[int], params: SamplingParams) -> int:
    """Characters of an answer that came too early for a stop text."""
    return whole(tokenizer, output[: params.min_tokens - 1]) if params.stop and params.min_tokens > 1 else 0


def ends_at(text: str, stops: Sequence[str], known: int) -> int:
    """Where the first stop text begins that ends behind the first `known` characters; -1: there is none."""
    return min((i for s in stops if (i := text.find(s, max(0, known - len(s) + 1))) >= 0), default=-1)


def whole(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """Characters that are complete."""
    return len(tokenizer.decode(tokens).rstrip("\ufffd"))
