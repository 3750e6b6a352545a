"""The event stream for people: a live view on a terminal, one plain `key=value` line per interval elsewhere.

Both are subscribers that read event fields by `kind` (stage_begin, stage_end, step, evaluation, sample, alarm, traces, note); they
know no room, and kinds that they do not know leave them silent.
"""

from __future__ import annotations

import contextlib
import sys
import time as clock
from collections.abc import Iterator
from typing import Any, TextIO

from pellucid.cli.failures import is_terminal
from pellucid.events import Event, Subscriber
from pellucid.messages import add, term

NAMES = {  # of the numbers that a step and an evaluation tell; others stand as they are
    "loss": "损失", "tokens_per_second": "词元/秒", "grad_norm": "梯度范数", "lr": "学习率", "bits per byte": "每字节比特数",
    "accuracy": "正确率", "format": "格式正确率", "groups/live": "有差别的组", "reward/total/mean": "平均奖励",
    "held-out loss per token": "留出损失（每词元）", "pass@1": "pass@1", "size ratio": "大小之比", "bytes": "字节",
    "greedy accuracy on held-out problems": "留出题目的贪心正确率",
}
add({f"term.{name}": (name, zh) for name, zh in NAMES.items()})
SHOWN_METRICS = 6  # of a step; the run log has all of them


@contextlib.contextmanager
def for_people() -> Iterator[Subscriber]:
    """The live view where stdout and stderr are a terminal, else plain lines on stderr."""
    if is_terminal(sys.stdout) and is_terminal(sys.stderr):
        from pellucid.cli.live import LiveView

        view = LiveView()
        try:
            yield view
        finally:
            view.close()
    else:
        yield PlainLines(sys.stderr)


class PlainLines:
    """Subscriber: every event as one `kind key=value ...` line, steps at most every `interval` seconds.

    The first and the last step of a stage are always shown. No colour, no cursor movement.
    """

    def __init__(self, out: TextIO, interval: float = 10.0):
        self.out, self.interval = out, interval
        self._stage, self._shown_at = "", float("-inf")

    def __call__(self, event: Event) -> None:
        if event.kind == "step" and not self._due(event):
            return
        if pairs := line_fields(event):
            text = " ".join(f"{key}={value_text(value)}" for key, value in pairs.items())
            self.out.write(f"{event.kind} {text}\n")
            self.out.flush()

    def _due(self, event: Any) -> bool:
        now = clock.monotonic()
        if event.stage == self._stage and event.progress < 1 and now - self._shown_at < self.interval:
            return False
        self._stage, self._shown_at = event.stage, now
        return True


def line_fields(event: Any) -> dict[str, Any]:
    """What one line says of an event, in a fixed order; empty for kinds that are not for people."""
    match event.kind:
        case "stage_begin":
            return {"stage": event.stage, "index": f"{event.index}/{event.count}", "title": event.title,
                    "planned": duration(event.seconds_planned)}
        case "stage_end":
            return {"stage": event.stage, "seconds": event.seconds, "metric": term(event.metric), "before": event.before,
                    "after": event.after, "unit": term(event.unit)}
        case "step":
            return {"stage": event.stage, "step": event.step, "progress": f"{event.progress:.0%}",
                    "left": duration(event.eta_seconds), **dict(list(event.metrics.items())[:SHOWN_METRICS])}
        case "evaluation":
            return {"stage": event.stage, "name": term(event.name), "value": event.value}
        case "sample":
            return {"stage": event.stage, "prompt": event.prompt, "completion": event.completion, **event.rewards}
        case "alarm":
            return {"stage": event.stage, "step": event.step, "level": event.level, "text": event.text, "remedy": event.remedy}
        case "traces":
            return {"problems": f"{event.problems}/{event.of}", "kept": event.kept, "correct": event.correct, "answers": event.answers}
        case "note":
            return {"level": event.level, "text": event.text}
        case _:
            return {}


def value_text(value: Any) -> str:
    """A value as one word: numbers to four digits, texts quoted where they hold spaces or line ends."""
    if isinstance(value, float):
        return number(value)
    text = printable(str(value))
    return text if text and not any(c in text for c in ' "=\\') else '"' + text.replace('"', '\\"') + '"'


def number(value: float | int | None) -> str:
    """Short and stable: 0.1234, 12.3, 51.2k, 3.4M; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, int) and abs(value) < 10_000:
        return str(value)
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """45s, 2m05s, 1h03m; a dash where unknown."""
    if seconds is None or not 0 <= seconds < float("inf"):
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def printable(text: str) -> str:
    """Text on one line without control characters: what a model writes must not steer the terminal."""
    marks = {"\n": "⏎", "\t": " ", "\r": " "}
    return "".join(marks.get(c, c if c.isprintable() or c == "\u3000" else "�") for c in text)
