"""What the sections of the report are made with: reading the dict, and pieces of markup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.grow.charts import Label, Text, escaped, finite, number, words
from pellucid.grow.report_words import REWARDS, detail, detail_value

# --- reading the dict -----------------------------------------------------------------------------------------------


def get(report: dict[str, Any], *path: str) -> Any:
    """A value deep in the dict, None where any step is missing."""
    value: Any = report
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def stage(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next((s for s in report.get("stages") or [] if s.get("stage") == name), {})


def bits_per_byte(report: dict[str, Any]) -> float | None:
    value = stage(report, "pretrain").get("after")
    return value if finite(value) else None


def baselines(report: dict[str, Any]) -> list[tuple[str, float]]:
    return [(k, v) for k, v in (report.get("baselines") or {}).items() if finite(v)]


def best_baseline(report: dict[str, Any]) -> tuple[str, float] | None:
    return min(baselines(report), key=lambda row: row[1], default=None)


def int8(report: dict[str, Any]) -> dict[str, Any]:
    """From the details of the stage `quantize`, what was measured of: `bytes` (float32, INT8), `smaller` (how many
    times), and of the largest batch `batch` and `faster` (how many times). `pellucid.quant.measure` writes them."""
    details = stage(report, "quantize").get("details") or {}
    out: dict[str, Any] = {}
    size = [get(details, "bytes", kind) for kind in ("float32", "int8")]
    if all(finite(v) and v > 0 for v in size):
        out |= {"bytes": size, "smaller": size[0] / size[1]}
    speedups = {k: v for k, v in (get(details, "speedup") or {}).items() if k.isdecimal() and finite(v) and v > 0}
    if speedups:
        out["batch"] = max(speedups, key=int)
        out["faster"] = speedups[out["batch"]]
    return out


# --- pieces of markup -----------------------------------------------------------------------------------------------


def section(title: Text, intro: Text | None, body: str) -> str:
    """A heading, a sentence and the content; nothing where there is no content."""
    told = f"<p>{words(intro)}</p>" if intro else ""
    return f"<section><h2>{words(title)}</h2>{told}{body}</section>" if body else ""


def legend(rows: Sequence[tuple[str, Label]]) -> str:
    """Swatches (CSS class) with their names."""
    return '<ul class="legend">' + "".join(f'<li><i class="{c}"></i>{words(name)}</li>' for c, name in rows) + "</ul>"


def facts(rows: list[tuple[Label, str]], kind: str = "facts") -> str:
    shown = "".join(f"<div><dt>{words(k)}</dt><dd>{escaped(v)}</dd></div>" for k, v in rows)
    return f'<dl class="{kind}">{shown}</dl>' if rows else ""


def table(columns: Sequence[Label], rows: Sequence[tuple[Label, list[str]]]) -> str:
    """Numbers under their names, a row each; cells are markup already."""
    head = "".join(f'<th class="n">{words(name)}</th>' for name in columns)
    body = ""
    for name, cells in rows:
        body += f"<tr><td>{words(name)}</td>" + "".join(f'<td class="n">{cell}</td>' for cell in cells) + "</tr>"
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def model_text(text: Any) -> str:
    """What a model wrote, its thought paler than its answer."""
    thought, close, answer = str(text).rpartition("</think>")
    if not close and answer.lstrip().startswith("<think>"):  # a thought that never ended
        thought, answer = answer, ""
    elif not close:
        return f"<pre>{escaped(answer)}</pre>"
    thought = escaped(thought + close)
    return f'<pre><span class="thought">{thought}</span><span class="said">{escaped(answer)}</span></pre>'


def chips(rewards: Any) -> str:
    """Reward components, coloured from none to full."""
    out = []
    for name, value in (rewards if isinstance(rewards, dict) else {}).items():
        if finite(value):
            kind = "up" if value >= 1 else "down" if value <= 0 else ""
            sign = {"up": "✓", "down": "✗"}.get(kind) or number(value)
            out.append(f'<span class="chip {kind}">{words(REWARDS.get(name) or name)} {sign}</span>')
    return f'<div class="chips">{"".join(out)}</div>' if out else ""


def flat(details: Any, before: str = "") -> list[tuple[Label, str]]:
    """A stage's free-form details as rows; a dict inside becomes rows of its own."""
    rows: list[tuple[Label, str]] = []
    for key, value in (details if isinstance(details, dict) else {}).items():
        name = detail(str(key))
        if isinstance(value, dict):
            rows += [(Text(f"{name.en}, {k}", f"{name.zh}，{k}"), detail_value(key, v)) for k, v in value.items()
                     if not isinstance(v, (dict, list))]
        elif value is not None and not isinstance(value, list):
            rows.append((name, detail_value(key, value)))
    return rows
