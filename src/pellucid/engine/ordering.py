"""Who is admitted first, by dynamic programming: the order of the next few waiting prompts that computes the fewest tokens.

Three things save a prompt's tokens: what the cache holds now, what a prompt admitted before it brings in, and always the path
of the prompt just before it. The first two last only while everything that was computed since still fits beside them; with
C tokens computed so far and `room` tokens that can be given away without loss,

    new(b | set S, last a) = |b| - max(common(a, b),  [C + |b| <= room] max(hit(b), max over s in S of common(s, b)))

The fewest tokens over all orders: best(S + b, b) = min over a of best(S, a) + new(b | S, a), as in Held and Karp's travelling
salesman (1962). Smaller C never hurts what follows, so that keeping the least of each state is exact for this model of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pellucid.engine.planning import common
from pellucid.engine.prefix_cache import PrefixCache
from pellucid.engine.request import Request

WINDOW = 7
"""Requests that are planned together: 2^7 * 7^2 = 6,272 steps of the table, some milliseconds."""


def fewest_tokens(prompts: Sequence[Sequence[int]], hits: Sequence[int], room: int) -> tuple[list[int], int]:
    """The best order (indices) and the tokens that it computes. hits: of each prompt, tokens that the cache holds now."""
    n = len(prompts)
    lengths = [len(p) for p in prompts]
    shared = [[min(common(a, b), len(b) - 1) for b in prompts] for a in prompts]
    held = [[min(hit, length - 1) for hit, length in zip(hits, lengths, strict=True)]]  # [set][b]: in the cache, if all of it fitted
    for mask in range(1, 1 << n):
        low = (mask & -mask).bit_length() - 1
        held.append([max(had, gain) for had, gain in zip(held[mask & (mask - 1)], shared[low], strict=True)])
    best: dict[tuple[int, int], tuple[int, int]] = {(0, -1): (0, -1)}  # (set, last) -> tokens computed, the one before
    for mask in range(1 << n):
        for last in range(n) if mask else (-1,):
            if (mask, last) not in best:
                continue
            so_far = best[mask, last][0]
            for b in range(n):
                if mask >> b & 1:
                    continue
                saved = shared[last][b] if last >= 0 else 0
                if so_far + lengths[b] <= room:
                    saved = max(saved, held[mask][b])
                total, key = so_far + lengths[b] - saved, (mask | 1 << b, b)
                if key not in best or total < best[key][0]:
                    best[key] = total, last
    mask, last = (1 << n) - 1, min(range(n), key=lambda i: best[(1 << n) - 1, i][0], default=-1)
    least, order = best[mask, last][0], list[int]()
    while last >= 0:
        order.append(last)
        mask, last = mask ^ 1 << last, best[mask, last][1]
    return order[::-1], least


class Planned:
    """An `Order` of the scheduler: by priority; among equals WINDOW at a time in the order that computes the fewest tokens. Later
    ones join only when all of a batch are admitted (or it has room), so that nobody waits for more than a window of later ones.
    The plan is made again when the waiting ones of the batch have changed."""

    def __init__(self) -> None:
        self.batches: dict[int, list[Request]] = {}  # of each priority, those that are planned together, the admitted ones too
        self.planned: list[Request] = []
        self.seen: list[Request] = []

    def __call__(self, waiting: list[Request], cache: PrefixCache) -> Iterable[Request]:
        if not waiting:
            return []
        ranked, here = sorted(waiting, key=lambda r: (r.priority, r.number)), set(waiting)
        self.batches = {priority: batch for priority, batch in self.batches.items() if not here.isdisjoint(batch)}
        equals = [r for r in ranked if r.priority == ranked[0].priority]
        batch = self.batches.setdefault(ranked[0].priority, [])
        batch += [r for r in equals if r not in batch][: WINDOW - len(batch)]
        window = [r for r in equals if r in batch]
        if set(window) != set(self.seen):
            hits = [len(cache.match(r)) * cache.size for r in window]
            order, _ = fewest_tokens([r.tokens for r in window], hits, cache.available() * cache.size)
            self.planned, self.seen = [window[i] for i in order], window
        return [*self.planned, *(r for r in ranked if r not in self.planned)]
