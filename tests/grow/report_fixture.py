"""A report as a run of the default dial writes it, made by hand: the numbers are invented, the problems real."""

from __future__ import annotations

import math
import random
from typing import Any

from pellucid import tasks
from pellucid.grow import recipe

MIB = 2**20
JUNK = "The [class]`str of the given of the file is the returned by the (see also the module is not in the of the value"


def report() -> dict[str, Any]:
    """All keys of report.json."""
    rng = random.Random(3)
    return {
        "schema": 1,
        "name": "grow",
        "created": "2026-11-23T19:40:12+00:00",
        "command": "pellucid grow --minutes 8 --out runs/grow --seed 0",
        "seed": 0,
        "minutes_asked": 8.0,
        "minutes_spent": 7.92,
        "machine": {
            "cpu": "AMD EPYC 9B14",
            "cores": 2,
            "system": "Linux",
            "python": "3.12.4",
            "torch": "2.11.0+cpu",
            "gpu": None,
            "pellucid": "0.1.0",
        },
        "plan": plan(),
        "stages": stages(rng),
        "baselines": {"gzip -9": 2.914, "xz": 2.702, "byte 5-gram": 2.438},
        "prompts": prompts(rng),
        "groups": [group(rng, 4), group(rng, 9)],
        "evaluation": evaluation(),
        "tools": transcript(),
        "model": "model",
    }


def plan() -> dict[str, Any]:
    choices = [
        ("device", "cpu", "no CUDA GPU is visible"),
        ("threads", "2", "physical cores"),
        ("dtype", "bfloat16", "measured at width 128: 221 GFLOP/s in bfloat16, 92 in float32"),
        ("size", "1,049,984 parameters", "measured 57 GFLOP/s in training steps; 216 s of them fit 1.1 M parameters"),
    ]
    predicted = {
        "tokenizer": (10, 410),
        "pretrain": (121, 640),
        "sft": (111, 640),
        "grpo": (198, 760),
        "quantize": (4, 520),
        "evaluate": (12, 520),
        "tools": (6, 520),
    }
    return {
        "choices": [dict(zip(("name", "value", "reason"), c)) for c in choices],
        "gflops": {"float32": 92.4, "bfloat16": 221.0},
        "bandwidth_gbs": 28.1,
        "model": {
            "parameters": 1049984,
            "dim": 128,
            "layers": 4,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 32,
            "ffn": 384,
            "vocab": 2048,
            "context": 512,
            "family": "qwen3",
        },
        "stages": [{"stage": k, "seconds": float(s), "memory_bytes": m * MIB} for k, (s, m) in predicted.items()],
    }


def falling(rng: random.Random, start: float, end: float, n: int = 160, noise: float = 0.05) -> list[list[float]]:
    """A loss curve: quick at first, then slow, with noise."""
    return [[i / n, end + (start - end) * math.exp(-5.5 * i / n) + rng.gauss(0, noise) * end] for i in range(1, n + 1)]


def rising(rng: random.Random, start: float, end: float, n: int = 60, noise: float = 0.03) -> list[list[float]]:
    return [
        [i / n, min(1.0, start + (end - start) * (1 - math.exp(-2.2 * i / n)) + rng.gauss(0, noise))]
        for i in range(1, n + 1)
    ]


def stages(rng: random.Random) -> list[dict[str, Any]]:
    solved = "accuracy on held-out problems"
    rows = [  # stage, file, seconds, planned, measure, unit, higher is better, before, after, predicted and peak MiB
        ("tokenizer", "tokenizer", 6.1, 10.0, "bytes per token on held-out text", "bytes", True, 1.0, 3.02, 410, 398),
        ("pretrain", "pretrain", 121.9, 121.4, "bits per byte on held-out text", "bpb", False, 8.12, 2.118, 640, 598),
        ("sft", "sft", 110.6, 111.3, solved, "", True, 0.0, 0.385, 640, 641),
        ("grpo", "reinforce", 197.8, 198.2, solved, "", True, 0.385, 0.632, 760, 733),
        ("quantize", "quantize", 4.4, 4.0, f"{solved}, INT8 weights", "", True, 0.632, 0.630, 520, 733),
        ("evaluate", "evaluate", 15.2, 12.0, "pass@8 on held-out problems, sampled", "", True, 0.705, 0.794, 520, 733),
        ("tools", "tools", 5.6, 6.0, "problems solved through the server", "", True, None, 0.975, 520, 733),
    ]
    details: dict[str, dict[str, Any]] = {
        "pretrain": {"tokens": 1_204_224, "tokens_per_second": 10034.2, "epochs": 1.43, "steps": 588},
        "sft": {
            "demonstrations": 8000,
            "tokens": 1_011_712,
            "tokens_per_second": 9210.0,
            "steps": 494,
            "format": 0.985,
        },
        "grpo": {
            "steps": 61,
            "sampled_tokens": 624_110,
            "sampling_tokens_per_second": 7544.0,
            "sampling_share": 0.418,
            "format": 0.995,
            "objective": "A = (r - mean(r)) / std(r);  loss = -mean(min(ratio A, clip(ratio, 0.8, 1.28) A))",
        },
        "quantize": {
            "bits_per_byte": {"float32": 2.1183, "int8": 2.1207},
            "bytes": {"float32": 4199936, "int8": 1310720},
            "size_ratio": 0.3121,
            "kernel": "oneDNN: quickest of 3 on this machine",
            "relative_error": 0.0071,
            "tokens_per_second": {
                "1": {"float32": 512.0, "bfloat16": 468.0, "int8": 548.0},
                "64": {"float32": 9321.0, "bfloat16": 12025.0, "int8": 13810.0},
            },
            "speedup": {"1": 1.07, "64": 1.4816},
        },
    }
    curves: dict[str, dict[str, Any]] = {
        "pretrain": {
            "loss": falling(rng, 7.6, 3.7),
            "held-out bits per byte": [[0, 8.12], [0.25, 2.61], [0.5, 2.37], [0.75, 2.24], [1, 2.118]],
        },
        "sft": {
            "loss": falling(rng, 5.9, 0.24, noise=0.12),
            "held-out accuracy": [[0, 0.0], [0.33, 0.07], [0.67, 0.21], [1, 0.385]],
        },
        "grpo": {
            "held-out accuracy": [[0, 0.385], [0.25, 0.49], [0.5, 0.56], [0.75, 0.6], [1, 0.632]],
            "accuracy": rising(rng, 0.34, 0.6, noise=0.04),
            "format": rising(rng, 0.97, 0.995, noise=0.006),
            "length/mean": [[p, 42 + 30 * (v - 0.4)] for p, v in rising(rng, 0.2, 0.3)],
            "entropy/mean": falling(rng, 0.27, 0.17, 60),
            "groups/live": rising(rng, 0.85, 0.72),
        },
    }
    names = (
        "stage",
        "file",
        "seconds",
        "seconds_planned",
        "metric",
        "unit",
        "higher_is_better",
        "before",
        "after",
        "memory_predicted_bytes",
        "memory_peak_bytes",
    )
    out = []
    for row in rows:
        s = dict(zip(names, row))
        s |= {
            "file": f"src/pellucid/grow/{s['file']}.py",
            "title": s["stage"],
            "details": details.get(s["stage"], {}),
            "curves": curves.get(s["stage"], {}),
            "memory_predicted_bytes": s["memory_predicted_bytes"] * MIB,
            "memory_peak_bytes": s["memory_peak_bytes"] * MIB,
        }
        out.append(s)
    return out


def spoiled(text: str, rng: random.Random) -> str:
    """A demonstration with one digit of its last line changed: well-formed, and wrong."""
    where = [i for i, c in enumerate(text) if c.isdigit()][-2:]
    i = rng.choice(where)
    return text[:i] + str((int(text[i]) + rng.randint(1, 8)) % 10) + text[i + 1 :]


def prompts(rng: random.Random) -> list[dict[str, Any]]:
    """One held-out problem of each task: junk after pretraining, wrong or right after fine-tuning, right after GRPO."""
    out = []
    for name in recipe.TASKS:
        task = tasks.make(name)
        problem = task.sample(rng, "heldout")
        right = task.demonstrate(problem, rng)
        texts = {
            "pretrain": JUNK,
            "sft": right if name == "calculator" else spoiled(right, rng),
            "grpo": right,
            "int8": right,
        }
        out.append(
            {
                "task": name,
                "prompt": problem.prompt,
                "answers": [
                    {"stage": k, "completion": text, "rewards": task.grade(problem, text)} for k, text in texts.items()
                ],
            }
        )
    return out


def group(rng: random.Random, seed: int) -> dict[str, Any]:
    """Eight answers to one countdown problem; advantages as GRPO defines them, from the recipe's weights."""
    task = tasks.make("countdown")
    problem = task.sample(random.Random(seed), "train")
    texts = [task.demonstrate(problem, rng) for _ in range(3)]
    texts += [texts[0], spoiled(texts[1], rng), spoiled(texts[2], rng), texts[1].replace("</think>", ""), texts[2][:31]]
    rewards = [task.grade(problem, t) for t in texts]
    totals = [r["correct"] + 0.2 * r["format"] + 0.3 * r["progress"] for r in rewards]
    mean = sum(totals) / len(totals)
    std = math.sqrt(sum((t - mean) ** 2 for t in totals) / len(totals))
    return {
        "prompt": problem.prompt,
        "step": 58,
        "samples": [
            {"completion": t, "rewards": r, "advantage": (total - mean) / std}
            for t, r, total in zip(texts, rewards, totals)
        ],
    }


def evaluation() -> dict[str, Any]:
    by_task = {"sft": (0.12, 0.34, 0.16, 0.92), "grpo": (0.34, 0.83, 0.37, 0.99), "int8": (0.34, 0.82, 0.37, 0.99)}
    rows = {  # greedy, sampled, pass@8, format, length, cut off
        "sft": (0.385, 0.352, 0.705, 0.985, 41.2, 0.004),
        "grpo": (0.632, 0.611, 0.794, 0.995, 43.9, 0.001),
        "int8": (0.630, None, None, 0.995, 43.8, 0.001),
    }
    out = {}
    for name, (greedy, sampled, passed, form, length, cut) in rows.items():
        row = {
            "pass@1": greedy,
            "standard_error": 0.0243,
            "sampled pass@1": sampled,
            "pass@8": passed,
            "format": form,
            "reasoning": greedy / form,
            "mean_length": length,
            "truncated": cut,
            "problems": 400,
            "by_task": {
                t: {"pass@1": v, "format": form}
                for t, v in zip(("countdown", "arithmetic", "sorting", "calculator"), by_task[name])
            },
        }
        out[name] = {k: v for k, v in row.items() if v is not None}
    return out


def transcript() -> dict[str, Any]:
    messages = [
        {"role": "user", "content": "Eva buys 22 bags of 21 coins. How many in all?"},
        {
            "role": "assistant",
            "reasoning_content": "22 times 21",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_0",
                    "type": "function",
                    "function": {"name": "calculator", "arguments": '{"expression": "22*21"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": "462"},
        {"role": "assistant", "content": "462"},
    ]
    case = {"messages": messages, "call": '{"expression": "22*21"}', "result": "462", "solved": True}
    return {"transcript": messages, "solved": 39, "asked": 40, "cases": [case]}
