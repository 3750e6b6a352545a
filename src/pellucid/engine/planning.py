"""Small exact plans for what servers do greedily: how to cut a prompt into chunks, and in which order to admit prompts.

Chunks. A chunk of the tokens j..i of a prompt takes t(j, i) = alpha + beta (i - j) + gamma (i^2 - j^2) / 2: a step's fixed cost,
the products, and attention to everything before. Under a cap on the time of a step (others are decoding and wait for it),
f(i) = min over j < i with t(j, i) <= cap of f(j) + t(j, i).

Order. A prompt admitted when the cache holds another one's path computes only what lies behind their common prefix. With
room for one path, the tokens computed by an order are sum of len(r) - common(r, the one before): the shortest path through
all prompts (Held and Karp, 1962), which depth-first order through the prefix tree reaches: each edge of the tree once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pellucid.engine.prefix_cache import PrefixCache
from pellucid.engine.request import Request
from pellucid.errors import BadInput


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step: alpha, plus beta a token, plus gamma for each pair of a token and one before it."""

    alpha: float
    beta: float
    gamma: float

    def of(self, start: int, stop: int) -> float:
        return self.alpha + self.beta * (stop - start) + self.gamma * (stop * stop - start * start) / 2

    def largest(self, start: int, most: int, cap: float) -> int:
        """The most tokens behind `start` whose step stays under the cap; at least 1, or nothing would ever move."""
        low, high = 1, max(1, most)
        while low < high:  # of() grows with stop
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.of(start, start + middle) <= cap else (low, middle - 1)
        return low

    @staticmethod
    def fitted(steps: Sequence[tuple[int, int, float]]) -> StepCost:
        """Least squares over measured (start, stop, seconds), no coefficient below 0."""
        import numpy as np

        if len(steps) < 3:
            raise BadInput(f"{len(steps)} measured steps cannot fit three numbers", next="measure at least 3 of different lengths")
        table = np.array([[1.0, stop - start, (stop * stop - start * start) / 2] for start, stop, _ in steps])
        scale = table.max(0)
        found, *_ = np.linalg.lstsq(table / scale, np.array([t for _, _, t in steps]), rcond=None)
        return StepCost(*np.maximum(found / scale, 0).tolist())


def greedy_chunks(length: int, cost: StepCost, cap: float, start: int = 0) -> list[int]:
    """Each chunk as large as the cap allows. As good as `best_chunks`: beta and gamma add up to the same for every cut, so
    that only the number of chunks counts, and a chunk that reaches further never makes a later one start earlier."""
    chunks = []
    while start < length:
        chunks.append(cost.largest(start, length - start, cap))
        start += chunks[-1]
    return chunks


def best_chunks(length: int, cost: StepCost, cap: float, quantum: int = 1) -> list[int]:
    """The exact plan by dynamic programming over cuts at multiples of `quantum`, O((length / quantum)^2); a chunk of one quantum is
    allowed whatever it takes."""
    cuts = [*range(0, length, quantum), length]
    best: list[tuple[float, int]] = [(0.0, 0)]  # seconds up to this cut, the cut before
    for i in range(1, len(cuts)):
        options = [(best[j][0] + cost.of(cuts[j], cuts[i]), j) for j in range(i)
                   if j == i - 1 or cost.of(cuts[j], cuts[i]) <= cap]
        best.append(min(options))
    chunks, i = [], len(cuts) - 1
    while i:
        chunks.append(cuts[i] - cuts[best[i][1]])
        i = best[i][1]
    return chunks[::-1]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens at the beginning that agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def computed_tokens(order: Sequence[Sequence[int]]) -> int:
    """Tokens computed in this order with room for one path (the last token of a prompt is always computed)."""
    total, before = 0, list[int]()
    for prompt in order:
        total += len(prompt) - min(common(prompt, before), len(prompt) - 1)
        before = list(prompt)
    return total


def best_order(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The order (indices) that computes the fewest tokens: exact, over subsets, for at most 15 prompts."""
    n = len(prompts)
    if n > 15:
        raise BadInput(f"{n} prompts are too many for an exact order", "the table has 2^n n entries", "give at most 15, or use depth_first")
    new = [[len(b) - min(common(a, b), len(b) - 1) for b in prompts] for a in prompts]
    best: dict[tuple[int, int], tuple[int, int]] = {(1 << i, i): (len(p), -1) for i, p in enumerate(prompts)}
    for mask in range(1, 1 << n):
        for last in range(n):
            if (mask, last) not in best:
                continue
            here = best[mask, last][0]
            for following in range(n):
                if not mask >> following & 1:
                    key, value = (mask | 1 << following, following), here + new[last][following]
                    if key not in best or value < best[key][0]:
                        best[key] = value, last
    mask, last = (1 << n) - 1, min(range(n), key=lambda i: best[(1 << n) - 1, i][0]) if n else -1
    order = []
    while last >= 0:
        order.append(last)
        mask, last = mask ^ 1 << last, best[mask, last][1]
    return order[::-1]


def depth_first(waiting: list[Request], cache: PrefixCache) -> Iterable[Request]:
    """An `Order` of the scheduler: by priority, then depth first through the tree of prefixes that the waiting requests make. Of the
    branches at the root that of the oldest request comes first; below, sorting by tokens is depth-first order."""
    oldest: dict[int, int] = {}
    for r in waiting:
        oldest[r.tokens[0]] = min(r.number, oldest.get(r.tokens[0], r.number))
    return sorted(waiting, key=lambda r: (r.priority, oldest[r.tokens[0]], r.tokens))
