"""`pellucid grow`: the main job."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pellucid.cli.base import Common
from pellucid.cli.display import duration
from pellucid.messages import language, say, term

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Grow(Common):
    """Grow a small reasoning model on this machine, offline: tokenizer, pretraining, thoughts, GRPO, INT8, tools.
    在本机离线培育一个会推理的小模型：分词器、预训练、思维链、GRPO、INT8、工具。

    $ pellucid grow --minutes 8
    $ pellucid grow --model path/to/checkpoint --minutes 30
    """

    minutes: float = 8.0
    """How long it may take; sizes and steps are derived from it and from measured speed.
    允许的分钟数；模型大小与步数由它和实测速度推得。"""
    out: Path = Path("runs/grow")
    """Folder of the run.
    运行目录。"""
    model: str | None = None
    """Start from this checkpoint (folder or Hub id) instead of from nothing: fine-tuning and GRPO on the same tasks.
    从此检查点（目录或 Hub id）开始，在同样的任务上微调与 GRPO。"""
    corpus: Path | None = None
    """Pretrain on this file or folder instead of Python's own documentation.
    用此文件或目录预训练，而非 Python 自带文档。"""
    data: Path | None = None
    """Fine-tune on these conversations too (JSONL of messages, or prompt and completion).
    另用这些对话微调（JSONL：messages，或 prompt 与 completion）。"""
    resume: bool = False
    """Go on with an interrupted run in the same folder.
    继续同一目录中被中断的运行。"""


def grow(config: Grow) -> None:
    began = time.monotonic() - time.process_time()  # what starting Python and its imports took counts too
    from pellucid import events
    from pellucid.grow.config import GrowConfig

    settings = GrowConfig(
        minutes=config.minutes, out=config.out, model=config.model, corpus=config.corpus, data=config.data,
        seed=config.seed or 0, threads=config.threads, device=config.device, resume=config.resume, lang=language())
    from pellucid.grow.job import grow as run
    from pellucid.runtime import seed_everything

    seed_everything(settings.seed)
    show = (lambda event: None) if config.json else show_plan
    with events.subscribed(show):
        report = run(settings, began)
    if not config.json:
        print_table(report, settings.out)


def show_plan(event: Any) -> None:
    """The plan card, before the run."""
    if event.kind != "plan":
        return
    from rich.cells import set_cell_size
    from rich.console import Console

    plan, console = event.plan, Console(file=sys.stderr, highlight=False)
    console.rule(f"[bold]{say('grow.plan')}", align="left")
    gflops = plan["gflops"]
    console.print(say("grow.machine", fp32=gflops["float32"], bf16=gflops["bfloat16"], gbs=plan["bandwidth_gbs"]))
    for choice in plan["choices"]:
        console.print(f"  {set_cell_size(term(choice['name']), 8)} [bold]{choice['value']}[/]  [dim]{choice['reason']}")
    for stage in plan["stages"]:
        title = say(f"grow.stage.{stage['stage']}")
        console.print(say("grow.needs", stage=title, seconds=stage["seconds"], mib=stage["memory_bytes"] / 2**20), style="dim")


def print_table(report: dict[str, Any], folder: Path) -> None:
    """The final table, on stdout, and where to find what was made."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(table(report))
    console.print()
    lines = [say("grow.took", spent=report["minutes_spent"], asked=report["minutes_asked"]),
             say("grow.report", path=folder / "report.html"),
             say("grow.talk", path=shlex.quote(str(folder / report["model"])))]
    if baselines := report.get("baselines"):
        lines.insert(0, say("grow.baselines", list=", ".join(f"{k} {v:.2f}" for k, v in baselines.items())))
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)  # a path that is to be copied is never broken


def table(report: dict[str, Any]) -> Table:
    """A row a stage, each on one line of 80 columns in either language."""
    from rich import box
    from rich.table import Table

    from pellucid.grow import words  # noqa: F401  (its messages)

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("stage", "metric"):
        made.add_column(say(f"grow.column.{name}"), no_wrap=True)
    for name in ("before", "after", "time", "planned"):
        made.add_column(say(f"grow.column.{name}"), justify="right", no_wrap=True)
    for s in report["stages"]:
        made.add_row(say(f"grow.stage.{s['stage']}"), say(f"grow.short.{s['stage']}"), shown(s["before"], s["unit"]),
                     shown(s["after"], s["unit"]), took(s["seconds"]), took(s["seconds_planned"]))
    return made


def took(seconds: float) -> str:
    """Seconds, or where they would be many figures, hours and minutes."""
    return f"{seconds:.0f} s" if seconds < 1000 else duration(seconds)


def shown(value: float | None, unit: str) -> str:
    """An accuracy in percent, other measures with two decimals."""
    if value is None:
        return "-"
    return f"{value:.2f}" if unit else f"{value:.1%}"
