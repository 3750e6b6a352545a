"""A run of alignment as one HTML page: alarms, curves, and the groups of some steps with their tokens as heat maps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pellucid.files import write_atomic
from pellucid.grow import charts
from pellucid.grow.charts import Label, Series, Text, escaped, finite, number, words
from pellucid.grow.report import page
from pellucid.grow.report_markup import chips, legend, model_text, section, table
from pellucid.grow.report_sections import signed
from pellucid.messages import language

if TYPE_CHECKING:
    from pellucid.align.recording import Record, RunRecord

STEPS = 8
"""Steps whose groups the page holds, evenly over the run; `pellucid align inspect --step` shows any of them."""
PLOTS: tuple[tuple[Text, bool, tuple[tuple[str, Label], ...]], ...] = (  # title, in percent, metrics and their names
    (Text("weighted reward", "加权奖励"), False, (("reward/total/mean", "total"),)),
    (Text("right answers in the rollouts", "采样回答的正确率"), True, (("accuracy", "accuracy"),)),
    (Text("groups whose rewards differ", "奖励有差别的组"), True, (("groups/live", "live"), ("reward/total/informative", "by total"))),
    (Text("entropy, nats a token", "熵（纳特/词元）"), False, (("entropy/mean", "mean"), ("entropy/p90", "p90"))),
    (Text("tokens a completion", "每个回答的词元数"), False, (("length/mean", "mean"), ("length/p95", "p95"))),
    (Text("KL to the reference", "与参考模型的 KL"), False, (("kl/ref_k3", "k3"), ("kl/ref_k1", "k1"))),
    (Text("drift from the sampling policy", "与采样策略的偏离"), False, (("kl/old_k3", "k3"),)),
    (Text("tokens that the clip silences", "被裁剪的词元"), True, (("clip/high", "high"), ("clip/low", "low"))),
    (Text("sampler against trainer, |log p|", "采样器与训练器 |log p| 之差"), False, (("engine/gap_mean", "mean"),)),
    (Text("norm of the gradient", "梯度范数"), False, (("grad_norm", "grad_norm"),)),
    (Text("size of an update beside the weights", "更新量与权重之比"), False, (("update/ratio", "ratio"),)),
    (Text("different answers in a group", "组内不同回答"), True, (("diversity/distinct", "distinct"), ("diversity/bigrams", "bigrams"))),
    (Text("tokens a second", "每秒词元数"), False, (("speed/sampled", "sampled"), ("speed/trained", "trained"))),
    (Text("share of the time spent sampling", "采样所占时间"), True, (("time/sampling", "sampling"),)),
    (Text("peak memory, MiB", "内存峰值（MiB）"), False, (("memory/peak", "peak"),)),
    (Text("log p of the answers", "回答的 log p"), False, (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
    (Text("margin of the implied rewards", "隐含奖励的间隔"), False, (("rewards/margin", "margin"),)),
    (Text("pairs judged right", "判对的样本对"), True, (("rewards/accuracy", "accuracy"),)),
    (Text("divergence from the teacher, nats a token", "与教师的散度（纳特/词元）"), False, (("divergence", "divergence"),)),
)
STRIPS = (("ratio", Text("ratio after the step", "更新后的比率"), 1.0), ("entropy", Text("entropy", "熵"), 0.0), ("kl", Text("KL", "KL"), 0.0))
WAYS = {"used": Text("used", "所用"), "grpo": Text("GRPO", "GRPO"), "dr-grpo": Text("Dr. GRPO", "Dr. GRPO"), "gdpo": Text("GDPO", "GDPO")}


def report_of(folder: Path) -> Path:
    """Writes `report.html` of a run folder into it."""
    from pellucid.align.recording import read_run

    write_page(read_run(folder), folder / "report.html", folder.name)
    return folder / "report.html"


def write_page(run: RunRecord, file: Path, name: str) -> None:
    write_atomic(file, render(run, name, language()))


def render(run: RunRecord, name: str, lang: str) -> str:
    last = run.steps[-1]
    body = [f'<div class="top"><span><b>pellucid</b> &nbsp;{escaped(name)} · {escaped(last["stage"])}</span>'
            f'<button class="toggle" type="button" lang="zh">{words(Text("中文", "English"))}</button></div>',
            f"<h1>{words(_headline(run))}</h1>", _alarms(run), _formulas(run), _curves(run), _meanings(run), _groups(run)]
    return page(f"pellucid · {escaped(name)}", "\n".join(body), lang)


def _headline(run: RunRecord) -> Text:
    steps = run.steps[-1]["step"]
    held = [e for e in run.evaluations if finite(e["value"])]
    if not held:
        return Text(f"{steps} steps.", f"{steps} 步。")
    name, percent = held[-1]["name"], held[-1]["name"].startswith(("pass@", "accuracy"))
    first, last = (number(e["value"], percent) for e in (held[0], held[-1]))
    best = max(held, key=lambda e: e["value"])
    told = f"; best {number(best['value'], percent)}" if best["value"] > held[-1]["value"] and percent else ""
    return Text(f"{steps} steps: held-out {name} {first} at the first measurement, {last} at the last{told}.",
                f"{steps} 步：留出 {name} 首次测量 {first}，最后 {last}{told.replace('best', '最好')}。")


def _alarms(run: RunRecord) -> str:
    from pellucid.align.alarms import in_both_languages

    rows = ""
    for alarm in run.alarms:
        text, remedy = (Text(*pair) for pair in in_both_languages(alarm))
        kind = "down" if alarm["level"] == "warning" else ""
        rows += (f'<tr><td><span class="chip {kind}">{words(Text("step", "第"))} {alarm["step"]}</span></td>'
                 f'<td><b>{words(text)}</b><small>{words(remedy)}</small></td></tr>')
    quiet = Text("No rule was broken. Rules compare the first steps with the latest, so short runs raise none.",
                 "没有触发警报。规则比较最初与最近的步，因此很短的运行不会触发。")
    return section(Text("Alarms", "警报"), None, f"<table><tbody>{rows}</tbody></table>" if rows else f"<p>{words(quiet)}</p>")


def _formulas(run: RunRecord) -> str:
    formula = next((n for n in run.notes if "\n" in n and "=" in n), None)
    return section(Text("Objective", "目标函数"), None, f'<pre class="code">{escaped(formula)}</pre>' if formula else "")


def _curves(run: RunRecord) -> str:
    parts = [k for k in run.steps[-1]["metrics"] if k.startswith("reward/") and k.endswith("/mean") and k != "reward/total/mean"]
    plots = [_plot(run, title, percent, metrics) for title, percent, metrics in PLOTS]
    plots[1:1] = [_held_out(run), *(_plot(run, Text(f"reward: {k.split('/')[1]}", f"奖励：{k.split('/')[1]}"), False, ((k, "mean"),)) for k in parts)]
    body = "".join(plots)
    return section(Text("Every number by step", "逐步数值"),
                   Text("The loss is not among them: on-policy it is about 0 by construction. Rest the pointer on a curve to read it.",
                        "没有画损失：同策略下它按构造约为 0。鼠标停在曲线上可读数值。"), f'<div class="plots">{body}</div>' if body else "")


def _meanings(run: RunRecord) -> str:
    """Every number of the last step, and what it means."""
    from pellucid.align.metrics import meaning_of

    rows = "".join(f"<tr><td><code>{escaped(name)}</code></td><td>{number(value) if finite(value) else '–'}</td><td>{escaped(meaning_of(name))}</td></tr>"
                   for name, value in run.steps[-1]["metrics"].items())
    title = Text("The last step in numbers, and what they mean", "最后一步的全部数值及其含义")
    return f'<details><summary>{words(title)}</summary><table><tbody>{rows}</tbody></table></details>'


def _plot(run: RunRecord, title: Text, percent: bool, metrics: tuple[tuple[str, Label], ...]) -> str:
    series, names = [], []
    for colour, (metric, name) in enumerate(metrics):
        points = [(s["progress"], s["metrics"].get(metric)) for s in run.steps]
        if any(finite(v) for _, v in points):
            series.append(Series([(x, v) for x, v in points if finite(v)], colour))
            names.append((f"s{colour}", name))
    drawing = charts.curves(series, percent=percent, from_zero=percent)
    if not drawing:
        return ""
    last = number(series[0].clean()[-1][1], percent)
    return (f"<figure><figcaption><span>{words(title)}</span><b>{last}</b></figcaption>{drawing}"
            f"{legend(names) if len(names) > 1 else ''}</figure>")


def _held_out(run: RunRecord) -> str:
    """Evaluations over progress: each stands at the progress of the step before it."""
    held = [e for e in run.evaluations if finite(e["value"])]
    if not held:
        return ""
    points = [(max((s["progress"] for s in run.steps if s["time"] <= e["time"]), default=0.0), e["value"]) for e in held]
    percent = held[-1]["name"].startswith(("pass@", "accuracy"))
    drawing = charts.curves([Series(points, 0, dots=True)], percent=percent, from_zero=percent)
    title = Text(f"held-out {held[-1]['name']}", f"留出集 {held[-1]['name']}")
    return f"<figure><figcaption><span>{words(title)}</span><b>{number(points[-1][1], percent)}</b></figcaption>{drawing}</figure>"


def _groups(run: RunRecord) -> str:
    count = len(run.groups)
    chosen = sorted({round(i * (count - 1) / max(min(count, STEPS) - 1, 1)) for i in range(min(count, STEPS))}) if count else []
    body = ""
    for i in chosen:
        g = run.groups[i]
        title = f'{words(Text("step", "第"))} {g["step"]} · <code>{escaped(g["prompt"][:200])}</code>'
        body += f'<details{" open" if i == chosen[-1] else ""}><summary>{title}</summary>{_group(g)}</details>'
    return section(
        Text("Completions side by side", "回答并排"),
        Text("The same rewards judged in three ways, beside what the run used. Tokens below: the ratio of the policy after the "
             "step to the one that sampled (red: more probable now, blue: less; underlined: the clip silences it), entropy, and KL.",
             "同样的奖励按三种方法计算优势，并与本次运行所用对照。下方逐词元：更新后与采样时的概率比（红：更可能，蓝：更不可能；"
             "下划线：被裁剪）、熵与 KL。"), body)


def _group(g: Record) -> str:
    columns: list[Label] = [Text("rewards", "奖励"), Text("total", "总分"), *WAYS.values(), Text("tokens", "词元")]
    rows: list[tuple[Label, list[str]]] = []
    for i, c in enumerate(g["completions"], 1):
        cells = [chips(c["rewards"]), number(c["total"]) if finite(c["total"]) else "–"]
        for way in WAYS:
            a = c["advantages"].get(way)
            cells.append(f'<span class="{"plus" if a > 0 else "minus" if a < 0 else "soft"}">{signed(a)}</span>' if finite(a) else "–")
        rows.append((str(i), [*cells, str(c["length"]) + ("" if c["finished"] else " ✂")]))
    weights = ", ".join(f"{k} × {v:g}" for k, v in g["weights"].items())
    left = f' · {words(Text("not shown", "未显示"))} {g["left_out"]}' if g.get("left_out") else ""
    return (f'<p class="soft">{words(Text("weights", "权重"))}: {escaped(weights)} · {words(Text("KL to the", "KL 参照"))} {escaped(g["kl_to"])}{left}</p>'
            + table(columns, rows) + f'<div class="answers">{"".join(_answer(i, c) for i, c in enumerate(g["completions"], 1))}</div>')


def _answer(i: int, c: Record) -> str:
    strips = "".join(f'<small class="soft">{words(title)}</small><pre>{_strip(c, name, middle)}</pre>' for name, title, middle in STRIPS)
    return f'<div class="answer"><header>{i}</header>{model_text(c["text"])}{_logged(c)}<details><summary>{words(Text("tokens", "词元"))}</summary>{strips}</details></div>'


def _logged(c: Record) -> str:
    """What reward functions said of it (`log_extra`)."""
    return "".join(f'<small class="soft">{escaped(name)}: {escaped(str(value))}</small><br>' for name, value in c.get("extra", {}).items())


def _strip(c: Record, name: str, middle: float) -> str:
    known = [abs(v - middle) for v in c[name] if v is not None]
    largest = max(known, default=0.0) or 1.0
    out = []
    for token, value, clip in zip(c["tokens"], c[name], c["clip"]):
        if value is None:
            out.append(f"<i>{escaped(token)}</i>")
            continue
        strength = 0.75 * abs(value - middle) / largest
        colour = "214,60,40" if value > middle else "40,90,214"
        line = ";text-decoration:underline" if clip else ""
        out.append(f'<span style="background:rgba({colour},{strength:.2f}){line}" title="{value:.3g}">{escaped(token)}</span>')
    return "".join(out)
