"""The report of the main job: one HTML file that needs nothing else, and the JSON that it was made from.

A pure reader of the report's dict: it measures nothing. Any key may be missing (a stage was skipped, or has not run);
what is there is shown. Text that a model wrote is escaped, and a content policy forbids the page every request and
every script but its own few lines, so that no text can become more than text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from string import Template
from typing import Any

from pellucid.events import plain
from pellucid.files import write_atomic
from pellucid.grow import report_results as results
from pellucid.grow import report_sections as sections
from pellucid.grow.charts import Text, escaped, finite, number, words
from pellucid.grow.report_markup import baselines, best_baseline, bits_per_byte, get, int8, section, stage
from pellucid.grow.report_words import STAGES, count, measure, memory, minutes, quantity, seconds, share, times

SOURCE = "https://github.com/pellucid/pellucid/blob/main/"
TEMPLATE = Path(__file__).with_name("report.html")


def write(report: dict[str, Any], folder: str | Path, lang: str) -> None:
    """`report.json` and `report.html` in `folder`, each appearing whole or not at all."""
    report = plain(report)
    text = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    write_atomic(Path(folder) / "report.json", text.encode("utf-8", "backslashreplace"))  # a lone surrogate: \ud800
    write_atomic(Path(folder) / "report.html", render(report, lang))


def render(report: dict[str, Any], lang: str) -> str:
    """The page. `lang` ("zh" or "en") is the language it opens in; a button changes it."""
    if lang not in ("zh", "en"):
        raise ValueError(f"unknown language {lang!r}; zh or en")
    parts = (_top, _headline, _figures, _stages, results.curves, results.comparisons, sections.samples, sections.groups,
             sections.time_split, sections.plan, sections.tools, sections.machine, sections.going_on)
    return page(f"pellucid · {escaped(report.get('name', 'grow'))}", "\n".join(part(report) for part in parts), lang)


def page(title: str, body: str, lang: str) -> str:
    """A whole page around `body`: style, the button for the language, and a policy that forbids every other script."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(template).substitute(lang=lang, title=title, script_hash=f"sha256-{digest}", body=body)


def _top(report: dict[str, Any]) -> str:
    seed = f"seed {report['seed']}" if "seed" in report else ""
    line = " · ".join(escaped(f) for f in (report.get("name"), str(report.get("created", ""))[:10], seed) if f)
    return (f'<div class="top"><span><b>pellucid</b> &nbsp;{line}</span>'
            f'<button class="toggle" type="button" lang="zh">{words(Text("中文", "English"))}</button></div>')


# --- the sentence and the figures -----------------------------------------------------------------------------------


def _headline(report: dict[str, Any]) -> str:
    en, zh = zip(*_clauses(report))
    sentence_en = en[0] + (": " + _listed(en[1:]) if en[1:] else "") + "."
    sentence_zh = zh[0] + ("：" + "；".join(zh[1:]) if zh[1:] else "") + "。"
    return f'<h1><span class="en">{sentence_en}</span><span class="zh">{sentence_zh}</span></h1>'


def _listed(clauses: tuple[str, ...]) -> str:
    return clauses[0] if len(clauses) == 1 else "; ".join(clauses[:-1]) + "; and " + clauses[-1]


def _clauses(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What the sentence is made of, as markup in both languages: who in how long, then a clause a result."""
    parameters = count(get(report, "plan", "model", "parameters"))
    cores = get(report, "machine", "gpu") or get(report, "machine", "cores")
    where = (f" on {escaped(cores)}", f"在 {escaped(cores)} 上") if isinstance(cores, str) else (
        (f" on {cores} CPU cores", f"用 {cores} 个 CPU 核") if cores else ("", ""))
    spent = report.get("minutes_spent")
    time = (f"In <b>{minutes(spent)} minutes</b>", f"<b>{minutes(spent)} 分钟</b>，") if finite(spent) else ("Here", "")
    given = not stage(report, "pretrain") and stage(report, "sft")
    deed = (("a checkpoint of {} parameters learned the tasks", "把一个 {} 参数的检查点教会了这些任务") if given
            else ("a model of {} parameters grew from raw text", "从原始文本长出一个 {} 参数的模型"))
    size = f"<b>{parameters}</b>"
    out = [(f"{time[0]}{where[0]}, {deed[0].format(size)}", f"{time[1]}{where[1]}{deed[1].format(size)}")]
    if (own := bits_per_byte(report)) is not None:
        en, zh = f"<b>{number(own)}</b> bits per byte on held\u2011out text", f"留出文本每字节 <b>{number(own)}</b> 比特"
        if best := best_baseline(report):
            en += f" ({escaped(best[0])}: {number(best[1])})"
            zh += f"（{escaped(best[0])}：{number(best[1])}）"
        out.append((en, zh))
    if finite((grpo := stage(report, "grpo")).get("after")):
        before, after = share(grpo.get("before")), share(grpo["after"])
        out.append((f"<b>{before} → {after}</b> of held\u2011out problems solved, before and after GRPO",
                    f"GRPO 前后，留出题目正确率 <b>{before} → {after}</b>"))
    if (small := int8(report)).get("smaller"):
        ratio = times(small["smaller"])
        en, zh = f"INT8 weights <b>{ratio}×</b> smaller", f"INT8 权重缩小到 <b>1/{ratio}</b>"
        if small.get("faster"):
            en += f" at <b>{times(small['faster'])}×</b> the speed of float32"
            zh += f"，速度为 float32 的 <b>{times(small['faster'])} 倍</b>"
        out.append((en, zh))
    return out


def _figures(report: dict[str, Any]) -> str:
    """The same numbers large, each with what it is compared with."""
    cells: list[tuple[str, Text]] = []
    if (own := bits_per_byte(report)) is not None:
        others = " · ".join(f"{k} {number(v)}" for k, v in baselines(report))
        cells.append((number(own), Text(f"bits per byte, held-out text. {others}", f"每字节比特，留出文本。{others}")))
    if finite((grpo := stage(report, "grpo")).get("after")):
        told = Text("of held-out problems solved.", "留出题目正确率。")
        if finite(grpo.get("before")):
            points = f"{100 * (grpo['after'] - grpo['before']):+.1f}"
            told = Text(f"{told.en} {share(grpo['before'])} before GRPO, {points} points",
                        f"{told.zh}GRPO 前 {share(grpo['before'])}，{points} 个百分点")
        cells.append((share(grpo["after"]), told))
    if (small := int8(report)).get("bytes"):
        large = memory(small["bytes"][0])
        told = Text(f"in INT8, {large} in float32.", f"INT8 大小，float32 为 {large}。")
        if small.get("faster"):
            told = Text(f"{told.en} {times(small['faster'])}× the speed at batch {small['batch']}",
                        f"{told.zh}批量 {small['batch']} 时速度为 {times(small['faster'])} 倍")
        cells.append((memory(small["bytes"][1]), told))
    if finite(report.get("minutes_spent")):
        told = Text("minutes", "分钟")
        if finite(asked := report.get("minutes_asked")):
            told = Text(f"minutes, of {asked:g} asked", f"分钟（要求 {asked:g} 分钟）")
        cells.append((minutes(report["minutes_spent"]), told))
    shown = "".join(f"<div><b>{value}</b><small>{words(told)}</small></div>" for value, told in cells)
    return f'<div class="figures">{shown}</div>' if cells else ""


# --- the table of stages --------------------------------------------------------------------------------------------

COLUMNS = (Text("stage", "阶段"), Text("held-out measure", "留出集指标"), Text("before → after", "之前 → 之后"),
           Text("time spent / planned", "用时 / 计划"), Text("peak memory / predicted", "内存峰值 / 预计"))


def _stages(report: dict[str, Any]) -> str:
    if not report.get("stages"):
        return ""
    head = "".join(f'<th class="{"n" if i > 1 else ""}">{words(c)}</th>' for i, c in enumerate(COLUMNS))
    rows = "".join(_row(s) for s in report["stages"])
    return section(
        Text("Stage by stage", "逐个阶段"),
        Text("Every stage is measured before and after on data that it has never seen. Each names the file that did "
             "the work.",
             "每个阶段前后都在从未见过的数据上测量；每行标出完成这项工作的源文件。"),
        f'<table class="stages"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>')


def _row(s: dict[str, Any]) -> str:
    unit = s.get("unit", "")
    before, after = s.get("before"), s.get("after")
    better = False
    if finite(before) and finite(after) and after != before:
        better = (after > before) == bool(s.get("higher_is_better"))
    change = f'<b class="{"accent" if better else "same"}">{words(quantity(after, unit))}</b>'
    if finite(before):
        change = f'<span class="soft">{words(quantity(before, unit))}</span><span class="arrow">→</span>{change}'
    title = STAGES.get(s.get("stage", ""), s.get("title") or s.get("stage", ""))
    time = _beside(COLUMNS[3], seconds(s.get("seconds")), seconds(s.get("seconds_planned")))
    peak = memory(s.get("memory_peak_bytes"))
    if s.get("memory_peak_so_far"):  # a system that cannot tell the peak of a stage
        peak = f"{words(Text('so far', '至此'))} {peak}"
    bytes_ = _beside(COLUMNS[4], peak, memory(s.get("memory_predicted_bytes")))
    return (f'<tr><td><b>{words(title)}</b>{_link(s.get("file"))}</td><td>{words(measure(s.get("metric", "")))}</td>'
            f'<td class="n">{change}</td>{time}{bytes_}</tr>')


def _beside(column: Text, measured: str, expected: str) -> str:
    """A measured value above the expected one; where the table has no head (a phone), with the column's name."""
    return f'<td class="n"><small class="name">{words(column)}</small>{measured}<small>{expected}</small></td>'


def _link(file: Any) -> str:
    """The source file as a link, if it is a plain path inside the repository."""
    if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", file):
        return ""
    return f'<a class="file mono" href="{SOURCE}{file}">{escaped(file)}</a>'
