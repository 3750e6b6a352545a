"""Distillation against reinforcement learning against both, and on-policy distillation beside them.

    python experiments/distillation.py --json experiments/results/distillation.json --figure experiments/results/distillation.svg

Sums and differences of numbers of three digits, worked out digit by digit in a thought (`pellucid.tasks.arithmetic`). The teacher, a
policy of 3 layers of width 96, has learned from careful demonstrations only. The student, 2 layers of width 64, has learned the form and both
habits: seven in ten of the answers it was shown are "at a glance", three work out the steps. From there, five ways:

    traces               the teacher answers 400 problems 4 times, what the grader calls right is learned (600 steps)
    RL                   GRPO on the grader's verdict alone (100 steps)
    traces, RL           300 steps on the traces, then 80 steps of GRPO
    on-policy            the student's own samples, reverse KL to the teacher at every token (60 steps)
    traces, on-policy    300 steps on the traces, then 30 steps of that

all at a constant learning rate of 7e-4, and GRPO at a third and a tenth of it, too (`WAYS`).
Measured: greedy accuracy on 200 held-out problems, tokens an answer, tokens sampled (by teacher and student) and CPU seconds
(one thread; measuring not counted; the teacher's sampling counted, its training not).
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import figure
from tiny_policies import Kept, spec, tokenizer, warmed

from pellucid.align.distill import DistillConfig, DistillLoop
from pellucid.align.online import OnlineConfig, OnlineLoop
from pellucid.align.recipes import recipe
from pellucid.align.rollout import Rollouts
from pellucid.align.teachers import LocalTeacher
from pellucid.align.traces import TraceConfig, collect
from pellucid.data import chats, packing
from pellucid.nn import Decoder
from pellucid.optim import OptimConfig, Schedule
from pellucid.runtime import machine_card, seed_everything
from pellucid.tasks import Problem, evaluate, make, parse_completion
from pellucid.train import Loop, LoopConfig

TASK = make("arithmetic", min_digits=3, max_digits=3, operations="+-")
MAX_TOKENS = 72
CONSTANT = Schedule("constant", warmup=0.0)
TRACES = ("traces", 300, 7e-4)
WAYS: dict[str, tuple[tuple[str, int], tuple[float, ...]]] = {  # last stage, steps, and the rates of it
    "traces": (("traces", 600), (7e-4,)), "RL": (("RL", 100), (7e-4, 2.3e-4, 7e-5)), "traces, RL": (("RL", 80), (7e-4, 2.3e-4, 7e-5)),
    "on-policy": (("on-policy", 60), (7e-4,)), "traces, on-policy": (("on-policy", 30), (7e-4,))}


def both_habits(problem: Problem, rng: random.Random) -> str:
    shown = TASK.demonstrate(problem, rng)
    if rng.random() < 0.3:
        return shown
    parsed = parse_completion(shown)
    assert parsed is not None
    return f"<think>\nAt a glance.\n</think>\n\n{parsed.answer}"


class Clock:
    """Points (CPU seconds, accuracy); measuring is not counted."""

    def __init__(self, model: Decoder):
        self.rollouts = Rollouts(model, tokenizer(), TASK, max_tokens=MAX_TOKENS)
        self.points: list[tuple[float, float]] = []
        self.spent, self.since, self.lengths = 0.0, time.process_time(), list[float]()

    def measure(self) -> tuple[str, float, dict[str, Any]]:
        self.spent += time.process_time() - self.since
        scores = evaluate(TASK, self.rollouts.for_evaluation(0), 200, 1, 1)
        self.points.append((round(self.spent, 2), scores.pass_at_1))
        self.lengths.append(round(scores.mean_length, 1))
        self.since = time.process_time()
        return "pass@1", scores.pass_at_1, {}


def on_traces(model: Decoder, clock: Clock, steps: int, lr: float, seed: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "traces.jsonl"
        made = collect(LocalTeacher(teacher_of(seed)[0], tokenizer(), TASK, max_tokens=MAX_TOKENS), TASK, file,
                       TraceConfig(problems=400, samples=4, keep=4, temperature=0.8, batch=100, seed=seed))
        rows = packing.pack_samples([tokenizer().encode_chat(c.messages) for c in chats.read_chats(file)], 192, pad_id=tokenizer().pad_id)
    Loop(model, rows, LoopConfig("traces", steps=steps, rows=16, optim=OptimConfig("adamw", lr=lr), schedule=CONSTANT,
                                 evaluations=10, seed=seed), evaluate=clock.measure).run()
    return made.tokens


def by_rewards(model: Decoder, clock: Clock, steps: int, lr: float, seed: int) -> int:
    loop = OnlineLoop(model, tokenizer(), TASK, OnlineConfig(
        stage="RL", steps=steps, prompts=32, group=4, rounds=1, updates=2, max_tokens=MAX_TOKENS, objective=recipe("pellucid-grow"),
        weights={"correct": 1.0, "format": 0.2}, optim=OptimConfig("adamw", lr=lr), schedule=CONSTANT, samples_shown=0, evaluations=10,
        seed=seed), evaluate=clock.measure)
    return loop.run().sampled


def on_policy(model: Decoder, clock: Clock, steps: int, lr: float, seed: int) -> int:
    loop = DistillLoop(model, tokenizer(), teacher_of(seed)[0], tokenizer(), DistillConfig(
        steps=steps, prompts=128, max_tokens=MAX_TOKENS, optim=OptimConfig("adamw", lr=lr), schedule=CONSTANT, evaluations=10, seed=seed),
        task=TASK, evaluate=clock.measure)
    return loop.run().sampled


STAGES = {"traces": on_traces, "RL": by_rewards, "on-policy": on_policy}


@cache
def teacher_of(seed: int) -> tuple[Decoder, float]:
    """The teacher, and its accuracy."""
    seed_everything(seed)
    teacher = warmed(TASK, TASK.demonstrate, 700, seed, spec(96, 3, 192))
    return teacher, evaluate(TASK, Rollouts(teacher, tokenizer(), TASK, max_tokens=MAX_TOKENS).for_evaluation(0), 200, 1, 1).pass_at_1


@cache
def student_of(seed: int) -> Decoder:
    seed_everything(seed)
    return warmed(TASK, both_habits, 300, seed, spec(64, 2, 192))


@cache
def traced(seed: int) -> tuple[Decoder, Clock, int]:
    """The student after the traces that RL or the teacher's corrections follow, what was measured on the way, and the tokens sampled."""
    return through([TRACES], student_of(seed), None, seed)


def through(stages: list[tuple[str, int, float]], start: Decoder, before: Clock | None, seed: int) -> tuple[Decoder, Clock, int]:
    model = copy.deepcopy(start)
    clock, tokens = Clock(model), 0
    if before is None:
        clock.measure()
    else:
        clock.points, clock.lengths, clock.spent = list(before.points), list(before.lengths), before.spent
    for name, steps, lr in stages:
        seed_everything(seed)
        tokens += STAGES[name](model, clock, steps, lr, seed)
    return model, clock, tokens


def run(way: str, seed: int, lr: float) -> dict[str, Any]:
    teacher_of(seed)  # its training is not counted
    (name, steps), _ = WAYS[way]
    start, before, first = traced(seed) if way.startswith("traces, ") else (student_of(seed), None, 0)
    _, clock, tokens = through([(name, steps, lr)], start, before, seed)
    accuracy = [value for _, value in clock.points]
    return {"way": way, "seed": seed, "lr": lr, "teacher": teacher_of(seed)[1], "before": accuracy[0],
            "after traces": before.points[-1][1] if before else None, "best": max(accuracy), "after": accuracy[-1],
            "cpu_seconds": clock.points[-1][0], "tokens_sampled": first + tokens, "length_before": clock.lengths[0], "length_after": clock.lengths[-1],
            "points": clock.points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--kept", type=Path, help="file of the runs that are done, to go on after a stop")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    chosen = parser.parse_args()
    kept, runs = Kept(chosen.kept), []
    for seed in chosen.seeds:
        for way, (_, rates) in WAYS.items():
            for lr in rates:
                runs.append(kept(run, way, seed, lr))
                print({k: v for k, v in runs[-1].items() if k != "points"}, flush=True)
        keep(runs, chosen)  # what is measured stays, should the next seed be stopped


def keep(runs: list[dict[str, Any]], chosen: argparse.Namespace) -> None:
    seeds = sorted({r["seed"] for r in runs})
    by = {f"{way}, {lr:g}": [r for r in runs if (r["way"], r["lr"]) == (way, lr)] for way, (_, rates) in WAYS.items() for lr in rates}
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"experiment": "distillation", "created": time.strftime("%Y-%m-%d"), "machine": machine_card(), "seeds": seeds,
                  "summary": {name: {what: [r[what] for r in mine] for what in ("after traces", "best", "after", "cpu_seconds", "length_after")}
                              for name, mine in by.items()}, "runs": runs}
        chosen.json.write_text(json.dumps(result, separators=(",", ":")).replace('{"way"', '\n{"way"') + "\n", encoding="utf-8")
    if chosen.figure:
        end = max(r["cpu_seconds"] for r in runs)
        grid = [end * i / 40 for i in range(41)]

        def at(points: list[list[float]], second: float) -> float:
            return ([v for t, v in points if t <= second] or [points[0][1]])[-1]

        panels = {way: {f"{lr:g}": [[at(r["points"], second) for second in grid] for r in by[f"{way}, {lr:g}"]] for lr in rates}
                  for way, (_, rates) in WAYS.items()}
        figure.write(chosen.figure, f"Greedy accuracy on held-out problems by CPU seconds, for each learning rate of the last stage, {len(seeds)} seeds", panels, "s", x_end=round(end, 1))


if __name__ == "__main__":
    main()
