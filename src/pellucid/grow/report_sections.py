"""The sections of the report below its table, each a function from the report's dict to markup ("" where it has no data)."""

from __future__ import annotations

import shlex
from collections import Counter
from itertools import pairwise
from typing import Any

from pellucid.grow import charts
from pellucid.grow.charts import Label, Series, Text, escaped, finite, number, words
from pellucid.grow.report_markup import (
    baselines,
    best_baseline,
    bits_per_byte,
    chips,
    facts,
    flat,
    get,
    legend,
    model_text,
    section,
    stage,
    table,
)
from pellucid.grow.report_words import COLOURS, MODEL, PLAN, SHARES, STAGES, STATES, TASKS, count, measure, memory

SHOWN_APART = {"objective", "bits_per_byte", "bytes", "size_ratio", "speedup"}  # with the groups, and in a table of INT8


def curves(report: dict[str, Any]) -> str:
    body = "".join(_stage_curves(report, s) for s in report.get("stages") or [])
    return section(
        Text("How it learned", "学习过程"),
        Text("Over the time of each stage, from 0 to 100 %. Held-out measures are in colour, those of the training data in grey; "
             "rest the pointer on a curve to read its values.",
             "横轴为各阶段的进度（0 到 100%）。彩色为留出集指标，灰色为训练数据指标；鼠标停在曲线上可读数值。"), body)


def _stage_curves(report: dict[str, Any], s: dict[str, Any]) -> str:
    given = {k: v for k, v in (s.get("curves") or {}).items() if v}
    plots = []
    for name in sorted(given, key=lambda n: not n.startswith("held-out")):
        heldout = name.startswith("held-out")
        if name == "accuracy" and "held-out accuracy" in given:
            continue  # drawn beneath the held-out one
        series = [Series(given[name], 0 if heldout else 1, heldout)]
        names = [("s0" if heldout else "s1", measure(name))]
        if name == "held-out accuracy" and "accuracy" in given:
            series.append(Series(given["accuracy"], 1))
            names.append(("s1", measure("accuracy")))
        best = best_baseline(report) if "bits per byte" in name else None
        if best:  # untrained, it stands so far above that the crossing could not be seen
            series = [Series([p for p in series[0].clean() if p[0] > 0], 0, True)]
        share = name in SHARES
        drawing = charts.curves(series, percent=share, from_zero=share or name == "entropy/mean", references=[best] if best else [])
        if drawing:
            last = number(series[0].clean()[-1][1], share)
            key = legend(names) if len(names) > 1 else ""
            plots.append(f"<figure><figcaption><span>{words(measure(name))}</span><b>{last}</b></figcaption>{drawing}{key}</figure>")
    numbers = flat({k: v for k, v in (s.get("details") or {}).items() if k not in SHOWN_APART})
    if not plots and not numbers:
        return ""
    title = STAGES.get(s.get("stage", ""), s.get("title", ""))
    drawn = f'<div class="plots">{"".join(plots)}</div>' if plots else ""
    return f'<h3>{words(title)}</h3>{facts(numbers, "facts line") if numbers else ""}{drawn}'


def comparisons(report: dict[str, Any]) -> str:
    """Bits per byte beside compressors and an n-gram model; accuracy by task and stage."""
    left, right = _bits_per_byte(report), _by_task(report)
    tables = _evaluation(report) + _formats(report)
    return section(Text("Compared", "对比"), None, (f'<div class="pair">{left}{right}</div>' if left or right else "") + tables)


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
    columns = [("pass@1", Text("greedy pass@1", "贪心 pass@1")), ("sampled pass@1", Text("sampled pass@1", "采样 pass@1")),
               *((p, Text(f"sampled {p}", f"采样 {p}")) for p in passes), ("format", Text("right form", "格式正确")),
               ("reasoning", Text("right when well-formed", "格式正确时答对")),
               ("mean_length", Text("mean length", "平均长度")), ("truncated", Text("cut off", "被截断"))]
    columns = [c for c in columns if any(finite(row.get(c[0])) for row in states.values())]
    return table([name for _, name in columns], [(STATES.get(k, k), [_cell(row, c) for c, _ in columns]) for k, row in states.items()])


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


def samples(report: dict[str, Any]) -> str:
    body = ""
    for p in report.get("prompts") or []:
        cards = "".join(
            f'<div class="answer {_verdict(a.get("rewards"))}"><header>{words(STATES.get(a.get("stage"), a.get("stage", "")))}</header>'
            f'{model_text(a.get("completion", ""))}{chips(a.get("rewards"))}</div>' for a in p.get("answers") or [])
        if cards:
            task = words(TASKS.get(p.get("task"), p.get("task", "")))
            body += f'<div class="problem"><code>{escaped(p.get("prompt", ""))}</code> <span class="soft">{task}</span></div><div class="answers">{cards}</div>'
    return section(
        Text("The same problems after every stage", "同样的题目，每个阶段之后的回答"),
        Text("Held-out problems, answered greedily. The thought is pale, the answer bold; below it the components of the reward.",
             "留出题目，贪心解码。浅色为思考，粗体为答案；下方是奖励的各个分量。"), body)


def _verdict(rewards: Any) -> str:
    correct = rewards.get("correct") if isinstance(rewards, dict) else None
    return "" if not finite(correct) else "right" if correct >= 1 else "wrong"


def groups(report: dict[str, Any]) -> str:
    drawn = [_group(g) for g in report.get("groups") or [] if g.get("samples")]
    if not drawn:
        return ""
    more = f"<details><summary>{words(Text('more groups', '更多的组'))}</summary>{''.join(drawn[1:])}</details>" if drawn[1:] else ""
    formula = get(stage(report, "grpo"), "details", "objective")
    return section(
        Text("Why one answer is pushed up and another down", "为什么有的答案被推高、有的被压低"),
        Text("In GRPO the model writes several answers to one problem. Each is graded, and its advantage tells how far its reward lies "
             "above or below the rest of its group. Answers with a positive advantage are made more probable, token by token; those "
             "with a negative one less. No demonstration is needed: the siblings are the yardstick.",
             "GRPO 让模型对同一道题写出多个答案并逐一评分；优势（advantage）表示该答案的奖励高出或低于同组其他答案多少。"
             "优势为正的答案，其中每个词元的概率都被调高；为负的则被调低。不需要示范：同组的其他答案就是标尺。"),
        drawn[0] + (f'<pre class="code">{escaped(formula)}</pre>' if formula else "") + more)


def _group(group: dict[str, Any]) -> str:
    """Answers from the best to the worst; equal ones stand once, with their number."""
    rows = [s for s in group["samples"] if finite(s.get("advantage"))]
    rows.sort(key=lambda s: -s["advantage"])
    times = Counter((s.get("completion"), s["advantage"]) for s in rows)
    largest = max((abs(s["advantage"]) for s in rows), default=0.0)
    out, seen = [], set()
    for s in rows:
        if (key := (s.get("completion"), s["advantage"])) in seen:
            continue
        seen.add(key)
        many = f' <span class="chip">×{times[key]}</span>' if times[key] > 1 else ""
        kind = "plus" if s["advantage"] > 0 else "minus" if s["advantage"] < 0 else "soft"
        out.append(f'<tr><td>{model_text(s.get("completion", ""))}{many}</td><td>{chips(s.get("rewards"))}</td>'
                   f'<td>{charts.balance(s["advantage"], largest)}</td><td class="n {kind}">{signed(s["advantage"])}</td></tr>')
    head = (Text("answer", "答案"), Text("rewards", "奖励"), Text("", ""), Text("advantage", "优势"))
    ths = "".join(f'<th class="{"n" if i == 3 else ""}">{words(h)}</th>' for i, h in enumerate(head))
    return (f'<div class="problem"><code>{escaped(group.get("prompt", ""))}</code></div>'
            f'<table class="group"><thead><tr>{ths}</tr></thead><tbody>{"".join(out)}</tbody></table>')


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\u2212")  # a minus as wide as the plus


def time_split(report: dict[str, Any]) -> str:
    stages = report.get("stages") or []
    rows = [(Text(*pair), [(s.get("stage", ""), s.get(key)) for s in stages])
            for key, pair in (("seconds", ("spent", "实际")), ("seconds_planned", ("planned", "计划")))]
    drawing = charts.divided(rows)
    timed = [s for s in stages if finite(s.get("seconds")) and s["seconds"] > 0]
    key = legend([(f"p{i % 8}", STAGES.get(s.get("stage", ""), s.get("stage", ""))) for i, s in enumerate(timed)])
    return section(Text("Where the time went", "时间花在哪里"), None, drawing and drawing + key)


def plan(report: dict[str, Any]) -> str:
    card = report.get("plan") or {}
    rows = "".join(
        f'<tr><td>{words(Text(c.get("name", ""), PLAN.get(c.get("name", ""), c.get("name", ""))))}</td>'
        f'<td><b>{escaped(c.get("value", ""))}</b></td><td class="soft">{escaped(c.get("reason", ""))}</td></tr>'
        for c in card.get("choices") or [])
    body = f"<table><tbody>{rows}</tbody></table>" if rows else ""
    speeds: list[tuple[Label, str]] = [
        (Text(f"matrix products, {k}", f"矩阵乘（{k}）"), f"{v:.0f} GFLOP/s") for k, v in (card.get("gflops") or {}).items() if finite(v)]
    if finite(card.get("bandwidth_gbs")):
        speeds.append((Text("memory reads", "内存读取"), f"{card['bandwidth_gbs']:.0f} GB/s"))
    model: list[tuple[Label, str]] = [
        (name, count(v) if key == "parameters" else str(v)) for key, name in MODEL.items() if (v := get(card, "model", key)) is not None]
    body += "".join(facts(rows) for rows in (speeds, model) if rows)
    return section(Text("The plan, made before the run", "运行前定下的计划"),
                   Text("Sizes and steps are derived from the minutes that were asked for and from the measured speed of the machine. "
                        "Every choice has its reason.", "模型大小与步数由所要求的分钟数和实测速度推得；每个选择都附理由。"), body)


SPEAKERS = {"user": Text("user", "用户"), "assistant": Text("model", "模型"), "tool": Text("calculator", "计算器"),
            "system": Text("system", "系统")}


def tools(report: dict[str, Any]) -> str:
    told = report.get("tools") or {}
    turns = "".join(_turn(m) for m in told.get("transcript") or [])
    if not turns:
        return ""
    solved, asked = told.get("solved"), told.get("asked")
    score = Text("", "") if not (finite(solved) and finite(asked)) else Text(
        f" {solved} of {asked} held-out requests were solved this way.", f"{asked} 个留出请求中，{solved} 个这样解出。")
    return section(
        Text("Calling a tool", "调用工具"),
        Text("The model behind its own OpenAI-compatible server: it reads a request, thinks, and calls a real calculator." + score.en,
             "模型运行在自己的 OpenAI 兼容服务器之后：读懂请求，先思考，再调用真正的计算器。" + score.zh), f'<div class="talk">{turns}</div>')


def _turn(message: dict[str, Any]) -> str:
    role = str(message.get("role", ""))
    said = [message.get("reasoning_content"), message.get("content")]
    texts = [escaped(s) for s in said if isinstance(s, str) and s]
    if len(texts) == 2 or (texts and said[0]):
        texts[0] = f'<span class="thought">{texts[0]}</span>'
    for call in message.get("tool_calls") or []:
        texts.append(f"<span class=\"said\">{escaped(get(call, 'function', 'name') or '')}({escaped(get(call, 'function', 'arguments') or '')})</span>")
    kind = role if role in SPEAKERS else "assistant"
    return f'<div class="turn {kind}"><header>{words(SPEAKERS.get(role, role))}</header><pre>{chr(10).join(texts)}</pre></div>'


def machine(report: dict[str, Any]) -> str:
    card = {k: v for k, v in (report.get("machine") or {}).items() if v}
    rows: list[tuple[Label, str]] = [(k, str(v)) for k, v in card.items()]
    command = f'<pre class="code">{escaped(report["command"])}</pre>' if report.get("command") else ""
    body = command + (facts(rows) if rows else "")
    return section(Text("Machine and command", "机器与命令"), None, body)


SNIPPET = '''from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r})
messages = [{{"role": "user", "content": {prompt!r}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=False)[0]))'''


def going_on(report: dict[str, Any]) -> str:
    """Commands that work where the job was started."""
    if not report.get("model"):
        return ""
    folder = f"{run_folder(report)}/{report['model']}"
    prompt = next((p["prompt"] for p in report.get("prompts") or [] if p.get("prompt")), "Make 26 from 4,12,18.")
    shell = f"pellucid chat {shlex.quote(folder)}\npellucid serve {shlex.quote(folder)}"
    python = SNIPPET.format(folder=folder, prompt=prompt)
    return section(
        Text("How to go on", "接下来"),
        Text("Talk to the model, serve it with an OpenAI-compatible interface, or open it with transformers.",
             "与模型对话，以 OpenAI 兼容接口提供服务，或用 transformers 打开。"),
        f'<pre class="code">{escaped(shell)}</pre><pre class="code">{escaped(python)}</pre>')


def run_folder(report: dict[str, Any]) -> str:
    """The run's folder as the command names it, else runs/NAME."""
    try:
        given = shlex.split(str(report.get("command", "")))
    except ValueError:
        given = []
    for option, value in pairwise(given):
        if option == "--out":
            return value
    return f"runs/{report.get('name', 'grow')}"
