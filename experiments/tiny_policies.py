"""What the experiments on alignment share: a character-level policy of some 100,000 parameters, warmed up to a controlled
degree, and the numbers that are fixed before an experiment is run.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pellucid.data.packing import pack_samples
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.optim import OptimConfig, Schedule
from pellucid.tasks import Problem, Task
from pellucid.tokenizers import Tokenizer, patterns, train_bpe
from pellucid.train import Loop, LoopConfig

VOCAB = 272


@cache
def tokenizer() -> Tokenizer:
    """A token a byte, and tokens for the words of the chat template."""
    return train_bpe(["user\nassistant\nuser\nassistant\n<think>\n</think>\n"] * 4, VOCAB, patterns.QWEN_PATTERN)


def spec(dim: int = 64, layers: int = 2, context: int = 128) -> DecoderSpec:
    return DecoderSpec(VOCAB, dim, (Layer(Attn(4, 2, dim // 4, Rope(dim // 4), qk_norm=True), MLP(2 * dim)),) * layers, context=context)


def warmed(task: Task, write: Callable[[Problem, random.Random], str], steps: int, seed: int, size: DecoderSpec, *,
           examples: int = 4000, rows: int = 16) -> Decoder:
    """A policy that has seen `steps` steps of what `write` answers to the task's training problems."""
    rng, tok = random.Random(seed), tokenizer()
    made = []
    for _ in range(examples):
        problem = task.sample(rng, "train")
        made.append(tok.encode_chat([{"role": "user", "content": problem.prompt},
                                     {"role": "assistant", "content": write(problem, rng)}]))
    return tuned(init_weights(Decoder(size), seed), made, steps, seed, rows)


def tuned(model: Decoder, samples: list[tuple[list[int], list[bool]]], steps: int, seed: int, rows: int = 16) -> Decoder:
    """Supervised fine-tuning on (ids, mask)."""
    config = LoopConfig("sft", steps=steps, rows=rows, optim=OptimConfig("muon", lr=0.02, adam_lr=0.01), schedule=Schedule("linear"),
                        evaluations=0, seed=seed)
    Loop(model, pack_samples(samples, 128, pad_id=tokenizer().pad_id), config).run()
    return model.eval()


def area(values: Sequence[float]) -> float:
    """The mean over the steps: the area under the curve, for curves of equal length."""
    return sum(values) / len(values)


def steps_to(values: Sequence[float], threshold: float, window: int = 5) -> int | None:
    """The first step at which the mean of the last `window` values reaches the threshold; None: never."""
    for i in range(window, len(values) + 1):
        if sum(values[i - window : i]) / window >= threshold:
            return i
    return None


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


class Kept:
    """The runs of an experiment in a file of JSON lines, [arguments, result] each: what is in it is not run again, so that an
    experiment that was stopped goes on where it was. The arguments are all that a run depends on. Without a file nothing is kept.
    """

    def __init__(self, file: Path | None):
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file and file.exists() else []
        self.results: dict[str, str] = {json.dumps(key): json.dumps(result) for key, result in map(json.loads, lines)}

    def __call__(self, run: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        key = json.dumps([run.__name__, *arguments])
        if key not in self.results:
            self.results[key] = json.dumps(run(*arguments))
            if self.file:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as out:
                    out.write(f"[{key}, {self.results[key]}]\n")
        result: dict[str, Any] = json.loads(self.results[key])
        return result
