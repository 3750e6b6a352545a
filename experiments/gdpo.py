"""GDPO against GRPO where two rewards differ in scale, and where they differ only in rarity (arXiv 2601.05242).

    python experiments/gdpo.py --json experiments/results/gdpo.json --figure experiments/results/gdpo.svg

Two set-ups of one task, mini-ToolRL (`pellucid.tasks.toolrl`): call a tool, with a thought before the call.

    scale    correctness in {-3, -1, 1, 3} and format in {0, 1}
    rarity   call (the whole call is right) and format, both in {0, 1}; at the start one is common, the other rare

Arms, all with weights 1 and 1, the same policy, problems, learning rate, clip and number of steps, without KL term:

    GRPO                  the sum of the rewards, normalised in its group
    GRPO without std      centred in its group only
    GRPO, rescaled        every reward mapped to [0, 1] first: the control that tells scales from decoupling.
                          In the set-up `rarity` the rewards are in [0, 1] already, so this arm IS GRPO and is not run twice
    GRPO, batch norm      GRPO's advantages normalised over the batch as GDPO's are: the control for the size of the step
    GDPO                  each reward normalised in its group, then added, then normalised over the batch

Fixed before the first run: five seeds; the area under the curve of the sampled rate of each component over all steps; the
first step at which the mean of five steps reaches 0.9 (and 0.5 for format). The warm start is 5 % thoughts and 60 % calls
with one wrong field, so that format starts rare and about four calls in ten are right.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import figure
from tiny_policies import area, spec, spread, steps_to, tokenizer, warmed

from pellucid.align.objective_config import ObjectiveConfig
from pellucid.align.online import OnlineConfig, OnlineLoop
from pellucid.nn import Decoder
from pellucid.optim import OptimConfig, Schedule
from pellucid.runtime import machine_card, seed_everything
from pellucid.tasks import Problem, ToolRL

CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "sequence-mean"}
ARMS: dict[str, ObjectiveConfig] = {
    "GRPO": ObjectiveConfig(**CLIP),
    "GRPO without std": ObjectiveConfig(scale="none", **CLIP),
    "GRPO, rescaled": ObjectiveConfig(**CLIP),
    "GRPO, batch norm": ObjectiveConfig(whiten="sequence", **CLIP),
    "GDPO": ObjectiveConfig(advantage="gdpo", whiten="sequence", **CLIP),
}
SETUPS = {"scale": ("correctness", "format"), "rarity": ("call", "format")}
THRESHOLDS = {"call": (0.9,), "format": (0.5, 0.9)}


class TwoRewards(ToolRL):
    """Mini-ToolRL with `call` (the whole call is right, 0 or 1) beside its own components; rescaled: all of them in [0, 1]."""

    def __init__(self, rescaled: bool = False):
        super().__init__()
        self.rescaled = rescaled

    def grade(self, problem: Problem, text: str) -> dict[str, float]:
        scores = super().grade(problem, text)
        scores["call"] = float(scores["correctness"] == 3.0)
        if self.rescaled:
            scores["correctness"] = (scores["correctness"] + 3) / 6
        return scores


def run(setup: str, arm: str, start: Decoder, seed: int, steps: int, lr: float) -> dict[str, Any]:
    """One run: the curve of every component, and what tells how large the steps were."""
    config = OnlineConfig(
        stage=arm, steps=steps, prompts=32, group=4, rounds=1, updates=2, max_tokens=20, objective=ARMS[arm],
        weights=dict.fromkeys(SETUPS[setup], 1.0), optim=OptimConfig("adamw", lr=lr), schedule=Schedule("constant", warmup=0.0),
        samples_shown=0, evaluations=0, seed=seed)
    loop = OnlineLoop(copy.deepcopy(start), tokenizer(), TwoRewards(arm == "GRPO, rescaled"), config)
    began = time.perf_counter()
    tables = [table for _, table in loop.run().metrics]
    curves = {name: [t[f"reward/{name}/mean"] for t in tables] for name in THRESHOLDS}
    return {"setup": setup, "arm": arm, "seed": seed, "lr": lr, "seconds": round(time.perf_counter() - began, 1),
            "auc": {name: round(area(c), 4) for name, c in curves.items()},
            "steps_to": {f"{name} {t}": steps_to(curves[name], t) for name, ts in THRESHOLDS.items() for t in ts},
            "last": {name: round(area(c[-5:]), 4) for name, c in curves.items()},
            "advantage_std": round(area([t["advantage/std"] for t in tables]), 3),
            "grad_norm": round(area([t["grad_norm"] for t in tables if "grad_norm" in t]), 3),
            "curves": {name: [round(v, 4) for v in c] for name, c in curves.items()}}


def start_of(seed: int) -> Decoder:
    """The policy that every arm of this seed starts from."""
    seed_everything(seed)
    task = ToolRL()
    return warmed(task, task.warm_start, 400, seed, spec())


def summary(runs: list[dict[str, Any]], setup: str, lr: float) -> dict[str, Any]:
    """Per arm: mean and spread over seeds, and in how many seeds it is above GRPO and above the rescaled control."""
    chosen = [r for r in runs if r["setup"] == setup and r["lr"] == lr]
    by = {(r["arm"], r["seed"]): r for r in chosen}
    seeds = sorted({r["seed"] for r in chosen})
    table: dict[str, Any] = {}
    for arm in dict.fromkeys(r["arm"] for r in chosen):
        mine = [by[arm, s] for s in seeds]
        row: dict[str, Any] = {f"auc {name}": spread([r["auc"][name] for r in mine]) for name in THRESHOLDS}
        row |= {f"steps to {key}": [r["steps_to"][key] for r in mine] for key in mine[0]["steps_to"]}
        row |= {f"last {name}": spread([r["last"][name] for r in mine]) for name in THRESHOLDS}
        for other in ("GRPO", "GRPO, rescaled"):
            if other != arm and (other, seeds[0]) in by:
                row |= {f"seeds above {other}, auc {name}": sum(r["auc"][name] > by[other, r["seed"]]["auc"][name] for r in mine)
                        for name in THRESHOLDS}
        table[arm] = row | {"advantage std": round(area([r["advantage_std"] for r in mine]), 3),
                            "grad norm": round(area([r["grad_norm"] for r in mine]), 3)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    chosen = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in range(chosen.seeds):
        start = start_of(seed)
        for lr in chosen.lrs:
            for setup in SETUPS:
                for arm in ARMS:
                    if setup == "rarity" and arm == "GRPO, rescaled":
                        continue
                    runs.append(run(setup, arm, start, seed, chosen.steps, lr))
                    print({k: v for k, v in runs[-1].items() if k != "curves"}, flush=True)
    result = {"experiment": "gdpo", "created": time.strftime("%Y-%m-%d"), "machine": machine_card(), "steps": chosen.steps,
              "seeds": chosen.seeds, "prompts": 32, "group": 4, "updates": 2,
              "summary": {f"{setup}, lr {lr:g}": summary(runs, setup, lr) for setup in SETUPS for lr in chosen.lrs}, "runs": runs}
    print(json.dumps(result["summary"], indent=1))
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(result, separators=(",", ":")).replace('{"setup"', '\n{"setup"') + "\n", encoding="utf-8")
    if chosen.figure:
        shown = chosen.lrs[0]
        panels = {f"{setup}: {name}": {arm: curves for arm in ARMS if (curves := [
            r["curves"][name] for r in runs if r["setup"] == setup and r["arm"] == arm and r["lr"] == shown])}
            for setup in SETUPS for name in THRESHOLDS}
        figure.write(chosen.figure, f"Sampled rate of each component, mean and range of {chosen.seeds} seeds, lr {shown:g}", panels)


if __name__ == "__main__":
    main()
