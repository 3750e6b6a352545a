"""The engine's line: sums over the interval, from its own events."""

import io

from pellucid.cli.watch import EngineLines
from pellucid.engine.core import EngineStep


def step(**more) -> EngineStep:
    fields = {"step": 1, "tokens": 40, "generated": 4, "running": 4, "waiting": 1, "admitted": 1, "prompt": 30, "hit": 15, "preempted": 0,
              "available": 30, "blocks": 40, "planning": 0.0, "seconds": 0.1}
    return EngineStep(**{**fields, **more})


def test_a_line_per_interval():
    out = io.StringIO()
    lines = EngineLines(out, interval=100)
    lines(step())
    lines(step())
    assert out.getvalue() == ""
    lines.interval = 0
    lines(step(preempted=2, prompt=0, hit=0))
    text = out.getvalue()
    assert text.count("\n") == 1 and "running=4 waiting=1" in text and "cache 25% of 40 blocks" in text
    assert "hits 50%" in text and "preempted 2" in text and "drafts" not in text
    lines(step(proposed=8, accepted=6))
    assert "drafts 75% of 8 accepted" in out.getvalue()
