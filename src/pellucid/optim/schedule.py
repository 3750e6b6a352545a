"""Learning-rate schedules as functions of progress in [0, 1], not of steps.

A run whose length is set by the clock does not know its number of steps; progress it always knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Shape = Literal["constant", "linear", "cosine", "wsd"]


@dataclass(frozen=True)
class Schedule:
    """Factor on the learning rate: linear warm-up, then the shape's decay down to `floor`."""

    shape: Shape = "wsd"
    """constant; linear and cosine decay from the warm-up on; wsd (warm-up, stable, decay: arXiv 2404.06395) decays
    linearly over the last `decay` share only."""
    warmup: float = 0.02
    """Share of the run that warms up."""
    decay: float = 0.4
    """wsd: share of the run that decays."""
    floor: float = 0.0
    """Factor at the end."""

    def __call__(self, progress: float) -> float:
        p = min(max(progress, 0.0), 1.0)
        if p < self.warmup:
            return max(p, 1e-3 * self.warmup) / self.warmup
        return self.floor + (1 - self.floor) * self._fall(p)

    def _fall(self, p: float) -> float:
        after = (p - self.warmup) / max(1 - self.warmup, 1e-9)
        shapes: dict[str, Callable[[], float]] = {
            "constant": lambda: 1.0,
            "linear": lambda: 1 - after,
            "cosine": lambda: 0.5 * (1 + math.cos(math.pi * after)),
            "wsd": lambda: min(1.0, (1 - p) / self.decay) if self.decay else 1.0,
        }
        return shapes[self.shape]()
