"""Further sections of the report, each a function from its dict to markup ("" where there is no data).

Samples after every stage, GRPO groups with their advantages, time, plan, tool calls, machine, how to go on.
"""

from __future__ import annotations

import shlex
from collections import Counter
from itertools import pairwise
from typing import Any

from pellucid.grow import charts
from pellucid.grow.charts import Label, Text, escaped, finite, words
from pellucid.grow.report_markup import chips, facts, get, legend, model_text, section, stage
from pellucid.grow.report_words import MODEL, PLAN, STAGES, STATES, TASKS, count


def samples(report: dict[str, Any]) -> str:
    body = ""
    for p in report.get("prompts") or []:
        cards = "".join(
            f'<div class="answer {_verdict(a.get("rewards"))}">'
            f'<header>{words(STATES.get(a.get("stage"), a.get("stage", "")))}</header>'
            f'{model_text(a.get("completion", ""))}{chips(a.get("rewards"))}</div>' for a in p.get("answers") or [])
        if cards:
            task = f' <span class="soft">{words(TASKS.get(p.get("task"), p.get("task", "")))}</span>'
            body += f'<div class="problem"><code>{escaped(p.get("prompt", ""))}</code>{task}</div>'
            body += f'<div class="answers">{cards}</div>'
    return section(
        Text("The same problems after every stage", "同样的题目，每个阶段之后的回答"),
        Text("Held-out problems, answered greedily. The thought is pale, the answer bold; below it the components of "
             "the reward.",
             "留出题目，贪心解码。浅色为思考，粗体为答案；下方是奖励的各个分量。"), body)


def _verdict(rewards: Any) -> str:
    correct = rewards.get("correct") if isinstance(rewards, dict) else None
    return "" if not finite(correct) else "right" if correct >= 1 else "wrong"


def groups(report: dict[str, Any]) -> str:
    drawn = [_group(g) for g in report.get("groups") or [] if g.get("samples")]
    if not drawn:
        return ""
    body = drawn[0]
    if formula := get(stage(report, "grpo"), "details", "objective"):
        body += f'<pre class="code">{escaped(formula)}</pre>'
    if drawn[1:]:
        body += f"<details><summary>{words(Text('more groups', '更多的组'))}</summary>{''.join(drawn[1:])}</details>"
    return section(
        Text("Why one answer is pushed up and another down", "为什么有的答案被推高、有的被压低"),
        Text("In GRPO the model writes several answers to one problem. Each is graded, and its advantage tells how far "
             "its reward lies above or below the rest of its group. Answers with a positive advantage are made more "
             "probable, token by token; those with a negative one less. No demonstration is needed: the siblings are "
             "the yardstick.",
             "GRPO 让模型对同一道题写出多个答案并逐一评分；优势（advantage）表示该答案的奖励高出或低于同组其他答案多少。"
             "优势为正的答案，其中每个词元的概率都被调高；为负的则被调低。不需要示范：同组的其他答案就是标尺。"),
        body)


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
                   f'<td>{charts.balance(s["advantage"], largest)}</td>'
                   f'<td class="n {kind}">{signed(s["advantage"])}</td></tr>')
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
        f'<td><b>{escaped(c.get("value", ""))}</b></td><td class="soft">{_reason(c)}</td></tr>'
        for c in card.get("choices") or [])
    body = f"<table><tbody>{rows}</tbody></table>" if rows else ""
    measured = {k: v for k, v in (card.get("gflops") or {}).items() if finite(v)}
    speeds: list[tuple[Label, str]] = [
        (Text(f"matrix products, {k}", f"矩阵乘（{k}）"), f"{v:.0f} GFLOP/s") for k, v in measured.items()]
    if finite(card.get("bandwidth_gbs")):
        speeds.append((Text("memory reads", "内存读取"), f"{card['bandwidth_gbs']:.0f} GB/s"))
    shape = {key: v for key in MODEL if (v := get(card, "model", key)) is not None}
    model: list[tuple[Label, str]] = [
        (MODEL[key], count(v) if key == "parameters" else str(v)) for key, v in shape.items()]
    return section(
        Text("The plan, made before the run", "运行前定下的计划"),
        Text("Sizes and steps are derived from the minutes that were asked for and from the measured speed of the "
             "machine. Every choice has its reason.",
             "模型大小与步数由所要求的分钟数和实测速度推得；每个选择都附理由。"), body + facts(speeds) + facts(model))


def _reason(choice: dict[str, Any]) -> str:
    """In both languages where the plan has them, else as it stands."""
    reason = choice.get("reason", "")
    return words(Text(choice.get("en", reason), choice.get("zh", reason)))


SPEAKERS = {"user": Text("user", "用户"), "assistant": Text("model", "模型"), "tool": Text("calculator", "计算器"),
            "system": Text("system", "系统")}


def tools(report: dict[str, Any]) -> str:
    told = report.get("tools") or {}
    turns = "".join(_turn(m) for m in told.get("transcript") or [])
    if not turns:
        return ""
    en = "The model behind its own OpenAI-compatible server: it reads a request, thinks, and calls a real calculator."
    zh = "模型运行在自己的 OpenAI 兼容服务器之后：读懂请求，先思考，再调用真正的计算器。"
    if finite(solved := told.get("solved")) and finite(asked := told.get("asked")):
        en += f" {solved} of {asked} held-out requests were solved this way."
        zh += f"{asked} 个留出请求中，{solved} 个这样解出。"
    return section(Text("Calling a tool", "调用工具"), Text(en, zh), f'<div class="talk">{turns}</div>')


def _turn(message: dict[str, Any]) -> str:
    role = str(message.get("role", ""))
    thought, content = message.get("reasoning_content"), message.get("content")
    texts = [f'<span class="thought">{escaped(thought)}</span>'] if thought else []
    texts += [escaped(content)] if content else []
    for call in message.get("tool_calls") or []:
        name, arguments = (get(call, "function", key) or "" for key in ("name", "arguments"))
        texts.append(f'<span class="said">{escaped(f"{name}({arguments})")}</span>')
    kind, speaker, said = role if role in SPEAKERS else "assistant", words(SPEAKERS.get(role, role)), "\n".join(texts)
    return f'<div class="turn {kind}"><header>{speaker}</header><pre>{said}</pre></div>'


def machine(report: dict[str, Any]) -> str:
    card = {k: v for k, v in (report.get("machine") or {}).items() if v}
    rows: list[tuple[Label, str]] = [(k, str(v)) for k, v in card.items()]
    command = f'<pre class="code">{escaped(report["command"])}</pre>' if report.get("command") else ""
    return section(Text("Machine and command", "机器与命令"), None, command + facts(rows))


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
