"""--lang zh: what the main job shows is Chinese, with the terms that people use."""

from __future__ import annotations

from pathlib import Path

import pytest
import report_fixture

from pellucid import messages
from pellucid.cli import display, live
from pellucid.cli.grow import show_plan
from pellucid.cli.usage import CHINESE
from pellucid.events import StageEnd
from pellucid.grow import report, words  # noqa: F401  (words: its messages)
from pellucid.grow.plan import PlanCard, choose_size, described
from pellucid.runtime import Choice, choose_device, choose_dtype, choose_threads


@pytest.fixture(autouse=True)
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_language", ["zh"])


def test_the_lines_of_the_stages_name_their_measure_in_chinese() -> None:
    for s in report_fixture.report()["stages"]:
        event = StageEnd(s["stage"], 3.0, s["before"], s["after"], s["metric"], s["unit"], s["higher_is_better"])
        for line in (str(live.stage_line(event)), display.line_fields(event)["metric"]):
            assert CHINESE.search(line) and "held-out" not in line and "problems" not in line, line
    assert messages.term("bits per byte") == "每字节比特数" and messages.term("tokens_per_second") == "词元/秒"


def plan_card() -> PlanCard:
    import torch

    choices = {"device": choose_device("cpu"), "threads": choose_threads(torch.get_num_threads()),
               "dtype": choose_dtype(32, torch.device("cpu"), 0.001), "size": Choice.because("7 参数", choose_size(1e11, 60)[1])}
    return PlanCard(report_fixture.plan() | {"choices": [described(n, c) for n, c in choices.items()]})


def test_the_plan_gives_its_reasons_in_chinese(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    show_plan(plan_card())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert all(CHINESE.search(line) for line in lines), "\n".join(lines)
    text = "\n".join(lines)
    for english in ("measured", "asked for", "parameters", "predicted", "device"):
        assert english not in text
    assert "GFLOP/s" in text and "INT8" in text and "GRPO" in text


def test_the_report_has_the_reasons_in_both_languages() -> None:
    told = report_fixture.report() | {"plan": plan_card().plan}
    page = report.render(told, "en")
    for reason in ("asked for", "由用户指定", "s of them fit", "秒适合"):
        assert reason in page


@pytest.mark.parametrize(("argv", "what"), [
    (["grow", "--minutes", "0"], "--minutes 0 不可行"), (["grow", "--corpus", "nowhere"], "--corpus nowhere 不存在"),
    (["grow", "--device", "toaster"], "设备 'toaster' 不可用"), (["grow", "--threads", "0"], "--threads 0 不可行"),
    (["chat", "./nowhere"], "'./nowhere' 处没有检查点目录"), (["train", "sft", "./x", "no.jsonl"], "./x 不存在"),
])
def test_common_errors_are_chinese_in_all_their_parts(
        argv: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pellucid.__main__ import main

    monkeypatch.chdir(tmp_path)
    assert main([*argv, "--lang", "zh"]) == 2
    lines = capsys.readouterr().err.splitlines()
    told = lines[next(i for i, line in enumerate(lines) if line.startswith("错误")):]
    assert what in told[0] and len(told) >= 2 and all(CHINESE.search(line.split(":", 1)[1]) for line in told), told
