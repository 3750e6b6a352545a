"""What people see of the event stream: plain lines where there is no terminal, a live view where there is one."""

from __future__ import annotations

import io
import re
import threading

import pytest
from demo_verb import evaluation, record, sample, stage_begin, stage_end, step
from rich.cells import cell_len
from rich.console import Console

from pellucid import events, messages
from pellucid.cli import display, live
from pellucid.cli.display import PlainLines, duration, number, printable


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages, "_language", ["en"])


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [100.0]
    monkeypatch.setattr(display.clock, "monotonic", lambda: clock[0])
    return clock


def test_plain_lines_are_stable_key_value_pairs(now):
    out = io.StringIO()
    show = PlainLines(out)
    for event in (stage_begin(title="微调 now"), step(1, 0.25, loss=2.5, tokens_per_second=51234.0), sample(), evaluation(),
                  stage_end(), events.Note("bf16 chosen"), record("unknown_kind", x=1)):
        show(event)
    assert out.getvalue().splitlines() == [
        'stage_begin stage=sft index=2/7 title="微调 now" planned=1m00s',
        "step stage=sft step=1 progress=25% left=45s loss=2.5 tokens_per_second=51.23k",
        'sample stage=sft prompt="3 4 5 → 23?" completion=<think>⏎3*4⏎</think>⏎23 correct=1',
        "evaluation stage=sft name=pass@1 value=0.4125",
        'stage_end stage=sft seconds=125 metric=pass@1 before=0 after=0.41 unit=""',
        'note level=info text="bf16 chosen"',
    ]


def test_one_step_line_an_interval_and_always_the_first_and_last(now):
    out = io.StringIO()
    show = PlainLines(out, interval=10.0)
    for second in range(1, 36):
        now[0] = 100.0 + second
        show(step(second, second / 35, loss=1.0))
    steps = [int(re.search(r"step=(\d+)", line).group(1)) for line in out.getvalue().splitlines()]
    assert steps == [1, 11, 21, 31, 35]


def test_a_new_stage_shows_its_first_step_at_once(now):
    out = io.StringIO()
    show = PlainLines(out)
    show(step(1, 0.1))
    other = step(1, 0.1)
    other.fields["stage"] = "grpo"
    show(other)
    assert len(out.getvalue().splitlines()) == 2


@pytest.mark.parametrize(("value", "text"), [
    (None, "-"), (3, "3"), (9999, "9999"), (12345, "12.35k"), (0.123456, "0.1235"), (0.0, "0"), (3e-4, "0.0003"),
    (51234.5, "51.23k"), (3.4e6, "3.4M"), (2.5e9, "2.5G"), (-20000.0, "-20k"), (float("nan"), "nan")])
def test_numbers_are_short(value, text: str):
    assert number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (None, "-"), (-1, "-"), (float("nan"), "-"), (float("inf"), "-"), (0.4, "0s"), (59.6, "1m00s"), (125, "2m05s"),
    (3599.7, "1h00m"), (3780, "1h03m")])
def test_durations(seconds, text: str):
    assert duration(seconds) == text


def test_what_a_model_writes_cannot_steer_the_terminal():
    evil = "\x1b[2J\x1b]0;title\x07ok\r\n\u202eabc\x00 全角\u3000空"
    shown = printable(evil)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202e]", shown) and "ok" in shown and "全角\u3000空" in shown


def test_the_live_view_is_for_terminals_only(monkeypatch, capsys):
    with display.for_people() as reader:
        assert isinstance(reader, PlainLines)  # under pytest neither stream is a terminal
    monkeypatch.setattr(display, "is_terminal", lambda stream: True)
    with display.for_people() as reader:
        assert isinstance(reader, live.LiveView)


def console(width: int = 100, **kw) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=40, highlight=False,
                   **{"color_system": None, "_environ": {}, **kw})


def rendered(view: live.LiveView, width: int = 100) -> list[str]:
    paper = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    paper.print(view.render())
    return paper.file.getvalue().splitlines()


def test_three_zones():
    view = live.LiveView(console())
    for event in (stage_begin(), step(1, 0.1, loss=3.0), step(2, 0.5, loss=1.0, reward=0.5), sample(), evaluation()):
        view._take(event)
    text = "\n".join(rendered(view))
    for part in ("stage 2/7 fine-tuning", "50%", "step 2", "left 30s", "metrics", "loss", "█▁", "latest", "correct=1",
                 "3 4 5 → 23? ▸ <think>⏎3*4⏎</think>⏎23", "pass@1 0.4125"):
        assert part in text, part


def test_at_most_six_metrics_and_six_latest():
    view = live.LiveView(console())
    view._take(step(1, 0.1, **{f"metric_{i}": float(i) for i in range(9)}))
    for i in range(20):
        view._take(sample(prompt=f"prompt {i}"))
    text = "\n".join(rendered(view))
    assert "metric 5" in text and "metric 6" not in text
    assert "prompt 14" in text and "prompt 13" not in text


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_no_line_is_wider_than_the_terminal_in_any_script(width: int):
    view = live.LiveView(console(width))
    view._take(stage_begin(title="用可验证任务做强化学习"))
    for i in range(300):
        view._take(step(i, i / 300, 损失=1.0 / (i + 1), tokens_per_second_of_the_whole=5e4, a=1.0, b=2.0))
    view._take(sample(prompt="汉字" * 50, completion="思考" * 300 + "👩‍👩‍👧‍👦"))
    lines = rendered(view, width)
    assert max(map(cell_len, lines)) <= width
    assert len(lines) <= 8, "one line each: nothing wraps"


def test_a_stage_that_ends_leaves_a_line_for_good():
    paper = console()
    view = live.LiveView(paper)
    for event in (stage_begin(), step(1, 1.0, loss=1.0), stage_end(metric="pass@1")):
        view(event)
    view.close()
    view.close()
    written = paper.file.getvalue()
    assert "✓ sft 2m05s  pass@1 0 → 0.41" in written
    assert written.endswith("\x1b[1A\x1b[2K"), "the view itself is wiped"
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1, "the cursor is shown again"


def test_better_is_green_and_worse_is_not():
    def style(**change) -> str:
        return str(live.stage_line(stage_end(**change)).spans[-1].style)
    assert style(before=0.1, after=0.4) == "green" and style(before=0.4, after=0.1) == "yellow"
    assert style(before=8.0, after=2.0, higher_is_better=False) == "green"
    assert style(before=2.0, after=8.0, higher_is_better=False) == "yellow"
    assert "→" not in live.stage_line(stage_end(before=None, after=None)).plain


def test_verbs_without_progress_draw_nothing():
    paper = console()
    view = live.LiveView(paper)
    view(events.Note("device cpu"))
    view(evaluation())
    view.close()
    assert paper.file.getvalue() == "device cpu\n"


def test_no_colour_when_colour_is_unwelcome():
    paper = console(color_system="truecolor", _environ={"NO_COLOR": "1"})
    view = live.LiveView(paper)
    for event in (stage_begin(), step(1, 0.5, loss=1.0), stage_end()):
        view(event)
    view.close()
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", paper.file.getvalue())


@pytest.mark.parametrize(("values", "bars"), [
    ([0.0, 1.0], "▁█"), ([1.0, 1.0], "▁▁"), ([], ""), ([float("nan"), 2.0, float("inf"), 4.0], " ▁ █"), ([float("nan")], " ")])
def test_sparklines(values: list[float], bars: str):
    assert live.sparkline(values) == bars


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000, 4097])
def test_a_curve_holds_the_whole_stage(count: int):
    curve = live.Curve()
    for i in range(count):
        curve.add(float(i))
    assert curve.last == count - 1 and len(curve.points) <= live.POINTS
    assert curve.points == sorted(curve.points) and curve.points[0] <= count / 32
    stride = 1
    while count // stride >= live.POINTS:
        stride *= 2
    means = [sum(range(i, i + stride)) / stride for i in range(0, count - stride + 1, stride)]
    assert curve.points == pytest.approx(means[: len(curve.points)]) and len(means) - len(curve.points) <= 1


def test_events_from_threads_do_not_break_the_view():
    view = live.LiveView(console())
    view(stage_begin())
    threads = [threading.Thread(target=lambda: [view(step(i, i / 100, loss=1.0)) for i in range(100)]) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    view.close()
    assert "loss" in "\n".join(rendered(view))
