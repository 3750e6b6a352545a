"""The live view: progress and time left; up to six metrics with sparklines; the latest samples and events.

Nothing is drawn before the first stage or step, so that verbs without progress keep a quiet terminal. Stages that end
leave one line above the view for good; the view itself goes when the work ends.
"""

from __future__ import annotations

import threading
import time as clock
from collections import deque
from typing import Any

from rich.cells import set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from pellucid.cli.display import SHOWN_METRICS, duration, number, printable
from pellucid.events import Event
from pellucid.messages import say, term

BLOCKS = "▁▂▃▄▅▆▇█"
LATEST, POINTS = 6, 64


class Curve:
    """A whole stage's values of one metric in at most `POINTS` points.

    When full, neighbours are averaged and each point stands for twice as many values from then on.
    """

    def __init__(self) -> None:
        self.points: list[float] = []
        self.last = 0.0
        self._stride, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        self.last, self._sum, self._count = value, self._sum + value, self._count + 1
        if self._count == self._stride:
            self.points.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self.points) == POINTS:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
            self._stride *= 2


class LiveView:
    """Subscriber that redraws four times a second; safe to call from any thread."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._begun = clock.monotonic()
        self._stage: Any = None
        self._step: Any = None
        self._curves: dict[str, Curve] = {}
        self._latest: deque[Text] = deque(maxlen=LATEST)

    def __call__(self, event: Event) -> None:
        with self._lock:
            lasting = self._take(event)
        if event.kind in ("stage_begin", "step") and self._live is None:
            self._live = Live(get_renderable=self.render, console=self.console, transient=True, refresh_per_second=4)
            self._live.start()
        if lasting is not None:
            self.console.print(lasting)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _take(self, event: Any) -> Text | None:
        """Remember what the view shows; return a line that is to stay above it."""
        match event.kind:
            case "stage_begin":
                self._stage, self._step, self._curves, self._begun = event, None, {}, clock.monotonic()
            case "step":
                self._step = event
                for name, value in event.metrics.items():
                    if isinstance(value, (int, float)):
                        self._curves.setdefault(name, Curve()).add(float(value))
            case "stage_end":
                return stage_line(event)
            case "evaluation":
                self._latest.append(Text.assemble((f"{term(event.name)} ", "bold"), number(event.value)))
            case "sample":
                self._latest.append(sample_line(event))
            case "alarm":  # stays above the view: it is why one would stop the run
                return Text(f"! {event.text}\n  -> {event.remedy}", style="bold red" if event.level == "warning" else "yellow")
            case "note":
                line = Text(printable(event.text), style="yellow" if event.level == "warning" else "dim")
                if self._live is None:
                    return line
                self._latest.append(line)
        return None

    def render(self) -> RenderableType:
        with self._lock:
            zones: list[RenderableType] = [self._progress()]
            if self._curves:
                zones += [Rule(say("display.metrics"), style="dim", align="left"), self._metrics()]
            if self._latest:
                zones.append(Rule(say("display.latest"), style="dim", align="left"))
                zones += [_one_line(line) for line in self._latest]
            return Group(*zones)

    def _progress(self) -> RenderableType:
        stage, step = self._stage, self._step
        elapsed = clock.monotonic() - self._begun
        done = step.progress if step else 0.0
        left = step.eta_seconds if step else (stage.seconds_planned if stage else None)
        title = (say("display.stage", index=stage.index, count=stage.count, title=stage.title) if stage
                 else str(step.stage) if step else "")
        words = [f"{done:.0%}", say("display.elapsed", time=duration(elapsed)), say("display.left", time=duration(left))]
        if step:
            words.insert(1, say("display.step", step=step.step))
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(Text(printable(title), style="bold"), ProgressBar(total=1.0, completed=done), "  ".join(words))
        return row

    def _metrics(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        bars = max(8, min(POINTS, self.console.width // 2 - 32))
        cells = [(Text(set_cell_size(term(name).replace("_", " "), 18), "dim"), Text(f"{number(curve.last):>8}"),
                  Text(f"{sparkline(curve.points[-bars:]):<{bars}}", "cyan"))
                 for name, curve in list(self._curves.items())[:SHOWN_METRICS]]
        for i in range(0, len(cells), 2):
            grid.add_row(*[part for cell in cells[i : i + 2] for part in cell])
        return grid


def sparkline(values: list[float]) -> str:
    """Bars between the least and the greatest finite value; a space where a value is not finite."""
    finite = [v for v in values if abs(v) < float("inf")]
    if not finite:
        return " " * len(values)
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(BLOCKS[int((v - low) / span * 7.999)] if abs(v) < float("inf") else " " for v in values)


def stage_line(event: Any) -> Text:
    """`✓ pretrain 2m10s  bits per byte 8.0 → 2.31`, green where the number moved to the better side."""
    line = Text.assemble(("✓ ", "green"), (printable(str(event.stage)), "bold"), f" {duration(event.seconds)}")
    if event.after is not None:
        better = event.before is None or (event.after >= event.before) == event.higher_is_better
        line.append(f"  {term(event.metric)} {number(event.before)} → ")
        line.append(f"{number(event.after)} {term(event.unit or '')}".rstrip(), "green" if better else "yellow")
    return line


def sample_line(event: Any) -> Text:
    """Prompt, completion and rewards on one line, the completion's middle left out where it is long."""
    rewards = " ".join(f"{name}={number(value)}" for name, value in (event.rewards or {}).items())
    said = printable(event.completion)
    said = said if len(said) <= 200 else f"{said[:100]} … {said[-100:]}"
    return Text.assemble((f"{rewards} " if rewards else "", "magenta"), (printable(event.prompt)[:80], "dim"), " ▸ ", said)


def _one_line(text: Text) -> Text:
    line = text.copy()
    line.no_wrap, line.overflow = True, "ellipsis"
    return line
