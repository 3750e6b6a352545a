"""`pellucid train pretrain` and `pellucid train sft`: the stages of the main job on any checkpoint and data."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pellucid.cli.base import OpensModel, Positional, prepare
from pellucid.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from pellucid.data.packing import Packed
    from pellucid.nn import Decoder
    from pellucid.train import LoopConfig


@dataclass(frozen=True)
class TrainOptions(OpensModel):
    """What every training run is told."""

    model: Positional[str]
    """Checkpoint to start from: a folder or a Hub id.
    起始检查点：目录或 Hub id。"""
    data: Positional[Path]
    """Text, a folder of texts, JSONL or Parquet (pretrain); JSONL of conversations (sft).
    预训练：文本、目录、JSONL 或 Parquet；微调：对话 JSONL。"""
    out: Path = Path("runs/train")
    """Folder for the trained model and the resume state.
    训练结果与续训状态的目录。"""
    steps: int | None = None
    """Optimizer steps; or give --minutes.
    优化步数；或用 --minutes。"""
    minutes: float | None = None
    """Length of the run in minutes.
    训练分钟数。"""
    rows: int = 8
    """Packed rows in a step.
    每步的打包行数。"""
    micro_rows: int | None = None
    """Rows in a micro-batch: less memory, same numbers.
    每个微批的行数：更省内存，结果不变。"""
    length: int = 256
    """Tokens in a row.
    每行词元数。"""
    optimizer: Literal["muon", "adamw"] = "adamw"
    """Muon for the matrices with AdamW for the rest, or AdamW for all.
    Muon（其余参数用 AdamW）或全部用 AdamW。"""
    lr: float | None = None
    """Learning rate; by default 0.02 for Muon, 2e-5 for AdamW.
    学习率；默认 Muon 为 0.02，AdamW 为 2e-5。"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the activations; auto measures which is faster.
    激活的数据类型；auto 会实测选快的。"""
    compile: bool = False
    """Compile the layers: needs a C++ compiler, costs up to a minute at the start, pays on long runs.
    编译各层：需要 C++ 编译器，启动多花最多一分钟，长时间训练才划算。"""
    processes: int = 1
    """Processes that do the run together, each its share of a step (torchrun does as well); one computes the same.
    共同完成训练的进程数，各做每步的一份（也可用 torchrun 启动）；结果与单进程相同。"""
    resume: bool = False
    """Go on with the interrupted run in the same folder.
    继续同一目录中被中断的训练。"""


@dataclass(frozen=True)
class Pretrain(TrainOptions):
    """Language modelling on raw text; a share held out by content hash is measured in bits per byte, before and after.
    在原始文本上做语言建模；按内容哈希留出一部分，用每字节比特衡量。

    $ pellucid train pretrain runs/grow/model docs/ --minutes 2 --optimizer muon
    """


@dataclass(frozen=True)
class Sft(TrainOptions):
    """Supervised fine-tuning on conversations: loss on the assistant's tokens only, by the chat template's mask.
    在对话上做监督微调：仅按聊天模板的掩码在助手词元上计损失。

    $ pellucid train sft runs/grow/model chats.jsonl --steps 200
    """


def pretrain(config: Pretrain) -> None:
    from pellucid.data import corpora, packing
    from pellucid.data.split import divide
    from pellucid.tokenizers import Tokenizer
    from pellucid.train import token_bytes

    documents = list(corpora.read(config.data))
    tokenizer = Tokenizer.load(config.model)
    train, heldout = divide(documents)
    end = [tokenizer.pad_id]

    def rows(part: list[Any], remainder: str) -> Packed:
        ids = [i + end for i in tokenizer.encode_each([d.text for d in part])]
        return packing.pack_stream(ids, config.length, remainder=remainder, pad_id=tokenizer.pad_id)

    _train(config, tokenizer, rows(train, "drop"), HeldOut(rows(heldout, "pad"), token_bytes(tokenizer)), "pretrain")


def sft(config: Sft) -> None:
    from pellucid.data import chats, packing
    from pellucid.data.split import divide_by
    from pellucid.tokenizers import Tokenizer

    tokenizer = Tokenizer.load(config.model)
    sides = divide_by(chats.read_chats(config.data), lambda chat: chat.key, config.data, "conversations")
    train, heldout = (packing.pack_samples([tokenizer.encode_chat(chat.messages, tools=chat.tools) for chat in side], config.length,
                                           overlong="truncate", pad_id=tokenizer.pad_id) for side in sides)
    _train(config, tokenizer, train, HeldOut(heldout), "sft")


@dataclass
class HeldOut:
    """Rows that no training sees, and the number that is measured on them: for text bits per byte, which models with
    other tokenizers can be compared by; for answers the loss in nats per token, where `sizes` (bytes a token) is None."""

    rows: Packed
    sizes: Tensor | None = None

    def measure(self, model: Decoder) -> tuple[str, float, dict[str, Any]]:
        """As an evaluation: name, value, details."""
        from pellucid.train import bits_per_byte, held_out_loss

        nats, count = held_out_loss(model, self.rows.to(model.embed.weight.device))
        loss = nats / max(count, 1)
        if self.sizes is None:
            return "held-out loss per token", loss, {"tokens": count}
        return "bits per byte", bits_per_byte(nats, self.rows.labels, self.sizes), {"loss": loss, "tokens": count}

    def told(self, before: float, after: float, loss_before: float) -> str:
        """Both values, with the raw losses beside them: on the same rows they are in the same proportion."""
        if self.sizes is None:
            return f"held-out loss {before:.4f} -> {after:.4f} nats per token"
        loss_after = loss_before * after / before if before else 0.0
        return f"held-out bits per byte {before:.4f} -> {after:.4f} (loss {loss_before:.4f} -> {loss_after:.4f} nats per token)"


def _train(config: TrainOptions, tokenizer: Any, rows: Packed, heldout: HeldOut, stage: str) -> None:
    """Load, train with held-out measurements, save."""
    from pellucid import events
    from pellucid.models import load, save
    from pellucid.runtime import choose_dtype, dtype_of
    from pellucid.train import Loop
    from pellucid.train.ranks import joined

    device = prepare(config)
    if config.compile and device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")):
        raise BadInput("--compile needs a C++ compiler", "none of g++, clang++ and cl is on the path", "leave it out")
    model = load(config.model, device=str(device), allow_missing=config.allow_missing)
    if config.length > model.spec.context:
        raise BadInput(f"--length {config.length} exceeds the model's context of {model.spec.context}",
                       next=f"use --length {model.spec.context} or less")
    ranks = joined()
    choice = choose_dtype(model.spec.dim, device) if config.dtype == "auto" and ranks.first else None
    model.compute_dtype = choice.value if choice else dtype_of(config.dtype if config.dtype != "auto" else "float32")
    model.compute_dtype = dtype_of(ranks.gathered(str(model.compute_dtype).removeprefix("torch."))[0])  # one measures, all follow
    events.note(f"activations in {str(model.compute_dtype).removeprefix('torch.')}: {choice.reason if choice else 'asked for'}")

    name, before, details = heldout.measure(model)
    loop = Loop(model, rows, _loop_config(config, stage), evaluate=lambda: heldout.measure(model), checkpoint=config.out / "checkpoint",
                tokenizer=tokenizer, resume_hint="the same command with --resume", ranks=ranks)
    if config.resume and not loop.resume():
        events.note(f"nothing to resume in {config.out}: starting from {config.model}", "warning")
    history = loop.run()
    if not ranks.first:
        return
    save(model, config.out / "model", tokenizer=tokenizer)
    after = history.evaluations[-1][1]
    events.emit(events.StageEnd(stage, history.seconds, before, after, name, "nats" if heldout.sizes is None else "bpb", False))
    print(f"{heldout.told(before, after, details.get('loss', before))}; model in {config.out / 'model'}")


def _loop_config(config: TrainOptions, stage: str) -> LoopConfig:
    from pellucid.optim import OptimConfig
    from pellucid.train import LoopConfig

    lr = config.lr if config.lr is not None else {"muon": 0.02, "adamw": 2e-5}[config.optimizer]
    seconds = None if config.minutes is None else config.minutes * 60
    steps = config.steps if config.steps is not None or seconds is not None else 100
    return LoopConfig(stage, steps=steps, seconds=seconds, rows=config.rows, micro_rows=config.micro_rows,
                      optim=OptimConfig(config.optimizer, lr=lr), save_seconds=60.0, compile=config.compile, seed=config.seed or 0)
