"""Multi-turn tool calling from nothing to reinforcement learning, through the commands that a user would type.

    python experiments/tools.py --folder runs/tools --json experiments/results/tools.json

The task is `lookup` (`pellucid.tasks.lookup`): a question that takes two calls of a tool, the second with what the first one
said. What the tool knows is drawn anew for every problem, and the grader replays the calls. A small random model and
demonstrations of the task are written to a folder; the rest are two commands, a seed each:

    pellucid train sft start demonstrations.jsonl ...       from one of the two `STARTS`
    pellucid align grpo sft/model --task lookup ...          rollouts of several turns with the tool's answers between them

Measured before and after: 400 held-out problems (the task holds out 37 questions; what the tool knows differs each time), greedily and by
one sample at temperature 1.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import figure
from tiny_policies import Kept

from pellucid.__main__ import main as pellucid
from pellucid.align.rollout import Rollouts
from pellucid.models import load, save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.runtime import machine_card
from pellucid.tasks import Lookup
from pellucid.tokenizers import Tokenizer, patterns, train_bpe

STARTS = {"stopped early": (3000, 52), "few demonstrations": (100, 100)}  # demonstrations, steps of 16 rows


def begin(folder: Path, seed: int, examples: int) -> None:
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


def measured(model: Path, problems: int = 400) -> dict[str, float]:
    """Accuracy of greedy and of sampled answers."""
    task, rng = Lookup(), random.Random(0)
    asked = [task.sample(rng, "heldout") for _ in range(problems)]
    rollouts = Rollouts(load(model), Tokenizer.load(model), task, max_tokens=160, tools=False)
    return {name: sum(g.rewards[0]["correct"] for g in rollouts.groups(asked, 1, temperature, 0)) / problems
            for name, temperature in (("greedy", 0.0), ("sampled", 1.0))}


def run(name: str, seed: int, rl: int, lr: float, where: str) -> dict[str, Any]:
    folder, (examples, steps) = Path(where) / name.replace(" ", "-") / str(seed), STARTS[name]
    begin(folder, seed, examples)
    clock = [time.process_time()]
    command("train", "sft", folder / "start", folder / "demonstrations.jsonl", "--steps", steps, "--rows", 16, "--length", 256, "--optimizer", "muon",
            "--dtype", "float32", "--seed", seed, "--out", folder / "sft", "--quiet", "--threads", 1)
    clock.append(time.process_time())
    command("align", "grpo", folder / "sft/model", "--task", "lookup", "--tools", "omit", "--steps", rl, "--prompts", 32, "--group", 8,
            "--max-tokens", 160, "--lr", lr, "--beta", 0, "--set", "dead_groups=drop", "clip_high=0.28", "--problems", 37, "--seed", seed,
            "--out", folder / "grpo", "--quiet", "--threads", 1)
    clock.append(time.process_time())
    events = [json.loads(line) for line in (folder / "grpo/events.jsonl").read_text(encoding="utf-8").splitlines()]
    tables = [e["metrics"] for e in events if e["kind"] == "step"]
    return {"start": name, "seed": seed, "demonstrations": examples, "sft steps": steps, "rl steps": rl, "lr": lr,
            "after SFT": measured(folder / "sft/model"), "after GRPO": measured(folder / "grpo/model"),
            "SFT CPU s": round(clock[1] - clock[0]), "GRPO CPU s": round(clock[2] - clock[1]),
            "curves": {name: [round(t[key], 4) for t in tables] for name, key in CURVES.items()}}


CURVES = {"correct": "reward/correct/mean", "format": "reward/format/mean", "groups that teach": "groups/live", "turns": "turns/mean"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rl", type=int, default=40)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--folder", type=Path, default=Path("runs/tools"))
    parser.add_argument("--kept", type=Path, help="file of the runs that are done, to go on after a stop")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    chosen = parser.parse_args()
    kept, runs = Kept(chosen.kept), []
    for seed in chosen.seeds:
        for name in chosen.starts:
            runs.append(kept(run, name, seed, chosen.rl, chosen.lr, str(chosen.folder)))
            print({k: v for k, v in runs[-1].items() if k != "curves"}, flush=True)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"experiment": "tools", "created": time.strftime("%Y-%m-%d"), "machine": machine_card(), "runs": runs}
        chosen.json.write_text(json.dumps(result, separators=(",", ":")).replace('{"start"', '\n{"start"') + "\n", encoding="utf-8")
    if chosen.figure:
        panels = {name: {start: [r["curves"][name] for r in runs if r["start"] == start] for start in chosen.starts} for name in CURVES if name != "turns"}
        figure.write(chosen.figure, f"GRPO on dialogues with a tool, sampled, mean and range of {len(chosen.seeds)} seeds, lr {chosen.lr:g}", panels)


if __name__ == "__main__":
    main()
