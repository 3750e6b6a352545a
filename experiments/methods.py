"""SFT, DPO, PPO, GRPO, DAPO and GSPO on one task, at equal numbers of samples and at equal time.

    python experiments/methods.py --tune --json experiments/results/methods.json --figure experiments/results/methods.svg

The task is mini-ToolRL (`pellucid.tasks.toolrl`): a thought, then a call with three right fields. All methods start from the
same policy (of what it was shown 30 % has a thought and 60 % a wrong field, so about one answer in eight is right) and learn
from nothing but their own samples and the grader's verdict on them, 32 problems x 4 samples at a time:

    SFT           samples once, keeps the right ones, learns them (rejection sampling)
    DPO           samples once, a right and a wrong answer of the same problem make a pair
    PPO, GRPO, DAPO, GSPO   the presets, sampling afresh in every step, two updates each; DAPO samples again to replace groups without
                  difference, and these samples count

SFT on demonstrations is shown beside them: it is told the right answers, as many as the others may sample.
Measured: accuracy of one sample at temperature 1 on each of 400 held-out problems (greedily the start is all or nothing), after so many
samples and so many CPU seconds of this process (one thread; measurements not counted).

Every method has a learning rate of its own. --tune finds it: each of three rates on two seeds that the report does not use,
and further rates by factors of two while the best one is at an end of the grid; chosen by the mean accuracy over a run's twelve
measurements, of the worse seed (a rate that gets there and falls again, or only with luck, is not the best). Without --tune the rates of
`TUNED` are taken, which that search gave.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import figure
from tiny_policies import Kept, spec, tokenizer, warmed

from pellucid.align.answers import Answer
from pellucid.align.offline import OfflineConfig, Pair, PreferenceLoop
from pellucid.align.online import OnlineConfig, OnlineLoop
from pellucid.align.preference_config import PreferenceConfig
from pellucid.align.recipes import recipe
from pellucid.align.rollout import Group, Rollouts
from pellucid.align.rows import pack_completions
from pellucid.data.packing import pack_samples
from pellucid.nn import Decoder
from pellucid.optim import OptimConfig, Schedule
from pellucid.runtime import machine_card, seed_everything
from pellucid.tasks import ToolRL, evaluate
from pellucid.train import Loop, LoopConfig

TASK = ToolRL()
PROMPTS, GROUP, MAX_TOKENS = 32, 4, 20
ONLINE = {"PPO": "ppo", "GRPO": "grpo", "DAPO": "dapo", "GSPO": "gspo"}
CONSTANT = Schedule("constant", warmup=0.0)
RATES: dict[str, tuple[float, ...]] = {name: (7e-4, 1.4e-3, 2.8e-3) for name in ("SFT on own right answers", "SFT on demonstrations", *ONLINE)} | {
    name: (1e-4, 2e-4, 4e-4) for name in ("DPO on own pairs", "DPO with an SFT term")}
TUNED: dict[str, float] = {"SFT on own right answers": 5.6e-3, "SFT on demonstrations": 2.8e-3, "PPO": 2.8e-3, "GRPO": 2.8e-3, "DAPO": 1.4e-3,
                           "GSPO": 1.4e-3, "DPO on own pairs": 4e-4, "DPO with an SFT term": 3.2e-3}
TUNING_SEEDS = (100, 101)


class Clock:
    """Points (samples, CPU seconds, accuracy) of one run; measuring is not counted as time."""

    def __init__(self, model: Decoder):
        self.rollouts = Rollouts(model, tokenizer(), TASK, max_tokens=MAX_TOKENS)
        self.points: list[tuple[int, float, float]] = []
        self.spent, self.since, self.samples = 0.0, time.process_time(), 0

    def measure(self) -> tuple[str, float, dict[str, Any]]:
        self.spent += time.process_time() - self.since
        value = evaluate(TASK, self.rollouts.for_evaluation(0), 400, 1, 1, temperature=1.0).pass_at_1
        self.points.append((self.samples, round(self.spent, 2), value))
        self.since = time.process_time()
        return "pass@1", value, {}


def online(name: str, start: Decoder, steps: int, seed: int, lr: float) -> Clock:
    model = copy.deepcopy(start)
    config = OnlineConfig(stage=name, steps=steps, prompts=PROMPTS, group=GROUP, rounds=2 if name == "DAPO" else 1, updates=2,
                          max_tokens=MAX_TOKENS, objective=recipe(ONLINE[name]), weights={"correct": 1.0},
                          optim=OptimConfig("adamw", lr=lr), schedule=CONSTANT, samples_shown=0, evaluations=12, seed=seed)
    clock = Clock(model)
    loop = OnlineLoop(model, tokenizer(), TASK, config, evaluate=clock.measure)
    clock.measure()
    count = loop._one_step

    def step() -> None:
        count()
        clock.samples += int(loop.history.metrics[-1][1]["groups/sampled"]) * GROUP

    loop._one_step = step  # type: ignore[method-assign]
    loop.run()
    return clock


def sampled(clock: Clock, steps: int, seed: int) -> list[Group]:
    """As many samples as the online methods draw, all from the starting policy."""
    rng, groups = random.Random(seed), []
    for _ in range(steps):
        problems = [TASK.sample(rng, "train") for _ in range(PROMPTS)]
        groups += clock.rollouts.groups(problems, GROUP, 1.0, rng.getrandbits(62))
    clock.samples = len(groups) * GROUP
    return groups


def sft(start: Decoder, steps: int, seed: int, lr: float) -> Clock:
    model = copy.deepcopy(start)
    clock = Clock(model)
    clock.measure()
    right = [s for g in sampled(clock, steps, seed) for s, r in zip(g.samples, g.rewards) if r["correct"] == 1.0]
    return supervised(model, clock, pack_completions(right, 128), steps, seed, lr)


def demonstrations(start: Decoder, steps: int, seed: int, lr: float) -> Clock:
    model, rng = copy.deepcopy(start), random.Random(seed)
    clock = Clock(model)
    clock.measure()
    problems = [TASK.sample(rng, "train") for _ in range(steps * PROMPTS * GROUP)]
    made = [tokenizer().encode_chat([{"role": "user", "content": p.prompt}, {"role": "assistant", "content": TASK.demonstrate(p, rng)}])
            for p in problems]
    clock.samples = len(made)
    return supervised(model, clock, pack_samples(made, 128, pad_id=tokenizer().pad_id), steps, seed, lr)


def supervised(model: Decoder, clock: Clock, rows: Any, steps: int, seed: int, lr: float) -> Clock:
    Loop(model, rows, LoopConfig("sft", steps=2 * steps, rows=16, optim=OptimConfig("adamw", lr=lr), schedule=CONSTANT, evaluations=12,
                                 seed=seed), evaluate=clock.measure).run()
    return clock


def dpo(start: Decoder, steps: int, seed: int, lr: float, losses: tuple[str, ...] = ("sigmoid",)) -> Clock:
    model = copy.deepcopy(start)
    clock, pairs = Clock(model), []
    clock.measure()
    for g in sampled(clock, steps, seed):
        right, wrong = ([s for s, r in zip(g.samples, g.rewards) if (r["correct"] == 1.0) == good] for good in (True, False))
        pairs += [Pair(*(Answer(s.prompt, s.tokens) for s in both)) for both in zip(right, wrong)]
    PreferenceLoop(model, pairs, PreferenceConfig(dict.fromkeys(losses, 1.0)), OfflineConfig(steps=2 * steps, batch=32, optim=OptimConfig("adamw", lr=lr),
                                                                   schedule=CONSTANT, evaluations=12, seed=seed), evaluate=clock.measure).run()
    return clock


METHODS: dict[str, Callable[[Decoder, int, int, float], Clock]] = {
    "SFT on own right answers": sft, "DPO on own pairs": dpo,
    "DPO with an SFT term": lambda start, steps, seed, lr: dpo(start, steps, seed, lr, ("sigmoid", "sft")),
    **{name: (lambda start, steps, seed, lr, name=name: online(name, start, steps, seed, lr)) for name in ONLINE},  # type: ignore[misc]
    "SFT on demonstrations": demonstrations}


def at(points: list[list[float]], column: int, limit: float) -> float:
    """The last measurement within the limit of samples (0) or seconds (1)."""
    return ([p[2] for p in points if p[column] <= limit] or [points[0][2]])[-1]


@cache
def start_of(seed: int) -> Decoder:
    """The policy that every method of this seed starts from."""
    seed_everything(seed)
    return warmed(TASK, lambda p, rng: TASK.warm_start(p, rng, 0.3, 0.6), 400, seed, spec())


def run(name: str, seed: int, lr: float, steps: int) -> dict[str, Any]:
    start = start_of(seed)
    seed_everything(seed)  # whatever ran before
    points = METHODS[name](start, steps, seed, lr).points
    return {"method": name, "seed": seed, "lr": lr, "mean": round(sum(p[2] for p in points[1:]) / len(points[1:]), 4), "last": points[-1][2],
            "points": points}


def tuned(steps: int, kept: Kept) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Every method's best rate, and what was tried."""
    best: dict[str, float] = {}
    tried: list[dict[str, Any]] = []
    for name, rates in RATES.items():
        grid, score = list(rates), dict[float, float]()
        while name not in best:
            for lr in (rate for rate in grid if rate not in score):
                runs = [kept(run, name, seed, lr, steps) for seed in TUNING_SEEDS]
                score[lr] = min(r["mean"] for r in runs)
                tried += [{k: v for k, v in r.items() if k != "points"} for r in runs]
                print(*tried[-len(runs):], flush=True)
            top = max(score, key=score.__getitem__)
            if top == min(grid):
                grid.append(top / 2)
            elif top == max(grid):
                grid.append(top * 2)
            else:
                best[name] = top
    return best, tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--kept", type=Path, help="file of the runs that are done, to go on after a stop")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    chosen = parser.parse_args()
    kept = Kept(chosen.kept)
    rates, tried = tuned(chosen.steps, kept) if chosen.tune else (TUNED, [])
    print(rates, flush=True)
    runs: list[dict[str, Any]] = []
    for seed in range(chosen.seeds):
        for name in METHODS:
            runs.append(kept(run, name, seed, rates[name], chosen.steps))
            print(name, seed, runs[-1]["points"][0], runs[-1]["points"][-1], flush=True)
    samples = chosen.steps * PROMPTS * GROUP
    seconds = min(r["points"][-1][1] for r in runs if r["method"] in ONLINE)  # what every online method had at least
    table = {name: {"at the start": [r["points"][0][2] for r in mine], f"at {samples} samples": [at(r["points"], 0, samples) for r in mine],
                    f"at {seconds:.1f} CPU s": [at(r["points"], 1, seconds) for r in mine], "last": [r["points"][-1][2] for r in mine],
                    "samples": [r["points"][-1][0] for r in mine], "CPU s": [r["points"][-1][1] for r in mine]}
             for name in METHODS if (mine := [r for r in runs if r["method"] == name])}
    for name, row in table.items():
        print(f"{name:26s}", row)
    result = {"experiment": "methods", "created": time.strftime("%Y-%m-%d"), "machine": machine_card(), "steps": chosen.steps,
              "seeds": chosen.seeds, "rates": rates, "summary": table, "runs": runs, "tried": tried}
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(result, separators=(",", ":")).replace('{"method"', '\n{"method"') + "\n", encoding="utf-8")
    if chosen.figure:
        grid = [seconds * i / 24 for i in range(25)]
        by_time = {name: [[at(r["points"], 1, t) for t in grid] for r in runs if r["method"] == name] for name in METHODS}
        figure.write(chosen.figure, f"Sampled accuracy on held-out problems by CPU seconds, {chosen.seeds} seeds", {"accuracy": by_time}, "s", x_end=seconds)


if __name__ == "__main__":
    main()
