"""`pellucid quantize`: INT8 weights, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pellucid.cli.base import Common, Positional, prepare


@dataclass(frozen=True)
class Quantize(Common):
    """Write a model with INT8 weights and measure size, speed and bits per byte before and after.
    写出 INT8 权重的模型，并比较前后的大小、速度与每字节比特。

    $ pellucid quantize runs/grow/model --out runs/grow/model-int8
    """

    model: Positional[str]
    """Checkpoint: a folder or a Hub id.
    检查点：目录或 Hub id。"""
    out: Path = Path("runs/model-int8")
    """Folder of the INT8 model.
    INT8 模型的目录。"""
    corpus: Path | None = None
    """Text for bits per byte; by default the held-out part of Python's own documentation.
    计算每字节比特的文本；默认为 Python 自带文档的留出部分。"""


def quantize(config: Quantize) -> None:
    from pellucid import events, quant
    from pellucid.cli.eval import Eval, text_bits
    from pellucid.models import load
    from pellucid.models.hub import local_folder
    from pellucid.tokenizers import Tokenizer

    prepare(config)
    folder = local_folder(config.model)
    model, tokenizer = load(folder), Tokenizer.load(folder)
    small = quant.quantize(model)
    quant.compress(folder, config.out)
    measured = quant.measure(model, small)
    text = Eval(model=config.model, corpus=config.corpus)
    bits = {name: text_bits(text, m, tokenizer)[0] for name, m in (("float32", model), ("int8", small))}
    events.emit(events.Evaluation("quantize", "size ratio", measured["size_ratio"], {**measured, "bits_per_byte": bits}))
    print(f"{'':<24} {'float32':>12} {'int8':>12}")
    print(f"{'MB of weights':<24} {measured['bytes']['float32'] / 1e6:>12.2f} {measured['bytes']['int8'] / 1e6:>12.2f}")
    print(f"{'bits per byte':<24} {bits['float32']:>12.3f} {bits['int8']:>12.3f}")
    for batch, speeds in measured["tokens_per_second"].items():
        print(f"{'tokens/s at batch ' + batch:<24} {speeds['float32']:>12,.0f} {speeds['int8']:>12,.0f}")
    print(f"kernel: {measured['kernel']}; model in {config.out}")
