"""Multi-turn tool calling from nothing to reinforcement learning, through the commands that a user would type.

    python experiments/tools.py --folder runs/tools --json experiments/results/tools.json

The task is `lookup` (`pellucid.tasks.lookup`): a question that takes two calls of a tool, the second with what the first one
said. What the tool knows is drawn anew for every problem, and the grader replays the calls. A small random model and 3,000
demonstrations of the task are written to a folder; the rest are two commands, a seed each:

    pellucid train sft start demonstrations.jsonl ...       stopped early: --sft says when
    pellucid align grpo sft/model --task lookup ...          rollouts of several turns with the tool's answers between them

Measured by the second command: greedy accuracy on held-out questions, before and after.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from pellucid.__main__ import main as pellucid
from pellucid.models import save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.runtime import machine_card
from pellucid.tasks import Lookup
from pellucid.tokenizers import patterns, train_bpe


def start(folder: Path, seed: int, examples: int = 3000) -> None:
    """A random model with a tokenizer of the task's words, and demonstrations."""
    rng, task = random.Random(seed), Lookup()
    made = [task.dialogue(task.sample(rng, "train"), rng) for _ in range(examples)]
    texts = [" ".join(f"{m['role']}\n{m['content']}" for m in chat) for chat in made[:500]]
    tokenizer = train_bpe(texts, 512, patterns.QWEN_PATTERN)
    spec = DecoderSpec(tokenizer.vocab_size, 96, (Layer(Attn(4, 2, 24, Rope(24), qk_norm=True), MLP(256)),) * 3, context=256)
    save(init_weights(Decoder(spec), seed), folder / "start", tokenizer=tokenizer)
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in made), encoding="utf-8")


def command(*words: object) -> None:
    told = [str(w) for w in words]
    print("$ pellucid", *told, flush=True)
    if pellucid(told):
        raise SystemExit(1)


def run(folder: Path, seed: int, sft: int, rl: int, lr: float) -> dict[str, Any]:
    began = time.process_time()
    start(folder, seed)
    command("train", "sft", folder / "start", folder / "demonstrations.jsonl", "--steps", sft, "--rows", 16, "--length", 256, "--optimizer", "muon",
            "--dtype", "float32", "--seed", seed, "--out", folder / "sft", "--quiet")
    learned = time.process_time()
    command("align", "grpo", folder / "sft/model", "--task", "lookup", "--tools", "omit", "--steps", rl, "--prompts", 16, "--group", 8,
            "--max-tokens", 160, "--lr", lr, "--beta", 0, "--set", "dead_groups=drop", "clip_high=0.28", "--problems", 200, "--seed", seed,
            "--out", folder / "grpo", "--quiet")
    events = [json.loads(line) for line in (folder / "grpo/events.jsonl").read_text(encoding="utf-8").splitlines()]
    (end,) = [e for e in events if e["kind"] == "stage_end"] or [{"before": None, "after": None}]
    steps = [e["metrics"] for e in events if e["kind"] == "step"]
    return {"seed": seed, "before": end["before"], "after": end["after"], "sft steps": sft, "rl steps": rl, "lr": lr,
            "evaluations": [e["value"] for e in events if e["kind"] == "evaluation"],
            "sft CPU s": round(learned - began), "rl CPU s": round(time.process_time() - learned),
            "turns": [round(m["turns/mean"], 2) for m in (steps[0], steps[-1])]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sft", type=int, default=60)
    parser.add_argument("--rl", type=int, default=40)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--folder", type=Path, default=Path("runs/tools"))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    runs = []
    for seed in range(chosen.seeds):
        runs.append(run(chosen.folder / str(seed), seed, chosen.sft, chosen.rl, chosen.lr))
        print(runs[-1], flush=True)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({"experiment": "tools", "created": time.strftime("%Y-%m-%d"), "machine": machine_card(), "runs": runs}, indent=1)
                               + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
