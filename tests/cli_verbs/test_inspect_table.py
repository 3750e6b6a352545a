"""What `align inspect` prints on a narrow terminal, or into a pipe: the numbers stay whole, the completions are cut."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pellucid.cli.align_inspect import rewards_of


@pytest.mark.parametrize("width", [60, 80, 200])
def test_numbers_stay_whole_and_the_completion_takes_the_room_that_is_left(width: int) -> None:
    text = "<think>\n" + "18-12=6,6*4=24 no\n" * 12 + "</think>\n\n(18-4)+12"
    rows = [{"rewards": {"correct": 1.0, "format": 1.0, "progress": 0.3375}, "total": 1.2337, "length": 88, "finished": i > 0, "text": text}
            for i in range(3)]
    console = Console(file=(out := io.StringIO()), width=width)
    console.print(rewards_of({"weights": {"correct": 1.0, "format": 0.2, "progress": 0.1}}, rows))
    head, *lines = out.getvalue().splitlines()
    assert head.split()[:7] == ["correct", "format", "x0.2", "progress", "x0.1", "total", "tokens"]
    for line, tokens in zip(lines, ("88 cut", "88", "88"), strict=True):
        assert all(number in line for number in (" 1 ", "0.3375", "1.234", f"{tokens}  <")), line
        assert len(line) == width and line.endswith("…")
