"""The final table of the main job on a terminal of 80 columns, in both languages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import report_fixture
from rich.cells import cell_len

from pellucid import messages
from pellucid.cli.grow import print_table
from pellucid.grow import words  # noqa: F401  (its messages)
from pellucid.grow.recipe import STAGES


def widest() -> dict[str, Any]:
    """A long job whose numbers take as much room as they can."""
    report = report_fixture.report()
    for s in report["stages"]:
        s["seconds"] = s["seconds_planned"] = 40_000.0
        s["before"] = s["after"] = 1.0 if not s["unit"] else 99.99
    return report


@pytest.mark.parametrize("lang", messages.LANGUAGES)
@pytest.mark.parametrize("report", [report_fixture.report(), widest()], ids=["ordinary", "widest"])
def test_every_stage_stands_on_one_line_of_80_columns(
        report: dict[str, Any], lang: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(messages, "_language", [lang])
    monkeypatch.setenv("COLUMNS", "80")
    print_table(report, Path("runs/a long name/[of] a folder that must not be broken where it is to be copied from/grow"))
    *lines, told, talk = capsys.readouterr().out.splitlines()
    assert all(cell_len(line) <= 80 for line in lines), "\n".join(lines)
    for stage, row in zip(STAGES, report["stages"], strict=True):
        (line,) = [line for line in lines if line.startswith(messages.say(f"grow.stage.{stage}") + " ")]
        assert "…" not in line
        assert (f"{row['after']:.1%}" if not row["unit"] else f"{row['after']:.2f}") in line.split()
    assert "copied from/grow/report.html" in told and "[of] a folder" in told
    assert talk.endswith("pellucid chat 'runs/a long name/[of] a folder that must not be broken where it is to be copied from/grow/model'")
