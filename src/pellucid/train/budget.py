"""How long a run lasts: a number of steps (exact, repeatable) or of seconds (the clock decides)."""

from __future__ import annotations

import time

from pellucid.errors import BadInput
from pellucid.messages import add, three_parts

add({
    "budget.which": ("a run needs either a number of steps or of seconds", "训练须给定步数或时间之一"),
    "budget.which.next": ("give --steps or --minutes", "请用 --steps 或 --minutes"),
    "budget.none": ("a run of {length} is not possible", "长度为 {length} 的训练不可行"),
    "budget.none.next": ("give at least one step, or a positive time", "至少一步，或给出正的时间"),
    "loop.stopped": ("{stage}: stopped at step {step}; everything is saved", "{stage}：已在第 {step} 步停止，全部已保存"),
    "loop.lost": ("{stage}: stopped", "{stage}：已停止"),
    "loop.lost.why": ("no folder was given to save to", "没有给出保存目录"),
    "loop.goes_on": ("{stage}: goes on at step {step}", "{stage}：从第 {step} 步继续"),
})


class Budget:
    """Progress in [0, 1] and time left. The seconds spent before an interruption count (`spent`)."""

    def __init__(self, steps: int | None = None, seconds: float | None = None, clock: object = time.monotonic):
        if (steps is None) == (seconds is None):
            raise BadInput(*three_parts("budget.which"))
        if (steps is not None and steps < 1) or (seconds is not None and not 0 < seconds < 1e9):
            raise BadInput(*three_parts("budget.none", length=f"{steps} steps" if seconds is None else f"{seconds} s"))
        self.steps, self.seconds = steps, seconds
        self._now = clock  # type: ignore[assignment]
        self.done = 0
        self.spent = 0.0
        self._began = self._now()  # type: ignore[operator]

    def start(self, done: int = 0, spent: float = 0.0) -> None:
        """(Re)start the clock; `done` steps and `spent` seconds lie behind."""
        self.done, self.spent, self._began = done, spent, self._now()  # type: ignore[operator]

    @property
    def elapsed(self) -> float:
        return self.spent + self._now() - self._began  # type: ignore[operator]

    @property
    def progress(self) -> float:
        if self.steps is not None:
            return min(1.0, self.done / self.steps)
        return min(1.0, self.elapsed / self.seconds)  # type: ignore[operator]

    @property
    def over(self) -> bool:
        return self.progress >= 1.0

    @property
    def eta(self) -> float | None:
        """Seconds left, from the pace so far; None before the first step."""
        if self.seconds is not None:
            return max(0.0, self.seconds - self.elapsed)
        return None if not self.done else self.elapsed / self.done * (self.steps - self.done)  # type: ignore[operator]
