"""How long requests wait and run, counted in buckets as Prometheus counts them."""

from __future__ import annotations

from bisect import bisect_left

SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
LONG = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


class Histogram:
    """counts[i]: values up to bounds[i] and above the bound before; the last one counts the rest."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[int]:
        """Values up to each bound, and all."""
        total, sums = 0, []
        for count in self.counts:
            total += count
            sums.append(total)
        return sums


class Latencies:
    """Of requests, in seconds. queued: until the engine took it up.  first: until its first token.  between: two tokens (those of one
    step count as equally far apart).  whole: until its last token."""

    def __init__(self) -> None:
        self.queued, self.first, self.between, self.whole = Histogram(LONG), Histogram(SHORT), Histogram(SHORT), Histogram(LONG)
