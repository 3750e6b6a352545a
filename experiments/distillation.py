"""Distillation against reinforcement learning against both, and on-policy distillation beside them.

    python experiments/distillation.py --json experiments/results/distillation.json --figure experiments/results/distillation.svg

Sums and differences of numbers of three digits, worked out digit by digit in a thought (`pellucid.tasks.arithmetic`). The teacher, a
policy of 3 layers of width 96, has learned from careful demonstrations only. The student, 2 layers of width 64, has learned the form and both
habits: seven in ten of the answers it was shown are "at a glance", three work out the steps. From there, four ways:

    traces          the teacher answers 400 problems 4 times, what the grader calls right is learned (400 steps)
    RL              GRPO on the grader's verdict alone (60 steps)
    traces, RL      300 steps on the traces, then 40 steps of GRPO
    on-policy       the student's own samples, reverse KL to the teacher at every token (60 steps)

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
from pathlib import Path
from typing import Any

import figure
from tiny_policies import spec, tokenizer, warmed

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
MAX_TOKENS, LR = 72, 7e-4
CONSTANT = Schedule("constant", warmup=0.0)


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
        self.spent, self.since, self.length = 0.0, time.process_time(), 0.0

    def measure(self) -> tuple[str, float, dict[str, Any]]:
        self.spent += time.process_time() - self.since
        scores = evaluate(TASK, self.rollouts.for_evaluation(0), 200, 1, 1)
        self.points.append((round(self.spent, 2), scores.pass_at_1))
        self.length, self.since = scores.mean_length, time.process_time()
        return "pass@1", scores.pass_at_1, {}


def on_traces(model: Decoder, teacher: Decoder, clock: Clock, steps: int, seed: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "traces.jsonl"
        made = collect(LocalTeacher(teacher, tokenizer(), TASK, max_tokens=MAX_TOKENS), TASK, file,
                       TraceConfig(problems=400, samples=4, keep=4, temperature=0.8, batch=100, seed=seed))
        rows = packing.pack_samples([tokenizer().encode_chat(c.messages) for c in chats.read_chats(file)], 192, pad_id=tokenizer().pad_id)
    Loop(model, rows, LoopConfig("traces", steps=steps, rows=16, optim=OptimConfig("adamw", lr=LR), schedule=CONSTANT,
                                 evaluations=6, seed=seed), evaluate=clock.measure).run()
    return made.tokens


def by_rewards(model: Decoder, clock: Clock, steps: int, seed: int) -> int:
    loop = OnlineLoop(model, tokenizer(), TASK, OnlineConfig(
        stage="RL", steps=steps, prompts=32, group=4, rounds=1, updates=2, max_tokens=MAX_TOKENS, objective=recipe("pellucid-grow"),
        weights={"correct": 1.0, "format": 0.2}, optim=OptimConfig("adamw", lr=LR), schedule=CONSTANT, samples_shown=0, evaluations=6,
        seed=seed), evaluate=clock.measure)
    return loop.run().sampled


def on_policy(model: Decoder, teacher: Decoder, clock: Clock, steps: int, seed: int) -> int:
    loop = DistillLoop(model, tokenizer(), teacher, tokenizer(), DistillConfig(
        steps=steps, prompts=128, max_tokens=MAX_TOKENS, optim=OptimConfig("adamw", lr=LR), schedule=CONSTANT, evaluations=6, seed=seed),
        task=TASK, evaluate=clock.measure)
    return loop.run().sampled


def run(way: str, start: Decoder, teacher: Decoder, seed: int) -> dict[str, Any]:
    model = copy.deepcopy(start)
    clock = Clock(model)
    clock.measure()
    before = clock.length
    sampled = 0
    if way == "traces":
        sampled = on_traces(model, teacher, clock, 400, seed)
    elif way == "RL":
        sampled = by_rewards(model, clock, 60, seed)
    elif way == "traces, RL":
        sampled = on_traces(model, teacher, clock, 300, seed) + by_rewards(model, clock, 40, seed)
    else:
        sampled = on_policy(model, teacher, clock, 60, seed)
    return {"way": way, "seed": seed, "before": clock.points[0][1], "after": clock.points[-1][1], "cpu_seconds": clock.points[-1][0],
            "tokens_sampled": sampled, "length_before": round(before, 1), "length_after": round(clock.length, 1), "points": clock.points}


WAYS = ("traces", "RL", "traces, RL", "on-policy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    chosen = parser.parse_args()
    runs: list[dict[str, Any]] = []
    teachers = []
    for seed in range(chosen.seeds):
        seed_everything(seed)
        teacher = warmed(TASK, TASK.demonstrate, 700, seed, spec(96, 3, 192))
        teachers.append(evaluate(TASK, Rollouts(teacher, tokenizer(), TASK, max_tokens=MAX_TOKENS).for_evaluation(0), 200, 1, 1).pass_at_1)
        print(f"seed {seed}: teacher {teachers[-1]:.1%}", flush=True)
        start = warmed(TASK, both_habits, 300, seed, spec(64, 2, 192))
        for way in WAYS:
            runs.append(run(way, start, teacher, seed))
            print({k: v for k, v in runs[-1].items() if k != "points"}, flush=True)
        keep(runs, teachers, chosen)  # what is measured stays, should the next seed be stopped


def keep(runs: list[dict[str, Any]], teachers: list[float], chosen: argparse.Namespace) -> None:
    result = {"experiment": "distillation", "created": time.strftime("%Y-%m-%d"), "machine": machine_card(), "seeds": len(teachers),
              "teachers": teachers, "runs": runs}
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(result, separators=(",", ":")).replace('{"way"', '\n{"way"') + "\n", encoding="utf-8")
    if chosen.figure:
        end = max(r["cpu_seconds"] for r in runs)
        grid = [end * i / 30 for i in range(31)]
        curves = {way: [[([v for t, v in r["points"] if t <= at] or [r["before"]])[-1] for at in grid] for r in runs if r["way"] == way]
                  for way in WAYS}
        figure.write(chosen.figure, f"Greedy accuracy on held-out problems by CPU seconds, {len(teachers)} seeds", {"accuracy": curves}, "s",
                     x_end=round(end, 1))


if __name__ == "__main__":
    main()
