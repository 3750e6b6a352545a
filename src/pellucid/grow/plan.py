"""The plan card: what this machine can do, what is chosen from it, what it should cost. Made before the run, from
short measurements; the report prints what was spent beside it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pellucid.engine import Sample, SamplingParams, run_all
from pellucid.engine.core import warm_up
from pellucid.engine.decode import CompiledStep
from pellucid.engine.native_batch import BatchStep, choose_step
from pellucid.events import Event
from pellucid.grow import memory, recipe, words  # noqa: F401  (words: its messages)
from pellucid.grow.config import GrowConfig
from pellucid.messages import Text, both, say
from pellucid.nn import Decoder, DecoderSpec, count_parameters, init_weights
from pellucid.ops import chunked_cross_entropy
from pellucid.optim import build_optimizer
from pellucid.runtime import (
    Choice,
    choose_device,
    choose_dtype,
    choose_threads,
    matmul_gflops,
    read_bandwidth_gbs,
)


@dataclass
class Plan:
    """Choices with reasons, measured speeds, and predicted cost of each stage."""

    choices: list[dict[str, str]]
    gflops: dict[str, float]
    bandwidth_gbs: float
    model: dict[str, Any]
    stages: list[dict[str, Any]]
    device: str = "cpu"
    dtype: str = "float32"
    shape: list[int] = field(default_factory=list)
    tokens_per_second: float = 0.0
    threads: int | None = None


@dataclass
class PlanCard(Event):
    """The plan of a job, before it runs."""

    kind = "plan"
    plan: dict[str, Any]


def make_plan(config: GrowConfig, given: DecoderSpec | None = None) -> Plan:
    """Measures for about five seconds, then chooses. `given`: the spec of a checkpoint that is used as it is.
    Errors: BadInput where the job would not fit into memory."""
    where, cores = choose_device(config.device), choose_threads(config.threads)
    spec_128 = recipe.model_spec(recipe.LADDER[2])
    dtype = choose_dtype(given.dim if given else 128, where.value)
    if config.threads is None:
        cores = threads_beside_others(cores, spec_128, where.value, dtype.value)
    gflops = {n: matmul_gflops(2048, 512, 512, d) for n, d in (("float32", torch.float32), ("bfloat16", torch.bfloat16))}
    speed = training_speed(spec_128, where.value, dtype.value)
    flops = 6 * count_parameters(spec_128) * speed
    shape, why = choose_size(flops, config.minutes * 60)
    spec = given or recipe.model_spec(shape)
    kernels = compile_kernels(spec, where.value)
    named = [("device", where), ("threads", cores), ("dtype", replace(dtype, value=str(dtype.value).removeprefix("torch."))),
             ("kernels", kernels),
             ("size", Choice.because(say("grow.parameters", count=f"{count_parameters(spec):,}"), both("grow.given") if given else why))]
    own = speed * count_parameters(spec_128) / count_parameters(spec)
    bandwidth, base = read_bandwidth_gbs(), memory.base_bytes()
    work = memory.work_of(config, own, dtype.value, kernels.value == "compiled")
    held = 4 * count_parameters(spec) if given else 0  # a given model is in memory already
    stages = predict_stages(spec, config.minutes, own, base - held, work, bool(given))
    memory.refuse_what_cannot_fit(stages, base, where.value, config)
    return Plan([described(n, c) for n, c in named], gflops, bandwidth,
                describe(spec), stages, str(where.value), named[2][1].value, list(shape), own, cores.value)


def compile_kernels(spec: DecoderSpec, device: torch.device) -> Choice:
    """What runs a CPU's loops. The kernels that decode this shape are compiled now (seconds, the first time on a machine)
    and not in the middle of a stage."""
    if device.type != "cpu":
        return Choice("pytorch", f"{device.type} has its own fused kernels")
    for dtype in (torch.bfloat16, torch.float32):
        tiny = replace(spec, vocab=64, layers=tuple(dict.fromkeys(spec.layers)))
        model = init_weights(Decoder(tiny)).to(dtype).eval()
        choice = choose_step(model)
        for temperature in (0.0, 1.0):
            run_all(model, [Sample([0, 1], SamplingParams(max_tokens=3, temperature=temperature), 0)], [])
    warm_up(model)  # in float32, as the last stages ask the server
    return Choice("compiled" if isinstance(choice.value, BatchStep | CompiledStep) else "pytorch", choice.reason)


def described(name: str, choice: Choice) -> dict[str, str]:
    """A choice for the plan card: its reason in the language in use, and in both for the report."""
    reasons = {} if choice.text is None else choice.text._asdict()
    return {"name": name, "value": str(choice.value), "reason": choice.reason, **reasons}


def threads_beside_others(cores: Choice, spec: DecoderSpec, device: torch.device, dtype: torch.dtype) -> Choice:
    """All cores, or half of them where training is faster so: the threads of an operator wait for the slowest, and one that
    shares its core with another busy process holds up all others (two cores beside one such process: five times slower than quiet)."""
    half = cores.value // 2
    if half < 1 or device.type != "cpu":
        return cores
    speed = {}
    for count in (half, cores.value):
        choose_threads(count)
        speed[count] = training_speed(spec, device, dtype, 0.7, True)
    if speed[half] < 1.1 * speed[cores.value]:
        return cores
    choose_threads(half)
    return Choice.because(half, both("grow.busy", half=speed[half], all=speed[cores.value], cores=cores.value))


@torch.enable_grad()
def training_speed(spec: DecoderSpec, device: torch.device, dtype: torch.dtype, seconds: float = 1.2, sustained: bool = False) -> float:
    """Tokens/s of real training steps of the default shape: the best of a few, or (sustained) the mean over all of them."""
    model = init_weights(Decoder(spec)).to(device)
    model.compute_dtype = dtype
    optimizer = build_optimizer(model, replace(recipe.PRETRAIN, dtype=str(dtype).removeprefix("torch.")))
    tokens = torch.randint(0, spec.vocab, (recipe.ROWS, recipe.ROW), device=device)
    documents = (torch.arange(recipe.ROW, device=device) // 80).expand_as(tokens)
    best, begin, end, steps = float("inf"), 0.0, float("inf"), 0
    while steps < 3 or time.perf_counter() < end:  # at least one that counts: on a slow machine it is long enough
        if steps == 2:  # the first ones compile kernels and make buffers
            best, begin = float("inf"), time.perf_counter()
            end = begin + seconds
        steps += 1
        start = time.perf_counter()
        hidden = model.hidden(tokens, documents=documents).flatten(0, 1)
        (chunked_cross_entropy(hidden, model.head_weight.to(hidden.dtype), tokens.flatten()) / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return tokens.numel() / ((time.perf_counter() - begin) / (steps - 2) if sustained else best)


def choose_size(flops_per_second: float, seconds: float) -> tuple[tuple[int, ...], Text]:
    """The rung of the ladder that sees about 1.7 training tokens per parameter in the pretraining and SFT time.

    Few tokens per parameter beside compute-optimal training (20): here the clock is the limit, the tasks are narrow,
    and a smaller model learns its search too slowly.
    """
    training = seconds * 0.45
    wanted = math.sqrt(flops_per_second * training / (6 * 1.7))
    sizes = [count_parameters(recipe.model_spec(rung)) for rung in recipe.LADDER]
    i = min(range(len(sizes)), key=lambda k: abs(math.log(sizes[k] / wanted)))
    return recipe.LADDER[i], both("grow.size", gflops=flops_per_second / 1e9, seconds=training, millions=wanted / 1e6)


def describe(spec: DecoderSpec) -> dict[str, Any]:
    a, m = spec.layers[0].mixer, spec.layers[0].ffn
    return {"parameters": count_parameters(spec), "family": spec.family, "dim": spec.dim, "layers": len(spec.layers),
            "heads": a.heads, "kv_heads": a.kv_heads, "head_dim": a.head_dim, "ffn": m.hidden, "vocab": spec.vocab,
            "context": spec.context}


def predict_stages(spec: DecoderSpec, minutes: float, tokens_per_second: float, base: int, work: memory.Work,
                   given: bool = False) -> list[dict[str, Any]]:
    """Seconds and memory of each stage. The clock is re-read when a stage begins: what one saves, the next ones get.
    base: bytes that the process holds already."""
    one = recipe.measure_seconds(recipe.problems(minutes, tokens_per_second), tokens_per_second)
    left = 60 * minutes - recipe.tail_seconds(one) - (6 if given else 14)
    rows = []
    for stage in recipe.STAGES:
        if given and stage in ("tokenizer", "pretrain"):
            continue
        share = recipe.SHARES.get(stage)
        planned = {"tokenizer": 5.0, "quantize": 10.0, "evaluate": 9.0, "tools": 7.0}.get(stage) if share is None else share * left
        left -= planned if share else 0.0  # type: ignore[operator]
        rows.append({"stage": stage, "seconds": round(max(float(planned or 0), 1.0), 1),
                     "memory_bytes": base + memory.memory_of(spec, stage, work)})
    return rows
