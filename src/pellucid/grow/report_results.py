"""The measured results of the report: curves of every stage, comparisons, tables of held-out numbers."""

from __future__ import annotations

from typing import Any

from pellucid.grow import charts
from pellucid.grow.charts import Label, Series, Text, finite, number, words
from pellucid.grow.report_markup import (
    baselines,
    best_baseline,
    bits_per_byte,
    facts,
    flat,
    get,
    legend,
    section,
    stage,
    table,
)
from pellucid.grow.report_words import COLOURS, SHARES, STAGES, STATES, TASKS, count, measure, memory

SHOWN_APART = {"objective", "bits_per_byte", "bytes", "size_ratio", "speedup"}  # with the groups; in the INT8 table


def curves(report: dict[str, Any]) -> str:
    body = "".join(_stage_curves(report, s) for s in report.get("stages") or [])
    return section(
        Text("How it learned", "学习过程"),
        Text("Over the time of each stage, from 0 to 100 %. Held-out measures are in colour, those of the training "
             "data in grey; rest the pointer on a curve to read its values.",
             "横轴为各阶段的进度（0 到 100%）。彩色为留出集指标，灰色为训练数据指标；鼠标停在曲线上可读数值。"), body)


def _stage_curves(report: dict[str, Any], s: dict[str, Any]) -> str:
    """A stage's numbers and its plots, held-out measures first."""
    given = {k: v for k, v in (s.get("curves") or {}).items() if v}
    if "held-out accuracy" in given:  # that of the training samples is drawn beneath it
        names = [n for n in given if n != "accuracy"]
    else:
        names = list(given)
    plots = "".join(_plot(report, given, name) for name in sorted(names, key=lambda n: not n.startswith("held-out")))
    numbers = facts(flat({k: v for k, v in (s.get("details") or {}).items() if k not in SHOWN_APART}), "facts line")
    drawn = f'<div class="plots">{plots}</div>' if plots else ""
    title = STAGES.get(s.get("stage", ""), s.get("title", ""))
    return f"<h3>{words(title)}</h3>{numbers}{drawn}" if drawn or numbers else ""


def _plot(report: dict[str, Any], given: dict[str, Any], name: str) -> str:
    """One curve with its last value; the colour tells held-out from training data."""
    heldout, percent = name.startswith("held-out"), name in SHARES
    series, names, references = [Series(given[name], 0 if heldout else 1, heldout)], [("s0", measure(name))], []
    if name == "held-out accuracy" and "accuracy" in given:
        series.append(Series(given["accuracy"], 1))
        names.append(("s1", measure("accuracy")))
    if "bits per byte" in name and (best := best_baseline(report)):
        references.append(best)  # an untrained model stands so far above it that the crossing could not be seen
        series = [Series([p for p in series[0].clean() if p[0] > 0], 0, True)]
    drawing = charts.curves(series, percent=percent, from_zero=percent or name == "entropy/mean", references=references)
    if not drawing:
        return ""
    last = number(series[0].clean()[-1][1], percent) if series[0].clean() else ""
    caption = f"<figcaption><span>{words(measure(name))}</span><b>{last}</b></figcaption>"
    return f"<figure>{caption}{drawing}{legend(names) if len(names) > 1 else ''}</figure>"


def comparisons(report: dict[str, Any]) -> str:
    """Bits per byte beside compressors and an n-gram model; accuracy by task and stage."""
    drawn = _bits_per_byte(report) + _by_task(report)
    pair = f'<div class="pair">{drawn}</div>' if drawn else ""
    return section(Text("Compared", "对比"), None, pair + _evaluation(report) + _formats(report))


def _bits_per_byte(report: dict[str, Any]) -> str:
    rows: list[tuple[Label, float, bool]] = [(k, v, False) for k, v in baselines(report)]
    if (own := bits_per_byte(report)) is not None:
        rows.append((Text("this model after pretraining", "本模型（预训练后）"), own, True))
    drawing = charts.bars(sorted(rows, key=lambda row: -row[1]))
    caption = Text("Bits per byte on the same held-out text; less is better", "同一留出文本的每字节比特数，越低越好")
    return f"<figure><figcaption>{words(caption)}</figcaption>{drawing}</figure>" if drawing else ""


def _states(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = report.get("evaluation") or {}
    return {k: rows[k] for k in (*STATES, *rows) if isinstance(rows.get(k), dict)}


def _by_task(report: dict[str, Any]) -> str:
    states = _states(report)
    names = list(dict.fromkeys(t for row in states.values() for t in row.get("by_task") or {}))
    groups = [(TASKS.get(t, t), {k: get(row, "by_task", t, "pass@1") for k, row in states.items()}) for t in names]
    drawing = charts.grouped(groups, {k: COLOURS.get(k, 1) for k in states})
    caption = Text("Accuracy on held-out problems, by task", "各任务留出题目的正确率")
    key = legend([(f"k{COLOURS.get(k, 1)}", STATES.get(k, k)) for k in states])
    return f"<figure><figcaption>{words(caption)}</figcaption>{drawing}{key}</figure>" if drawing else ""


def _evaluation(report: dict[str, Any]) -> str:
    """One row a state of the model: all held-out measures."""
    states = _states(report)
    if not states:
        return ""
    passes = sorted({k for row in states.values() for k in row if k.startswith("pass@") and k != "pass@1"})
    columns = [("pass@1", Text("greedy pass@1", "贪心 pass@1")),
               ("sampled pass@1", Text("sampled pass@1", "采样 pass@1")),
               *((p, Text(f"sampled {p}", f"采样 {p}")) for p in passes), ("format", Text("right form", "格式正确")),
               ("reasoning", Text("right when well-formed", "格式正确时答对")),
               ("mean_length", Text("mean length", "平均长度")), ("truncated", Text("cut off", "被截断"))]
    columns = [c for c in columns if any(finite(row.get(c[0])) for row in states.values())]
    rows = [(STATES.get(k, k), [_cell(row, column) for column, _ in columns]) for k, row in states.items()]
    return table([name for _, name in columns], rows)


def _cell(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not finite(value):
        return "–"
    error = row.get("standard_error") if column == "pass@1" else None
    told = number(value) if column == "mean_length" else number(value, percent=True)
    return told + (f'<span class="soft"> ± {100 * error:.1f}</span>' if finite(error) else "")


def _formats(report: dict[str, Any]) -> str:
    """Number formats of the weights beside each other: size, bits per byte, speed at each batch size."""
    details = stage(report, "quantize").get("details") or {}
    speeds = get(details, "tokens_per_second") or {}
    batches = [b for b in speeds if isinstance(speeds[b], dict)]
    columns = [Text("size of the weights", "权重大小"), Text("bits per byte", "每字节比特数"),
               *(Text(f"tokens/s, batch {b}", f"词元/秒，批量 {b}") for b in batches)]
    rows: list[tuple[Label, list[str]]] = []
    for kind in ("float32", "bfloat16", "int8"):
        size, bpb = get(details, "bytes", kind), get(details, "bits_per_byte", kind)
        cells = [memory(size), f"{bpb:.4f}" if finite(bpb) else "–", *(count(get(speeds, b, kind)) for b in batches)]
        if set(cells) != {"–"}:
            rows.append((kind, cells))
    return table(columns, rows) if rows else ""
