"""GDPO with three rewards and a length that counts only for right answers: the setting of arXiv 2601.05242, section 3.3, in the small.

    python experiments/gdpo_three.py --json experiments/results/gdpo_three.json --figure experiments/results/gdpo_three.svg

The task is `brevity` (`pellucid.tasks.brevity`): a sum, with a limit on the characters of the thought. Rewards, weight 1 each:

    correct   the answer is right                               {0, 1}
    format    a thought between <think> and </think>, then a number   {0, 1}
    length    the thought keeps to the limit                    [0, 1]; plain, or CONDITIONED: 0 where the answer is wrong

The same as one command (any model folder):  pellucid align gdpo MODEL --task brevity --reward "correct" "format" "length@correct>=1"

Arms: GRPO, GRPO without std, GDPO, each with the plain and with the conditioned length; same policy, problems, learning rate, clip and
steps, no KL term. All rewards lie in [0, 1], so that rescaling them is GRPO itself. The same again with a length of weight 0.25
(--lengths: the paper's question whether a weight does what one expects of it). The start is warmed up on demonstrations of
which 30 % have no thought, 50 % think the long way whatever the limit, and 40 % give a wrong number.
Fixed before the first run: five seeds; the area under the curve of each component over the steps (`length` before its condition), the
first step at which the mean of five steps reaches a threshold (`THRESHOLDS`), and the mean of the last five steps; above all of
`short`: right AND within the limit, which is what is wanted.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import figure
from tiny_policies import Kept, area, spec, spread, steps_to, tokenizer, warmed

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
LENGTH = {"plain": "length", "conditioned": "length@correct>=1", "plain, weight 0.25": "length*0.25",
          "conditioned, weight 0.25": "length*0.25@correct>=1"}
THRESHOLDS = {"correct": 0.5, "format": 0.95, "length_itself": 0.95, "short": 0.5}


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


@cache
def start_of(seed: int, steps: int) -> Decoder:
    """The policy that every arm of this seed starts from."""
    seed_everything(seed)
    return warmed(TASK, write, steps, seed, spec())


def run(arm: str, length: str, seed: int, steps: int, lr: float, warm: int) -> dict[str, Any]:
    config = OnlineConfig(
        stage=arm, steps=steps, prompts=32, group=4, rounds=1, updates=2, max_tokens=48, objective=ARMS[arm], optim=OptimConfig("adamw", lr=lr),
        schedule=Schedule("constant", warmup=0.0), samples_shown=0, evaluations=0, seed=seed)
    start = start_of(seed, warm)
    seed_everything(seed)  # whatever ran before
    loop = OnlineLoop(copy.deepcopy(start), tokenizer(), TASK, config, rewards=reward_set(["correct", "format", LENGTH[length]], TASK))
    began = time.process_time()
    tables = [table for _, table in loop.run().metrics]
    curves = {name: [t[f"reward/{name}/mean"] for t in tables] for name in THRESHOLDS}
    return {"arm": arm, "length": length, "seed": seed, "CPU s": round(time.process_time() - began, 1),
            "auc": {name: round(area(c), 4) for name, c in curves.items()}, "first": {name: round(c[0], 3) for name, c in curves.items()},
            "steps_to": {name: steps_to(curves[name], threshold) for name, threshold in THRESHOLDS.items()},
            "last": {name: round(area(c[-5:]), 4) for name, c in curves.items()}, "tokens": round(area([t["length/mean"] for t in tables[-5:]]), 1),
            "curves": {name: [round(v, 4) for v in c] for name, c in curves.items()}}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per length and arm: mean and spread over seeds, by seed the first step at a threshold, and in how many seeds it is above GRPO."""
    by = {(r["length"], r["arm"], r["seed"]): r for r in runs}
    table: dict[str, Any] = {}
    for length, arm in dict.fromkeys((r["length"], r["arm"]) for r in runs):
        mine = [r for r in runs if (r["length"], r["arm"]) == (length, arm)]
        row: dict[str, Any] = {f"{what} {name}": spread([r[what][name] for r in mine]) for what in ("auc", "last") for name in THRESHOLDS}
        row |= {f"steps to {name} {threshold}": [r["steps_to"][name] for r in mine] for name, threshold in THRESHOLDS.items()}
        if arm != "GRPO":
            row |= {f"seeds above GRPO, auc {name}": sum(r["auc"][name] > by[length, "GRPO", r["seed"]]["auc"][name] for r in mine) for name in THRESHOLDS}
        table[f"{length}: {arm}"] = row | {"tokens": spread([r["tokens"] for r in mine])}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--lengths", nargs="+", choices=list(LENGTH), default=["plain", "conditioned"])
    parser.add_argument("--warm", type=int, default=500)
    parser.add_argument("--kept", type=Path, help="file of the runs that are done, to go on after a stop")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    chosen = parser.parse_args()
    kept, runs = Kept(chosen.kept), []
    for seed in range(chosen.seeds):
        for length in chosen.lengths:
            for arm in ARMS:
                runs.append(kept(run, arm, length, seed, chosen.steps, chosen.lr, chosen.warm))
                print({k: v for k, v in runs[-1].items() if k != "curves"}, flush=True)
    table = summary(runs)
    print(json.dumps(table, indent=1))
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"experiment": "gdpo_three", "created": time.strftime("%Y-%m-%d"), "machine": machine_card(), "steps": chosen.steps, "lr": chosen.lr,
                  "seeds": chosen.seeds, "summary": table, "runs": runs}
        chosen.json.write_text(json.dumps(result, separators=(",", ":")).replace('{"arm"', '\n{"arm"') + "\n", encoding="utf-8")
    if chosen.figure:
        panels = {name: {f"{arm}, {length}": [r["curves"][name] for r in runs if (r["arm"], r["length"]) == (arm, length)]
                         for length in chosen.lengths[:2] for arm in ARMS} for name in THRESHOLDS}
        figure.write(chosen.figure, f"Sampled rate of each component, mean and range of {chosen.seeds} seeds, lr {chosen.lr:g}", panels)


if __name__ == "__main__":
    main()
