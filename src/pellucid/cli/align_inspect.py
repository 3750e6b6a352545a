"""`pellucid align inspect`: what a run of alignment did, step by step, completion by completion, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pellucid.cli.base import Common, Positional

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from pellucid.align.recording import Record, RunRecord

WAYS = {"used": "used", "grpo": "GRPO", "dr-grpo": "Dr. GRPO", "gdpo": "GDPO"}
MIDDLE = {"ratio": 1.0, "entropy": 0.0, "kl": 0.0, "logp": 0.0}


@dataclass(frozen=True)
class Inspect(Common):
    """A run's alarms, and the completions of a step side by side: rewards, advantages under GRPO, Dr. GRPO and GDPO, tokens.
    查看一次运行的警报，以及某一步的回答并排对比：奖励、GRPO / Dr. GRPO / GDPO 下的优势、逐词元数值。

    $ pellucid align inspect runs/grpo --step 12 --by entropy
    """

    run: Positional[Path]
    """Folder of the run (its --out), or its events.jsonl.
    运行目录（其 --out）或其 events.jsonl。"""
    step: int | None = None
    """Which step; by default the last one that was recorded.
    哪一步；默认为最后记录的一步。"""
    by: Literal["ratio", "entropy", "kl", "logp"] = "ratio"
    """What colours the tokens: ratio after the step, entropy, KL to the reference, log-probability.
    词元按什么着色：更新后的比率、熵、与参考的 KL、对数概率。"""
    completions: int = 8
    """Most completions shown.
    最多显示的回答数。"""
    html: Path | None = None
    """Also write the whole run as one HTML page that needs nothing else.
    同时把整次运行写成一个独立的 HTML 页面。"""


def inspect(config: Inspect) -> None:
    from rich.console import Console

    from pellucid import events
    from pellucid.align.recording import read_run

    run = read_run(config.run)
    group = run.group_at(config.step)
    events.emit(events.Evaluation("align inspect", "alarms", float(len(run.alarms)), {
        "steps": len(run.steps), "alarms": run.alarms, "group": group}))
    console = Console(highlight=False)
    for line in overview(run):
        console.print(line)
    if group is None:
        console.print("no group was recorded: offline runs have none" if not any(
            "groups/live" in s["metrics"] for s in run.steps) else "no group was recorded in this run")
    else:
        show_group(console, group, config)
    if config.html is not None:
        from pellucid.cli.align_page import write_page

        write_page(run, config.html, config.run.name)
        console.print(f"page: {config.html}")


def overview(run: RunRecord) -> list[Text]:
    """One line on the run, and two for every alarm."""
    from rich.text import Text

    from pellucid.align.alarms import in_both_languages
    from pellucid.cli.display import number
    from pellucid.messages import pick, term

    last = run.steps[-1]
    shown = list(dict.fromkeys([*list(last["metrics"])[:5], *(k for k in ("rewards/margin", "logps/chosen", "entropy/mean",
                                "kl/ref_k3", "length/mean") if k in last["metrics"])]))
    lines = [Text(f"{last['stage']}: {last['step']} steps, {len(run.groups)} groups recorded"
                  + "".join(f"  {term(k)} {number(last['metrics'][k])}" for k in shown))]
    for e in run.evaluations[-1:]:
        best = max(run.evaluations, key=lambda x: x["value"] if x["name"] == e["name"] and x["value"] is not None else float("-inf"))
        lines.append(Text(f"held-out {term(e['name'])}: {number(run.evaluations[0]['value'])} first, {number(e['value'])} last, {number(best['value'])} best"))
    for alarm in run.alarms:
        text, remedy = in_both_languages(alarm)
        lines.append(Text(f"! step {alarm['step']}: {pick(*text)}", style="bold red" if alarm["level"] == "warning" else "bold yellow"))
        lines.append(Text(f"  -> {pick(*remedy)}"))
    return lines or [Text("no alarm")]


def show_group(console: Any, group: Record, config: Inspect) -> None:
    from rich.text import Text

    from pellucid.cli.display import printable

    console.print()
    console.print(Text(f"step {group['step']}  {printable(group['prompt'])}", style="bold"))
    rows = group["completions"][: config.completions]
    console.print(rewards_of(group, rows))
    console.print()
    console.print(advantages_of(rows))
    left = len(group["completions"]) - len(rows) + group.get("left_out", 0)
    if left:
        console.print(f"{left} more completions of this group; --completions shows more")
    what = {"ratio": "policy after the step / policy that sampled", "kl": f"KL to the {group['kl_to']}"}.get(config.by, config.by)
    console.print(Text(f"\ntokens by {config.by} ({what})", style="bold"))
    for number, row in enumerate(rows, 1):
        console.print(Text(f"{number} ", style="dim") + heat(row, config.by))
        console.print(Text("  " + extremes(row, config.by), style="dim"))


def rewards_of(group: Record, rows: list[Record]) -> Table:
    """One completion a row, with its components; those in brackets are measured and not rewarded."""
    from rich.text import Text

    from pellucid.cli.display import number, printable

    weights = group["weights"]
    parts = list(dict.fromkeys(k for r in rows for k in r["rewards"]))
    named = [f"({k})" if not weights.get(k) else k if weights[k] == 1 else f"{k} x{weights[k]:g}" for k in parts]
    logged = list(dict.fromkeys(k for r in rows for k in r.get("extra", {})))
    table = columns(*named, "total", "tokens", *logged)
    for i, r in enumerate(rows, 1):
        table.add_row(str(i), *(number(r["rewards"].get(k)) for k in parts), number(r["total"]), str(r["length"]) + ("" if r["finished"] else " cut"),
                      *(short(r.get("extra", {}).get(k)) for k in logged),
                      Text(printable(r["text"]), no_wrap=True, overflow="ellipsis"))
    return table


def short(value: Any) -> str:
    """What a reward function logged of a completion, in a cell."""
    from pellucid.cli.display import number, printable

    text = "-" if value is None else number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else printable(str(value))
    return text if len(text) <= 24 else text[:23] + "…"


def advantages_of(rows: list[Record]) -> Table:
    """What each completion is worth in four ways, and what the step did to its tokens."""
    from pellucid.cli.display import number

    table = columns(*WAYS.values(), "clipped", "entropy", "kl", text="")
    for i, r in enumerate(rows, 1):
        clipped = [c for c in r["clip"] if c is not None]
        table.add_row(str(i), *(signed(r["advantages"].get(way)) for way in WAYS), f"{sum(c != 0 for c in clipped) / len(clipped):.0%}" if clipped else "-",
                      *(number(mean(r[name])) for name in ("entropy", "kl")), "")
    return table


def columns(*names: str, text: str = "completion") -> Table:
    """Numbers under their names; then the text, which takes what room is left: of columns that may wrap, rich makes these
    narrower first, so the text's own cells say that they do not."""
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(text)
    return table


def mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def signed(value: float | None) -> Text:
    from rich.text import Text

    return Text("-" if value is None else f"{value:+.2f}", style="" if not value else "green" if value > 0 else "red")


def heat(row: Record, by: str) -> Text:
    """The tokens, coloured: red above the middle, blue below it, underlined where the clip silences them."""
    from rich.text import Text

    from pellucid.cli.display import printable

    known = [abs(v - MIDDLE[by]) for v in row[by] if v is not None]
    largest = max(known, default=0.0) or 1.0
    out = Text()
    for token, value, clip in zip(row["tokens"], row[by], row["clip"]):
        if value is None:  # given, not sampled
            out.append(printable(token), style="dim italic")
            continue
        strength = int(200 * abs(value - MIDDLE[by]) / largest)
        faded = 255 - strength
        colour = f"rgb(255,{faded},{faded})" if value > MIDDLE[by] else f"rgb({faded},{faded},255)"
        out.append(printable(token), style=f"black on {colour}" + (" underline" if clip else ""))
    return out


def extremes(row: Record, by: str, most: int = 4) -> str:
    """The tokens furthest from the middle, with their values: what the colours say, for terminals without any."""
    known = [(v, i) for i, v in enumerate(row[by]) if v is not None]
    known.sort(key=lambda pair: -abs(pair[0] - MIDDLE[by]))
    return ", ".join(f"{row['tokens'][i]!r} at {i}: {v:.3g}" for v, i in known[:most])
