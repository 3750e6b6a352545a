"""A step of GRPO, rollout and update, beside trl's GRPOTrainer with its default generation: time and peak memory.

    pellucid bench align --out benchmarks/results/align.json

Both take the same weights (a Qwen3 of about that size, random), the same prompts, group, length, temperature, reward function and objective
(trl's default: token mean, group std, clip 0.2, no KL term), AdamW; both sample, grade, and make one optimizer step a rollout, in
float32 and in bfloat16 with float32 weights, trl's own default (gradient checkpointing, its other default, is off: it costs time).
Random weights end an answer about once in the vocabulary, so nearly all of them have the full length in both. Tokens per second are
those of the completions at full length, which makes ratios of rates ratios of steps per second. Before anything is timed, both give
the same log-probability to a text. Memory is the process's peak, and what it is above the process before its first step (imports
and weights).
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import (
    Contestant,
    begin,
    contest,
    finish,
    options,
    parameters,
    quiet_transformers,
    ratios,
    spec_of,
    table,
    take_turns,
)
from pellucid.models import load, save
from pellucid.nn import Decoder, init_weights
from pellucid.runtime import choose_threads, peak_memory_bytes

SHAPES = {"1M": (8, 8), "5M": (8, 8), "30M": (4, 4)}  # prompts in a step, completions of each
Prepared = tuple[dict[str, Any], Callable[[], int], Callable[[], dict[str, Any]]]
LR = 1e-6


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The reward: share of even ids. trl's signature, which pellucid takes as it is."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def memory() -> float:
    """MiB, the most that this process ever held."""
    return (peak_memory_bytes() or 0) / 2**20


def write_checkpoint(size: str, folder: Path, words: int, prompts: int) -> None:
    """Weights, a tokenizer that fills the vocabulary, and prompts of that many tokens."""
    from pellucid.data import corpora
    from pellucid.tokenizers import train_bpe

    spec = spec_of(size)
    texts = [d.text for d in corpora.standard_library("docs")]
    tokenizer = train_bpe(texts, spec.vocab)
    save(init_weights(Decoder(spec)), folder, tokenizer=tokenizer)
    ids = [i for text in texts for i in tokenizer.encode(text)]
    asked = [tokenizer.decode(ids[words * i : words * (i + 1)]) for i in range(prompts)]
    (folder / "prompts.json").write_text(json.dumps(asked))


def ours(what: dict[str, Any]) -> Prepared:
    from pellucid.align.online import OnlineConfig, OnlineLoop
    from pellucid.align.prompts import Prompts
    from pellucid.align.recipes import recipe
    from pellucid.align.rewards import Reward, RewardSet
    from pellucid.data.formats import PromptRecord
    from pellucid.optim import OptimConfig, Schedule
    from pellucid.tokenizers import Tokenizer

    model, tokenizer = load(what["folder"]), Tokenizer.load(what["folder"])
    if what["dtype"] == "bf16":
        model.compute_dtype = torch.bfloat16
    asked = json.loads((Path(what["folder"]) / "prompts.json").read_text())
    config = OnlineConfig(steps=10_000, prompts=what["prompts"], group=what["group"], rounds=1, max_tokens=what["length"],
                          objective=recipe("trl-default"), optim=OptimConfig("adamw", lr=LR), schedule=Schedule("constant", warmup=0.0),
                          samples_shown=0, evaluations=0)
    loop = OnlineLoop(model, tokenizer, Prompts([PromptRecord(prompt=p) for p in asked]), config,
                      rewards=RewardSet([Reward("even", even)]))
    loop.budget.start()
    ids = tokenizer.encode(asked[0])
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, :-1].float()
    before = memory()

    def call() -> int:
        loop._one_step()
        return int(what["prompts"] * what["group"] * what["length"])

    return {"loss": likelihood(logits, ids)}, call, lambda: {
        "peak_mib": round(memory(), 1), "before_mib": round(before, 1), "sampled": loop.history.sampled / loop.history.steps,
        "sampling_seconds_a_step": round(loop.history.sampling_seconds / loop.history.steps, 4)}


def likelihood(logits: torch.Tensor, ids: list[int]) -> float:
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])))


class Gate:
    """Lets a trainer that owns the main thread make one step at a time."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def call(self, tokens: int) -> int:
        self.go.release()
        self.done.acquire()
        return tokens


def theirs(what: dict[str, Any]) -> int:
    """trl trains in the main thread, and stops after every step until it is its turn again."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet_transformers()
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    gate, folder = Gate(), what["folder"]

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.go.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.done.release()

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    asked = json.loads((Path(folder) / "prompts.json").read_text())
    size = what["prompts"] * what["group"]
    args = GRPOConfig(
        output_dir=what["scratch"], use_cpu=True, bf16=what["dtype"] == "bf16", fp16=False, gradient_checkpointing=False, save_strategy="no", report_to=[],
        max_steps=10_000, learning_rate=LR, lr_scheduler_type="constant", logging_steps=100_000, disable_tqdm=True,
        per_device_train_batch_size=size, gradient_accumulation_steps=1, steps_per_generation=1, num_iterations=1,
        num_generations=what["group"], max_completion_length=what["length"], temperature=1.0, beta=0.0)
    trainer = GRPOTrainer(model, reward_funcs=[even], args=args, train_dataset=Dataset.from_dict({"prompt": asked}),
                          processing_class=tokenizer, callbacks=[Turns()])
    ids = tokenizer(asked[0])["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    before = memory()

    def prepare() -> Prepared:
        return ({"loss": likelihood(logits, ids)}, lambda: gate.call(size * what["length"]),
                lambda: {"peak_mib": round(memory(), 1), "before_mib": round(before, 1)})

    def turns() -> None:
        code = 1
        try:
            code = take_turns(prepare)
        finally:
            os._exit(code)  # the trainer waits for a turn that will not come

    threading.Thread(target=turns, daemon=True).start()
    trainer.train()
    return 1


def compare(size: str, chosen: Any) -> dict[str, Any]:
    prompts, group = chosen.shape or SHAPES[size]
    shape = {"prompts": prompts, "group": group, "length": chosen.length}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(size, Path(folder) / "model", chosen.prompt_tokens, 64)
        common = shape | {"threads": chosen.threads, "folder": str(Path(folder) / "model"), "scratch": str(Path(folder) / "trl")}
        asked = {"pellucid float32": ("pellucid", "float32"), "trl float32": ("trl", "float32"), "pellucid bf16": ("pellucid", "bf16"),
                 "trl bf16": ("trl", "bf16")}
        contestants = {name: Contestant(__file__, common | {"kind": kind, "dtype": dtype}) for name, (kind, dtype) in asked.items()
                       if size in chosen.bf16 or dtype == "float32"}
        got, want = (contestants[n].ready["loss"] for n in ("pellucid float32", "trl float32"))
        if not math.isclose(got, want, abs_tol=1e-4):
            raise SystemExit(f"the two do not compute the same: {got} and {want} nats a token before the first step")
        rates = contest(contestants, chosen.rounds, chosen.seconds)
        ends = {name: c.end() for name, c in contestants.items()}
    tokens = prompts * group * chosen.length
    table(f"{size} ({parameters(size) / 1e6:.2f}M parameters), a step of {prompts} x {group} completions of {chosen.length} tokens", rates)
    pairs = {f"{d} steps/s over trl's": (f"pellucid {d}", f"trl {d}") for d in (("float32", "bf16") if size in chosen.bf16 else ("float32",))}
    found = ratios(rates, pairs)
    for name, end in ends.items():
        print(f"  {name:20s} {tokens / rates[name]['median']:6.2f} s a step, peak {end['peak_mib']:.0f} MiB ({end['peak_mib'] - end['before_mib']:.0f} above imports and weights)")
    return {"parameters": parameters(size), **shape, "prompt_tokens": chosen.prompt_tokens, "tokens_per_second": rates,
            "seconds_a_step": {name: round(tokens / r["median"], 4) for name, r in rates.items()}, "ratios": found, "ends": ends}


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, rounds=4, seconds=100.0)
    parser.add_argument("--sizes", nargs="+", default=["1M", "30M"])
    parser.add_argument("--shape", type=int, nargs=2, help="prompts in a step, and completions of each (default: 8 8; 4 4 at 30M)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--bf16", nargs="*", default=["1M", "30M"], help="sizes at which both also run in bfloat16, trl's default")
    chosen = parser.parse_args(argv)
    if chosen.contestant:
        choose_threads(chosen.contestant["threads"])
        return theirs(chosen.contestant) if chosen.contestant["kind"] == "trl" else take_turns(partial(ours, chosen.contestant))
    result = begin("align", chosen)
    from importlib.metadata import version

    result["machine"]["trl"] = version("trl")
    result["sizes"] = {}
    for size in chosen.sizes:
        result["sizes"][size] = compare(size, chosen)
        if chosen.json:  # what is measured stays, should the next size be stopped
            finish(result, chosen.json)
    return finish(result, chosen.json)


if __name__ == "__main__":
    raise SystemExit(main())
