"""GDPO with three rewards and a length that counts only for right answers: the setting of arXiv 2601.05242, section 3.3, in the small.

    python experiments/gdpo_three.py --json experiments/results/gdpo_three.json --figure experiments/results/gdpo_three.svg

The task is `brevity` (`pellucid.tasks.brevity`): a sum, with a limit on the characters of the thought. Rewards, weight 1 each:

    correct   the answer is right                               {0, 1}
    format    a thought between <think> and </think>, then a number   {0, 1}
    length    the thought keeps to the limit                    [0, 1]; plain, or CONDITIONED: 0 where the answer is wrong

The same as one command (any model folder):  pellucid align gdpo MODEL --task brevity --reward "correct" "format" "length@correct>=1"

Arms: GRPO, GRPO without std, GDPO, each with the plain and with the conditioned length; same policy, problems, learning rate, clip and
steps, no KL term. All rewards lie in [0, 1], so that rescaling them is GRPO itself. The start is warmed up on demonstrations of
which 30 % have no thought, 50 % think the long way whatever the limit, and 40 % give a wrong number.
Fixed before the first run: two seeds; the area under the curve of each component over the steps (`length` before its condition), and the
mean of the last five steps of `short`: right AND within the limit, which is what is wanted.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import figure
from tiny_policies import area, spec, spread, tokenizer, warmed

from pellucid.align.objective_config import ObjectiveConfig
from pellucid.align.online import OnlineConfig, OnlineLoop
from pellucid.align.reward_specs import reward_set
from pellucid.nn import Decoder
from pellucid.optim import OptimConfig, Schedule
from pellucid.runtime import machine_card, seed_everything
from pellucid.tasks import Problem
from pellucid.tasks.brevity import Brevity, BrevityDials, ways

CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "sequence-mean"}
ARMS: dict[str, ObjectiveConfig] = {"GRPO": ObjectiveConfig(**CLIP), "GRPO without std": ObjectiveConfig(scale="none", **CLIP),
                                    "GDPO": ObjectiveConfig(advantage="gdpo", whiten="sequence", **CLIP)}
LENGTH = {"plain": "length", "conditioned": "length@correct>=1"}
SHOWN = ("correct", "format", "length_itself", "short")


class Task(Brevity):
    """Brevity with two numbers that are measured only: length without its condition, and right within the limit."""

    weights = {**Brevity.weights, "length_itself": 0.0, "short": 0.0}

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        scores = super().grade(problem, text)
        scores["format"] *= float(text.startswith("<think>"))
        return scores | {"length_itself": scores["length"], "short": scores["correct"] * float(scores["length"] == 1.0)}


TASK = Task(BrevityDials(min_digits=2, max_digits=2, operations="+"))


def write(problem: Problem, rng: random.Random) -> str:
    """A demonstration with faults of known frequency."""
    a, operation, b, result, _ = problem.answer
    answer = " ".join(str(result if rng.random() < 0.6 else rng.randrange(20, 199)))
    if rng.random() < 0.3:
        return answer
    if rng.random() < 0.5:
        return f"<think>\n{ways(a, operation, b)[0]}\n</think>\n\n{answer}"
    fitting = TASK.demonstrate(problem, rng)
    return fitting[: fitting.rindex("\n") + 1] + answer


def run(arm: str, length: str, start: Decoder, seed: int, steps: int, lr: float) -> dict[str, Any]:
    config = OnlineConfig(
        stage=arm, steps=steps, prompts=32, group=4, rounds=1, updates=2, max_tokens=48, objective=ARMS[arm], optim=OptimConfig("adamw", lr=lr),
        schedule=Schedule("constant", warmup=0.0), samples_shown=0, evaluations=0, seed=seed)
    loop = OnlineLoop(copy.deepcopy(start), tokenizer(), TASK, config, rewards=reward_set(["correct", "format", LENGTH[length]], TASK))
    began = time.process_time()
    tables = [table for _, table in loop.run().metrics]
    curves = {name: [t[f"reward/{name}/mean"] for t in tables] for name in SHOWN}
    return {"arm": arm, "length": length, "seed": seed, "CPU s": round(time.process_time() - began, 1),
            "auc": {name: round(area(c), 4) for name, c in curves.items()}, "first": {name: round(c[0], 3) for name, c in curves.items()},
            "last": {name: round(area(c[-5:]), 4) for name, c in curves.items()}, "tokens": round(area([t["length/mean"] for t in tables[-5:]]), 1),
            "curves": {name: [round(v, 4) for v in c] for name, c in curves.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--warm", type=int, default=500)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    chosen = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in range(chosen.seeds):
        seed_everything(seed)
        start = warmed(TASK, write, chosen.warm, seed, spec())
        for length in LENGTH:
            for arm in ARMS:
                runs.append(run(arm, length, start, seed, chosen.steps, chosen.lr))
                print({k: v for k, v in runs[-1].items() if k != "curves"}, flush=True)
    table = {f"{arm}, {length} length": {f"{what} {name}": spread([r[what][name] for r in runs if (r["arm"], r["length"]) == (arm, length)])
                                         for what in ("auc", "last") for name in SHOWN} for length in LENGTH for arm in ARMS}
    print(json.dumps(table, indent=1))
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"experiment": "gdpo_three", "created": time.strftime("%Y-%m-%d"), "machine": machine_card(), "steps": chosen.steps, "lr": chosen.lr,
                  "seeds": chosen.seeds, "summary": table, "runs": runs}
        chosen.json.write_text(json.dumps(result, separators=(",", ":")).replace('{"arm"', '\n{"arm"') + "\n", encoding="utf-8")
    if chosen.figure:
        panels = {name: {f"{arm}, {length}": [r["curves"][name] for r in runs if (r["arm"], r["length"]) == (arm, length)]
                         for length in LENGTH for arm in ARMS} for name in SHOWN}
        figure.write(chosen.figure, f"Sampled rate of each component, mean and range of {chosen.seeds} seeds, lr {chosen.lr:g}", panels)


if __name__ == "__main__":
    main()
