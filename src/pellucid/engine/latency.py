"""How long requests wait and run, and how many tokens they have, counted in buckets as Prometheus counts them.

The bounds are vLLM's, so that its dashboards can add up both; below its shortest distance of two tokens there are a few more.
"""

from __future__ import annotations

from bisect import bisect_left

SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
LONG = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
APART = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SAMPLES = (1, 2, 5, 10, 20)


def up_to(most: int) -> tuple[int, ...]:
    """
    >>> up_to(60)
    (1, 2, 5, 10, 20, 50)
    """
    return tuple(n for power in range(len(str(most))) for digit in (1, 2, 5) if (n := digit * 10**power) <= most)


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
    step count as equally far apart).  whole: until its last token.
    Of each sample that ended, too: prefill, from when it was taken up to its first token; decode, from there to its last; running, both;
    pace, decode over the tokens behind the first.

    And in tokens, at most `context`. prompt, written, asked (max_tokens): of each sample that ended.  longest: of a prompt's samples.
    samples: how many they were.  step: computed in one step.
    """

    def __init__(self, context: int) -> None:
        self.queued, self.first, self.between, self.whole = Histogram(LONG), Histogram(SHORT), Histogram(APART), Histogram(LONG)
        self.prefill, self.decode, self.running, self.pace = Histogram(LONG), Histogram(LONG), Histogram(LONG), Histogram(APART)
        self.prompt, self.written, self.asked, self.longest = (Histogram(up_to(context)) for _ in range(4))
        self.samples, self.step = Histogram(SAMPLES), Histogram(STEP)

    def ended(self, prompt: int, written: int, asked: int, taken: float | None, first: float | None, last: float | None) -> None:
        """A sample, with so many tokens; the times are those of its first and last one, None where there is none."""
        for histogram, tokens in ((self.prompt, prompt), (self.written, written), (self.asked, asked)):
            histogram.observe(tokens)
        if taken is None or first is None or last is None:
            return
        self.prefill.observe(first - taken)
        self.decode.observe(last - first)
        self.running.observe(last - taken)
        if written > 1:
            self.pace.observe((last - first) / (written - 1))
