"""Speculative decoding: several tokens are proposed, one pass checks them all, and the output does not change.

A draw is a function of (the request's seed, how many tokens it has, its distribution): see engine/sampler.py. So the check is
an equality: the engine draws at every proposed place as it would have drawn anyway, and keeps proposals as long as they
are what it drew. The tokens are the same as without proposals, one for one, also when sampled; the usual rule
(arXiv 2211.17192: accept with min(1, p/q), else draw from the rest) only keeps the distribution. For a proposer that names
one token per place both accept with the same probability, p of that token.

A proposer that is a model (drafting.py) draws with the same numbers as the engine will: where its distribution is close, so
are the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pellucid.engine.request import Request


class Proposer(Protocol):
    def propose(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        """At most `most` tokens that may follow each request's; an empty list is an answer."""

    def forget(self, request: Request) -> None:
        """The request has left."""


class PromptLookup:
    """What followed the last tokens when they stood in the request before: prompt lookup decoding. Good where answers quote.

    longest, shortest: lengths of the run of last tokens that is looked for, the longest first.
    """

    def __init__(self, longest: int = 4, shortest: int = 2):
        self.longest, self.shortest = longest, shortest
        self.seen: dict[Request, dict[tuple[int, ...], int]] = {}  # run of tokens -> the place behind its latest occurrence
        self.upto: dict[Request, int] = {}

    def propose(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        return [self._one(r, most) for r in requests]

    def _one(self, r: Request, most: int) -> list[int]:
        self._index(r)
        for n in range(min(self.longest, len(r.tokens)), self.shortest - 1, -1):
            place = self.seen[r].get(tuple(r.tokens[-n:]))
            if place is not None:
                return r.tokens[place : place + most]
        return []

    def _index(self, r: Request) -> None:
        """Runs that end before the last token, each token once however often we are asked."""
        seen = self.seen.setdefault(r, {})
        for end in range(self.upto.get(r, 0), len(r.tokens)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                seen[tuple(r.tokens[end - n : end])] = end
        self.upto[r] = len(r.tokens)

    def forget(self, request: Request) -> None:
        self.seen.pop(request, None)
        self.upto.pop(request, None)


def accepted(proposed: Sequence[int], drawn: Sequence[int]) -> list[int]:
    """drawn: one token a proposed place and one behind the last -> those that stand: up to and with the first surprise.

    >>> accepted([5, 6, 7], [5, 6, 9, 1]), accepted([5], [5, 2])
    ([5, 6, 9], [5, 2])
    """
    same = next((i for i, (p, d) in enumerate(zip(proposed, drawn, strict=False)) if p != d), len(proposed))
    return list(drawn[: same + 1])
