"""What every stage needs of the machine's memory: predicted from shapes before the run, measured stage by stage in it.

Predicted is the largest of what is alive at the same time: the process as it stands, weights with gradients and
optimizer state, then either a micro-batch's activations or the caches of a batch of samples. It is meant to be right
within a third, so that a job that cannot fit is refused before it begins (`refuse_what_cannot_fit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pellucid.errors import BadInput
from pellucid.grow import recipe
from pellucid.grow.config import GrowConfig
from pellucid.grow.corpus import LONG_RUN, MOST_BYTES
from pellucid.messages import say, three_parts
from pellucid.nn import DecoderSpec, count_parameters
from pellucid.ops.loss import rows_of_chunk
from pellucid.runtime import (
    available_memory_bytes,
    peak_memory_bytes,
    release_memory,
    reset_peak_memory,
    resident_bytes,
)

MIB = 2**20
PROMPT = 40  # tokens of a problem in its chat template
COMPLETION = 60  # sampled tokens, most often fewer than MAX_TOKENS
MOST_SEQUENCES = 512  # that are sampled together
MICRO_ROWS = 32  # of the online loop; also the rows of a held-out measurement
KEPT = 20 * MIB  # that every stage leaves behind: code loaded at its first use, fragments of the allocator (measured)
# On a CPU every new shape of a bfloat16 product leaves a compiled kernel in oneDNN's cache, which holds 1024 of them.
KERNELS, KERNEL = 1024, 600 * 2**10  # the bytes of one are measured: about 600 MiB when it is full
NEW_SHAPES = {"sft": 3, "grpo": 10}  # in a step: the number of trained tokens differs each time
DECODING_SHAPES = 40  # more in a step of grpo, where decoding runs on PyTorch's operators: that of the samples still going
FRAGMENTS = 2  # and then as much again as the tensors need is free, but in pieces: each has another size in every step
LIBRARY = {"docs": 2_000_000, "both": 9_000_000}  # bytes of the text that comes with Python


@dataclass(frozen=True)
class Work:
    """What decides the memory of a job besides its model."""

    problems: int = 1000
    prompts: int = 32
    demonstrations: int = 10_000
    corpus: int = LIBRARY["docs"]
    bytes: int = 4  # of one activation: 2 in bfloat16
    steps: int = 1000  # of fine-tuning
    compiled: bool = True  # decoding


def work_of(config: GrowConfig, tokens_per_second: float, dtype: torch.dtype, compiled: bool = True) -> Work:
    problems = recipe.problems(config.minutes, tokens_per_second)
    left = max(10.0, 60 * config.minutes - recipe.tail_seconds(recipe.measure_seconds(problems, tokens_per_second)) - 14)
    tuning = recipe.SHARES["sft"] * (1 - recipe.SHARES["pretrain"]) * left
    return Work(problems, recipe.prompts(0.4 * left, tokens_per_second), recipe.demonstrations(config.minutes),
                corpus_bytes(config), dtype.itemsize, int(tuning * tokens_per_second / (recipe.ROWS * recipe.ROW)), compiled)


def corpus_bytes(config: GrowConfig) -> int:
    """Of the text on disk, as far as it is read."""
    if config.corpus is None:
        return LIBRARY["both" if config.minutes >= LONG_RUN else "docs"]
    files = [config.corpus] if config.corpus.is_file() else [f for f in Path(config.corpus).rglob("*") if f.is_file()]
    return min(MOST_BYTES, sum(f.stat().st_size for f in files))


# --- the prediction ---------------------------------------------------------------------------------------------------


def memory_of(spec: DecoderSpec, stage: str, work: Work) -> int:
    """Bytes that a stage needs beyond what the process held when the job was planned."""
    weights = 4 * count_parameters(spec)
    text = 2 * work.corpus  # texts and the documents they were cut from
    kept = text + KEPT * (1 + recipe.STAGES.index(stage)) + kernels(stage, work)
    rows = 32 * work.corpus * 2 // 5  # four int64 a token; 3.1 bytes a token, and a quarter as many tokens of facts
    if stage == "tokenizer":
        return kept + 6 * work.corpus
    if stage == "pretrain":
        reading = 100 * work.corpus * 2 // 5 + 64 * min(work.corpus, 10_000_000)  # ids as Python numbers; n-grams as int64
        return kept + max(reading, rows + 4 * weights + activations(spec, recipe.ROWS * recipe.ROW, recipe.ROW, work.bytes))
    # In a lower precision sampling runs on a copy that is cast once.
    model = weights + (0 if work.bytes == 4 else work.bytes * weights // 4)
    if stage == "sft":
        shown = 4000 * work.demonstrations  # ids and masks as Python lists, or the rows made of them
        training = activations(spec, recipe.ROWS * recipe.ROW, recipe.ROW, work.bytes)
        return kept + shown + model + 3 * weights + max(training, sampling(spec, work.problems, work.bytes))
    if stage == "grpo":
        sequences = work.prompts * recipe.GROUP
        tokens, row = packed_tokens(sequences)
        training = activations(spec, tokens, row, work.bytes)
        most = max(training, sampling(spec, max(sequences, work.problems), work.bytes))
        return kept + model + 3 * weights + most * (1 if work.compiled else FRAGMENTS)
    if stage == "quantize":  # float32, bfloat16 and INT8 beside each other, and the file's tensors
        held_out = forward_bytes(spec, MICRO_ROWS * recipe.ROW, recipe.ROW, 4)
        return kept + 7 * weights // 2 + max(held_out, sampling(spec, work.problems, 4))
    sequences = max(8, work.problems // 10) * 8 if stage == "evaluate" else 1
    return kept + 2 * weights + sampling(spec, sequences, 4)


def kernels(stage: str, work: Work) -> int:
    """oneDNN's cache once the stage is over; it stays for those that follow."""
    if work.bytes == 4:
        return 0
    before = recipe.STAGES[: recipe.STAGES.index(stage) + 1]
    made = NEW_SHAPES["sft"] * work.steps if "sft" in before else 0
    if "grpo" in before:  # whose steps take about four times as long
        made += (NEW_SHAPES["grpo"] + (0 if work.compiled else DECODING_SHAPES)) * (work.steps // 4)
    return KERNEL * min(KERNELS, made)


def packed_tokens(sequences: int) -> tuple[int, int]:
    """Tokens of a micro-batch of packed completions, and of one of its rows."""
    row = 2 * (PROMPT + COMPLETION)
    return min(MICRO_ROWS * row, sequences * (PROMPT + COMPLETION)), row


def activations(spec: DecoderSpec, tokens: int, row: int, width: int) -> int:
    """What the backward pass of `tokens` tokens needs: per layer about 6 model widths, 3 times q, k and v, the attention
    probabilities of the row and 4 feed-forward widths, in numbers of `width` bytes; and the logits of one chunk."""
    numbers = sum(6 * spec.dim + 3 * (a.heads + 2 * a.kv_heads) * a.head_dim + a.heads * row + 4 * layer.ffn.hidden
                  for layer in spec.layers for a in [layer.mixer])
    return tokens * numbers * width + logits_bytes(spec, width)


def forward_bytes(spec: DecoderSpec, tokens: int, row: int, width: int) -> int:
    """Of a pass without gradients: only one layer's numbers are alive."""
    numbers = max(4 * spec.dim + 2 * (a.heads + 2 * a.kv_heads) * a.head_dim + a.heads * row + 3 * layer.ffn.hidden
                  for layer in spec.layers for a in [layer.mixer])
    return tokens * numbers * width + logits_bytes(spec, width)


def logits_bytes(spec: DecoderSpec, width: int) -> int:
    """Logits, probabilities and their gradient for one chunk of the loss."""
    return (4 + 2 * width) * rows_of_chunk(spec.vocab) * spec.vocab


def sampling(spec: DecoderSpec, sequences: int, width: int) -> int:
    """The cache of a batch of samples (a quarter more: a layer is copied when it grows), or the pass over all prompts;
    and of the last tokens the logits, in float32, with what the sampler makes of them."""
    batch = min(MOST_SEQUENCES, sequences)
    cache = batch * (PROMPT + recipe.MAX_TOKENS) * spec.kv_bytes_per_token * width // 4
    prefill = forward_bytes(spec, batch * PROMPT, PROMPT, width)
    return cache + cache // 4 + prefill // 2 + 4 * 4 * batch * spec.vocab


# --- before the run ---------------------------------------------------------------------------------------------------


def base_bytes() -> int:
    """Python, torch and whatever else this process holds now."""
    release_memory()
    return resident_bytes() or peak_memory_bytes() or 0


def refuse_what_cannot_fit(stages: list[dict[str, Any]], base: int, device: torch.device, config: GrowConfig) -> None:
    """BadInput where a stage is predicted to need more than the machine (or the GPU) still has."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory_bytes()
    largest = max(stages, key=lambda s: s["memory_bytes"])
    more = largest["memory_bytes"] - base
    if free is None or more <= free:
        return
    change = say("grow.smaller_model" if config.model else "grow.smaller_job")
    raise BadInput(*three_parts("error.does_not_fit", stage=largest["stage"], more=more / 2**30,
                                 free=free / 2**30, device=device, change=change))


# --- during the run ---------------------------------------------------------------------------------------------------


class StageMemory:
    """The peak of one stage. `whole`: only the peak of the process so far can be told (it is no less)."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.whole = not reset_peak_memory()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def peak(self) -> int | None:
        """Bytes: of the process, and of the GPU's allocations beside it."""
        process = peak_memory_bytes()
        if process is None or self.device.type != "cuda":
            return process
        return process + torch.cuda.max_memory_allocated(self.device)
