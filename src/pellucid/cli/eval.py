"""`pellucid eval`: numbers on held-out problems."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pellucid.cli.base import OpensModel, Positional, prepare

if TYPE_CHECKING:
    from pellucid.nn import Decoder
    from pellucid.tasks import Mixture
    from pellucid.tokenizers import Tokenizer


@dataclass(frozen=True)
class Eval(OpensModel):
    """Greedy accuracy and pass@k on problems that no training has seen; format, reasoning and length apart.
    在训练从未见过的题目上：贪心准确率与 pass@k；格式、推理、长度分开统计。

    $ pellucid eval runs/grow/model --tasks countdown sorting --k 8
    """

    model: Positional[str]
    """Checkpoint: a folder or a Hub id.
    检查点：目录或 Hub id。"""
    tasks: tuple[str, ...] = ("countdown", "arithmetic", "sorting", "calculator")
    """Tasks, in equal shares.
    任务（等比例）。"""
    problems: int = 200
    """Held-out problems.
    留出题数。"""
    k: int = 1
    """Above 1: k samples of each problem at temperature 1, and pass@k.
    大于 1 时：每题以温度 1 采样 k 次，并给出 pass@k。"""
    max_tokens: int = 100
    """Longest completion.
    最长回答。"""
    corpus: Path | None = None
    """Text for bits per byte, all of it; by default the held-out part of Python's own documentation.
    用于计算每字节比特的文本（全部使用）；默认为 Python 自带文档的留出部分。"""


def task_of(names: tuple[str, ...]) -> Mixture:
    """The named tasks in equal shares."""
    from pellucid import tasks

    return tasks.Mixture([(tasks.make(name), 1.0) for name in names])


def text_bits(config: Eval, model: Decoder, tokenizer: Tokenizer) -> tuple[float, int]:
    """Bits per byte, and over how many bytes."""
    from pellucid.data import corpora, packing
    from pellucid.data.split import divide
    from pellucid.train import bits_per_byte, held_out_loss, token_bytes

    texts = list(corpora.read(config.corpus)) if config.corpus else divide(corpora.standard_library("docs"))[1]
    T = min(256, model.spec.context)
    rows = packing.pack_stream(tokenizer.encode_each([d.text for d in texts]), T, remainder="pad", pad_id=tokenizer.pad_id)
    sizes = token_bytes(tokenizer)
    labels = rows.labels[rows.labels != packing.IGNORE]
    return bits_per_byte(held_out_loss(model, rows)[0], labels, sizes), int(sizes[labels].sum())


def evaluate(config: Eval) -> None:
    from pellucid import events, tasks
    from pellucid.align.rollout import Rollouts
    from pellucid.engine.opening import open_model
    from pellucid.tokenizers import Tokenizer

    prepare(config)
    task = task_of(config.tasks)
    # As `serve` and `chat` open it: an INT8 folder is measured with its INT8 products.
    model, tokenizer = open_model(config.model, device=config.device, allow_missing=config.allow_missing), Tokenizer.load(config.model)
    rollouts = Rollouts(model, tokenizer, task, max_tokens=config.max_tokens)
    scores = tasks.evaluate(task, rollouts.for_evaluation(config.seed or 0), config.problems, config.k, config.seed or 0)
    events.emit(events.Evaluation("eval", "pass@1", scores.pass_at_1, scores.record()))
    print(f"{'task':<12} {'pass@1':>8} {f'pass@{scores.k}':>8} {'format':>8} {'length':>8} {'cut off':>8}")
    for name, row in [*scores.by_task.items(), ("all", scores.record())]:
        print(f"{name:<12} {row['pass_at_1']:>8.1%} {row['pass_at_k']:>8.1%} {row['format']:>8.1%} "
              f"{row['mean_length']:>8.1f} {row['truncated']:>8.1%}")
    value, size = text_bits(config, model, tokenizer)
    events.emit(events.Evaluation("eval", "bits per byte", value, {"bytes": size}))
    print(f"bits per byte {value:.3f} on {size:,} bytes of {config.corpus or 'held-out Python documentation'}")
    print(f"temperature {scores.temperature:g}, {scores.n} problems, standard error of pass@1 {scores.standard_error:.1%}")
