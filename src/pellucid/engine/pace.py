"""How long a step may take: whoever is writing waits for the whole step, so prompts get what the others' patience leaves.

The time of a step is learned while it runs (`planning.StepCost`: a fixed cost, one a token, one for each pair of a token and one
before it). Decoding requests always get their token; prompts get the largest chunks that keep the step under the cap, which
is as good as the exact plan by dynamic programming (`planning.best_chunks`; their test shows it).
"""

from __future__ import annotations

from collections.abc import Iterable

from pellucid.engine.planning import StepCost

LEAST = 16
"""Tokens of a prompt that are computed in a step whatever it takes: or a prompt behind long texts would never move."""
FORGET = 0.98
"""Weight of the past at each step: some fifty steps are remembered, so that a machine that slows down is noticed."""
FIRST = 8
"""Steps that are watched before anything is predicted: the first ones compile kernels and warm caches."""


class Pace:
    """`begin(parts)` with the decoding (start, count), then `largest(start, most)` and `take(start, count)` for each prompt;
    after the step `observe`."""

    def __init__(self, seconds: float):
        self.seconds, self.cost = seconds, StepCost(0.0, 0.0, 0.0)
        self.steps, self.expected, self.moved = 0, 0.0, False
        self.products = [[0.0] * 3 for _ in range(3)]  # of the normal equations, weighted by age
        self.right = [0.0] * 3

    def begin(self, decoding: Iterable[tuple[int, int]]) -> None:
        self.expected, self.moved = self.cost.alpha, False
        for start, count in decoding:
            self.take(start, count)
        self.moved = False

    def take(self, start: int, count: int) -> None:
        self.expected += self.cost.of(start, start + count) - self.cost.alpha
        self.moved = True

    def largest(self, start: int, most: int) -> int:
        """Tokens of a prompt from `start` on: at most `most`; 0 where others have used up the step."""
        if self.steps < FIRST:
            return most
        left = self.seconds - self.expected + self.cost.alpha  # StepCost counts the fixed cost in
        fits = self.cost.largest(start, most, left)
        if self.cost.of(start, start + fits) <= left and (fits >= min(LEAST, most) or self.moved):
            return fits
        return 0 if self.moved else min(LEAST, most)

    def observe(self, parts: Iterable[tuple[int, int]], seconds: float) -> None:
        """A step of these (start, count) took so long."""
        tokens = pairs = 0.0
        for start, count in parts:
            tokens += count
            pairs += count * (start + count / 2)
        self.steps += 1
        if not tokens or self.steps <= FIRST // 2:
            return
        row = (1.0, tokens, pairs)
        for i in range(3):
            self.right[i] = FORGET * self.right[i] + row[i] * seconds
            for j in range(3):
                self.products[i][j] = FORGET * self.products[i][j] + row[i] * row[j]
        self.cost = StepCost(*solved(self.products, self.right))


def solved(products: list[list[float]], right: list[float]) -> list[float]:
    """Least squares without negative coefficients: those that would be are left out, the smallest first."""
    import numpy as np

    a, b = np.array(products), np.array(right)
    scale = np.sqrt(np.maximum(a.diagonal(), 1e-30))
    a, b = a / scale[:, None] / scale, b / scale
    kept = [0, 1, 2]
    found = np.zeros(3)
    while kept:
        part = np.linalg.lstsq(a[np.ix_(kept, kept)], b[kept], rcond=1e-9)[0]
        if part.min() >= 0:
            found[kept] = part
            break
        kept.pop(int(part.argmin()))
    return list((found / scale).tolist())
