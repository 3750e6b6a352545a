"""`pellucid quantize`: INT8 or INT4 weights, and what they cost.

    perplexity                        12.4041        12.4050        12.4102          1.000
    int8: perplexity 0.04 % above bfloat16's (goal: at most 0.5 %)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pellucid.cli.base import Common, Positional, prepare
from pellucid.messages import add, say

if TYPE_CHECKING:
    from pellucid.cli.eval import Eval
    from pellucid.nn import Decoder
    from pellucid.tokenizers import Tokenizer

add({
    "quantize.accuracy": ("accuracy, held-out", "留出题准确率"),
    "quantize.perplexity": ("{name}: perplexity {more} % above bfloat16's (goal: at most {most} %)", "{name}：困惑度比 bfloat16 高 {more} %（目标：至多 {most} %）"),
    "quantize.kept": ("{name} is in {dtype} in the file: {why}", "{name} 在文件中仍为 {dtype}：{why}"),
    "quantize.speed": ("tokens/s, batch {batch}", "词元/秒，批量 {batch}"),
})


@dataclass(frozen=True)
class Quantize(Common):
    """Write a model with INT8 or INT4 weights and measure size, speed, bits per byte and perplexity before and after.
    写出 INT8 或 INT4 权重的模型，并比较前后的大小、速度、每字节比特与困惑度。

    $ pellucid quantize runs/grow/model --out runs/grow/model-int8
    $ pellucid quantize runs/grow/model --bits 4 --out runs/grow/model-int4 --corpus docs/
    """

    model: Positional[str]
    """Checkpoint: a folder or a Hub id.
    检查点：目录或 Hub id。"""
    out: Path = Path("runs/model-int8")
    """Folder of the quantized model.
    量化模型的目录。"""
    bits: int = 8
    """Bits of a weight: 8, or 4 (matrices in groups of 32; embedding and head stay in INT8). Experts too; routers stay as they are.
    每个权重的位数：8，或 4（矩阵按 32 个一组；嵌入与输出头仍为 INT8）。专家同样量化，路由保持原样。"""
    corpus: Path | None = None
    """Text for bits per byte and perplexity; by default the held-out part of Python's own documentation.
    计算每字节比特与困惑度的文本；默认为 Python 自带文档的留出部分。"""
    tasks: tuple[str, ...] = ()
    """Also compare greedy accuracy on held-out problems of these tasks, such as countdown and sorting.
    另比较这些任务留出题上的贪心准确率，例如 countdown、sorting。"""
    problems: int = 200
    """Held-out problems for --tasks.
    --tasks 的留出题数。"""
    max_tokens: int = 100
    """Longest completion for --tasks.
    --tasks 的最长回答。"""


def quantize(config: Quantize) -> None:
    from pellucid import events, quant
    from pellucid.cli.eval import Eval, task_of, text_bits
    from pellucid.engine.native_batch import choose_step
    from pellucid.engine.opening import open_model
    from pellucid.models import load
    from pellucid.models.hub import local_folder, matrices_of
    from pellucid.tokenizers import Tokenizer

    prepare(replace(config, device="cpu"))  # INT8 products are made for the CPU
    task_of(config.tasks or ("countdown",))  # a misspelt task is told before the work
    folder = local_folder(config.model)
    written = quant.compress(folder, config.out, config.bits, matrices_of(folder))
    name = f"int{config.bits}"
    models = {"float32": load(folder), name: open_model(config.out)}  # what was written is what is measured
    tokenizer = Tokenizer.load(folder)
    measured = quant.measure(models["float32"], models[name], step_of=lambda m: choose_step(m).value)
    text = Eval(model=config.model, corpus=config.corpus)
    measured["bits_per_byte"] = {name: text_bits(text, m, tokenizer)[0] for name, m in models.items()}
    rows = quant.rows_of(tokenizer.encode_each(texts_of(text)), min(256, models[name].spec.context))
    measured |= quant.quality(models["float32"], rows, {name: models[name]})
    measured["kept"], measured["left_float"] = written.kept, quant.left_float(models[name])
    if config.tasks:
        measured["accuracy"] = {name: accuracy(config, m, tokenizer) for name, m in models.items()}
    events.emit(events.Evaluation("quantize", "size ratio", measured["size_ratio"], measured))
    print("\n".join(table(measured)))
    print(say("quantize.perplexity", name=name, more=f"{100 * measured['more'][name]:+.2f}", most=f"{100 * quant.GOALS[name]:g}"))
    for kind, why in kept_kinds(written.kept).items():
        print(say("quantize.kept", name=kind, dtype="float", why=why))
    print(f"kernel: {measured['kernel']}\n{config.out}")


def texts_of(config: Eval) -> list[str]:
    """What `text_bits` measures on."""
    from pellucid.data import corpora
    from pellucid.data.split import divide

    found = corpora.read(config.corpus) if config.corpus else divide(corpora.standard_library("docs"))[1]
    return [d.text for d in found]


def kept_kinds(kept: dict[str, str]) -> dict[str, str]:
    """The same of all layers said once."""
    return {re.sub(r"\d+", "*", name): why for name, why in kept.items()}


def accuracy(config: Quantize, model: Decoder, tokenizer: Tokenizer) -> float:
    """Greedy pass@1 on held-out problems."""
    from pellucid import tasks
    from pellucid.align.rollout import Rollouts
    from pellucid.cli.eval import task_of

    task, seed = task_of(config.tasks), config.seed or 0
    generate = Rollouts(model, tokenizer, task, max_tokens=config.max_tokens).for_evaluation(seed)
    return tasks.evaluate(task, generate, config.problems, seed=seed).pass_at_1


def table(measured: dict[str, Any]) -> list[str]:
    """Lines of: what, float32, bfloat16 where it was measured, the quantized one, and that one / float32."""
    rows: list[tuple[str, dict[str, float], str]] = [("MB", {k: v / 1e6 for k, v in measured["bytes"].items()}, ",.2f"),
                                                      ("bits per byte", measured["bits_per_byte"], ".4f")]
    if "perplexity" in measured:
        rows.append(("perplexity", measured["perplexity"], ",.4f"))
    if "accuracy" in measured:
        rows.append((say("quantize.accuracy"), measured["accuracy"], ".1%"))
    rows += [(say("quantize.speed", batch=b), speeds, ",.0f") for b, speeds in measured["tokens_per_second"].items()]
    small = next(name for name in measured["bytes"] if name != "float32")
    names = ("float32", "bfloat16", small)
    lines = [aligned("", [*names, f"{small} / float32"])]
    for what, values, form in rows:
        cells = [format(values[name], form) if name in values else "-" for name in names]
        ratio = values[small] / values["float32"] if values["float32"] else float("nan")
        lines.append(aligned(what, [*cells, f"{ratio:.3f}"]))
    return lines


def aligned(head: str, cells: list[str]) -> str:
    """By display width: a Chinese character takes two columns."""
    from rich.cells import cell_len

    return head + " " * max(1, 26 - cell_len(head)) + "".join(f"{cell:>15}" for cell in cells)
