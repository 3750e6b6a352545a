"""One model on two cores, spread in several ways: what long prompts do to running answers, and what a cache holds.

    pellucid bench spread --out benchmarks/results/spread.json

    between   4 requests write for 4 seconds; meanwhile a prompt of 1,000 tokens (16 tokens of answer) arrives every 0.8 s. Seconds
              between two tokens of the running answers, to the first token of the prompts, and tokens/s of all. One process with two
              threads, prompts cut into chunks of 512, 128 and 32 tokens; against a process for prompts and one for answers,
              with a thread each; against two whole engines with a thread each.
    capacity  a model with latent attention and experts, 24 requests (96 tokens in, 64 out), cache for 2,048 tokens in each of two
              processes: tensor parallelism, which holds every latent twice, against data-parallel attention.

Random weights (seed 0), random prompts, greedy, float32, the end token ignored: right for speed, and for nothing else.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import begin, finish, options
from pellucid.engine.config import EngineConfig
from pellucid.engine.fleet import Fleet
from pellucid.engine.layout import Layout
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.models import save
from pellucid.nn import MLA, MLP, Attn, Decoder, DecoderSpec, Layer, MoE, Rope, init_weights
from pellucid.tokenizers import Tokenizer, patterns, train_bpe

VOCAB = 8192
DENSE = DecoderSpec(VOCAB, 512, (Layer(Attn(8, 4, 64, Rope(64, theta=1e6), qk_norm=True), MLP(1536)),) * 8, tied=True, context=4096)
LATENT = DecoderSpec(
    VOCAB, 256, (Layer(MLA(8, None, 128, 32, 32, Rope(32, interleaved=True)), MLP(768)),
                 *(Layer(MLA(8, None, 128, 32, 32, Rope(32, interleaved=True)), MoE(16, 2, 192, shared=192)),) * 5), context=1024,
    family="deepseek_v2")
WRITERS, SECONDS, PROMPT, ANSWER, EVERY = 4, 4.0, 1000, 16, 0.8

SPREADS = {
    "one process, chunks of 512": (Layout(), EngineConfig(budget=512), 2),
    "one process, chunks of 128": (Layout(), EngineConfig(budget=128), 2),
    "one process, chunks of 32": (Layout(), EngineConfig(budget=36), 2),
    "prompts and answers apart": (Layout(disaggregate=True), EngineConfig(budget=512), 1),
    "two engines": (Layout(dp=2), EngineConfig(budget=512), 1),
}


def prompt(length: int, draw: random.Random) -> list[int]:
    return [draw.randrange(256) for _ in range(length)]


def open_fleet(folder: Path, layout: Layout, config: EngineConfig, threads: int) -> Fleet:
    from pellucid.models.hub import read_config, spec_of

    return Fleet(folder, layout, spec_of(read_config(folder)), Tokenizer.load(folder), config, threads=threads)


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def between(fleet: Fleet, seed: int) -> dict[str, float]:
    draw, params = random.Random(seed), SamplingParams(max_tokens=4000, ignore_eos=True)
    writers = [Request(prompt(32, draw), params) for _ in range(WRITERS)]
    for r in writers:
        fleet.add(r)
    while min(r.generated for r in writers) < 8:
        fleet.step()
    last = dict.fromkeys(writers, time.perf_counter())
    gaps: list[float] = []
    asked: dict[Request, float] = {}
    first: dict[Request, float] = {}
    began = due = time.perf_counter()
    tokens = 0
    while time.perf_counter() < began + SECONDS:
        if time.perf_counter() >= due:
            r = Request(prompt(PROMPT, draw), SamplingParams(max_tokens=ANSWER, ignore_eos=True))
            fleet.add(r)
            asked[r] = time.perf_counter()
            due += EVERY
        given, now = fleet.step(), time.perf_counter()
        for r, new in given:
            tokens += len(new)
            if r in last:
                gaps.append(now - last[r])
                last[r] = now
            elif r not in first:
                first[r] = now - asked[r]
    seconds = time.perf_counter() - began
    return {"median_ms": 1000 * statistics.median(gaps), "p95_ms": 1000 * quantile(gaps, 0.95), "p99_ms": 1000 * quantile(gaps, 0.99),
            "worst_ms": 1000 * max(gaps), "prompts": len(asked), "prompts_begun": len(first),
            "first_token_ms": 1000 * statistics.mean(first.values()) if first else float("nan"), "writers_tokens_per_s": len(gaps) / seconds,
            "tokens_per_s": (tokens + PROMPT * len(first)) / seconds}


def capacity(fleet: Fleet) -> dict[str, Any]:
    draw = random.Random(3)
    requests = [Request(prompt(96, draw), SamplingParams(max_tokens=64, ignore_eos=True)) for _ in range(24)]
    began, most = time.perf_counter(), 0
    for r in requests:
        fleet.add(r)
    while fleet.busy:
        fleet.step()
        most = max(most, (fleet.cache.blocks - fleet.cache.available()) * fleet.cache.size)
    seconds = time.perf_counter() - began
    return {"cache_bytes_per_token_and_process": fleet.ready[0]["cache_bytes_per_token"], "tokens_that_fit": fleet.cache.blocks * fleet.cache.size,
            "most_tokens_at_a_time": most, "preemptions": fleet.totals["preemptions"], "computed_tokens": fleet.totals["computed_tokens"],
            "generated_tokens_per_s": 24 * 64 / seconds, "weights_mib": [round(r["weights"] / 2**20, 1) for r in fleet.ready],
            "answers": [r.output[:4] for r in requests]}


def main(argv: list[str] | None = None) -> int:
    chosen = options(__doc__, rounds=3).parse_args(argv)
    result = begin("spread", chosen)
    tokenizer = train_bpe(["a b c"], 267, patterns.QWEN_PATTERN)
    with tempfile.TemporaryDirectory() as place:
        for name, spec in (("dense", DENSE), ("latent", LATENT)):
            save(init_weights(Decoder(spec), 0), Path(place) / name, tokenizer=tokenizer)
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in SPREADS}
        turns = [(None, next(iter(SPREADS)))] + [(turn, name) for turn in range(chosen.rounds) for name in SPREADS]
        for turn, name in turns:  # the first is not kept: files are read and kernels compiled in it
            layout, config, threads = SPREADS[name]
            fleet = open_fleet(Path(place) / "dense", layout, EngineConfig(**vars(config) | {"cache_tokens": 40_000, "prefix": "none"}), threads)
            try:
                found = between(fleet, turn or 0)
                if turn is not None:
                    rows[name].append(found)
            finally:
                fleet.close()
        result["between"] = {name: {key: round(statistics.median(row[key] for row in found), 2) for key in found[0]} for name, found in rows.items()}
        for name, row in result["between"].items():
            print(f"  {name:28s} between tokens: median {row['median_ms']:6.1f} ms, 95 % {row['p95_ms']:6.1f}, 99 % {row['p99_ms']:6.1f}, worst {row['worst_ms']:6.1f};"
                  f" first token of a prompt {row['first_token_ms']:7.0f} ms; answers {row['writers_tokens_per_s']:5.0f} tokens/s, all {row['tokens_per_s']:6.0f}", flush=True)
        result["capacity"] = {}
        for name, layout in (("tensor parallel", Layout(tp=2)), ("data-parallel attention", Layout(dp_attention=2))):
            fleet = open_fleet(Path(place) / "latent", layout, EngineConfig(cache_tokens=2048, prefix="none"), 1)
            try:
                row = result["capacity"][name] = capacity(fleet)
            finally:
                fleet.close()
            print(f"  {name:28s} {row['cache_bytes_per_token_and_process']:.0f} bytes a token and process, {row['tokens_that_fit']} tokens fit,"
                  f" {row['most_tokens_at_a_time']} at a time, {row['preemptions']} preemptions, {row['generated_tokens_per_s']:.0f} tokens/s", flush=True)
        answers = [row.pop("answers") for row in result["capacity"].values()]
        result["same_answers"] = answers[0] == answers[1]
    return finish(result, chosen.json)


if __name__ == "__main__":
    sys.exit(main())
