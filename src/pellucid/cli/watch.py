"""What an engine does, for people: one line per interval, from its events.

    engine  running=3 waiting=0  prompt 512.0 generated 84.2 tokens/s  cache 12% of 40,960 tokens  hits 63%  preempted 0
"""

from __future__ import annotations

import time as clock
from typing import Any, TextIO

from pellucid.events import Event


class EngineLines:
    """Subscriber of `engine_step`: says at most every `interval` seconds what the steps since the last line did."""

    def __init__(self, out: TextIO, interval: float = 5.0):
        self.out, self.interval = out, interval
        self._since = clock.monotonic()
        self._sums = dict.fromkeys(("tokens", "generated", "preempted", "hit", "prompt"), 0)

    def __call__(self, event: Event) -> None:
        if event.kind != "engine_step":
            return
        step: Any = event
        for name in self._sums:
            self._sums[name] += getattr(step, name)
        now = clock.monotonic()
        if now - self._since >= self.interval:
            self.out.write(line(step, self._sums, now - self._since) + "\n")
            self.out.flush()
            self._since, self._sums = now, dict.fromkeys(self._sums, 0)


def line(step: Any, sums: dict[str, int], seconds: float) -> str:
    """step: the latest event; sums: over the steps of the last `seconds`."""
    used = 1 - step.available / step.blocks
    hits = f"{sums['hit'] / sums['prompt']:.0%}" if sums["prompt"] else "-"
    return (f"engine  running={step.running} waiting={step.waiting}  prompt {(sums['tokens'] - sums['generated']) / seconds:.1f} "
            f"generated {sums['generated'] / seconds:.1f} tokens/s  cache {used:.0%} of {step.blocks:,} blocks  hits {hits}  "
            f"preempted {sums['preempted']}")
