"""How prompts are cut while others are writing: fixed chunks against a bound on a step's time, on two traces that servers see.

    python experiments/step_pace.py            prints a table; --json FILE keeps it

The real engine with a model of random weights (--size, default ~30M in bfloat16). Eight answers are being written all the time;
meanwhile prompts arrive by the clock: `agent`, long conversations that come back with a little more each time, and `few-shot`,
many questions behind a few long stems. Fixed chunks compute so many tokens of a prompt in a step; with a bound a step takes as
many as are predicted to fit (engine/pace.py). Both traces are run by every contestant in turn, the same requests each time.

Reported: seconds between two tokens of the eight answers (median, 95th percentile, longest), seconds from a prompt's arrival to
its first token (mean, 95th percentile), and seconds until all is answered.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.runtime import choose_threads

SIZES = {"1m": (128, 4, 4, 2, 32, 384), "30m": (512, 8, 8, 4, 64, 1536)}
CONTESTANTS: dict[str, dict[str, Any]] = {
    "chunk 512": {"chunk": 512}, "chunk 128": {"chunk": 128}, "chunk 32": {"chunk": 32},
    "step 100 ms": {"step_seconds": 0.1}, "step 50 ms": {"step_seconds": 0.05}, "step 25 ms": {"step_seconds": 0.025},
}
Arrival = tuple[float, list[int]]  # seconds, prompt


def words(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(2, 8000) for _ in range(n)]


def agent(rng: random.Random) -> list[Arrival]:
    tools, arrivals = words(rng, 300), []
    for user in range(6):
        text = tools + words(rng, 100)
        for turn in range(4):
            arrivals.append((0.3 * user + 1.8 * turn, list(text)))
            text = text + words(rng, rng.randrange(150, 350))
    return sorted(arrivals)


def few_shot(rng: random.Random) -> list[Arrival]:
    stems = [words(rng, 700) for _ in range(8)]
    return [(0.25 * i, rng.choice(stems) + words(rng, rng.randrange(20, 60))) for i in range(28)]


def play(model: Decoder, arrivals: list[Arrival], options: dict[str, Any]) -> dict[str, float]:
    engine = Engine(model, config=EngineConfig(cache_tokens=24_000, budget=512, **options))
    rng = random.Random(1)
    new = SamplingParams(max_tokens=8, ignore_eos=True)
    writers = [writer(rng) for _ in range(8)]
    for r in writers:
        engine.add(r)
    while any(r.generated < 12 for r in writers):  # the pace has learned, kernels are compiled
        engine.step()
    began = time.perf_counter()
    last = dict.fromkeys(writers, began)
    gaps, firsts, came, waiting, answered = list[float](), list[float](), dict[Request, float](), list(arrivals), 0
    while answered < len(arrivals):
        now = time.perf_counter() - began
        while waiting and waiting[0][0] <= now:
            at, prompt = waiting.pop(0)
            came[request := Request(prompt, new)] = at
            engine.add(request)
        for request, _ in engine.step():
            now = time.perf_counter()
            if request in came:
                if request.generated == 1:
                    firsts.append(now - began - came[request])
                answered += request.finish_reason is not None
                continue
            gaps.append(now - last.pop(request))
            if request.finish_reason is not None:  # somebody else begins to write
                engine.add(request := writer(rng))
            last[request] = now
    return {"gap median": statistics.median(gaps), "gap 95 %": quantile(gaps), "gap longest": max(gaps),
            "first mean": statistics.fmean(firsts), "first 95 %": quantile(firsts), "all": time.perf_counter() - began}


def writer(rng: random.Random) -> Request:
    return Request(words(rng, 24), SamplingParams(max_tokens=120, ignore_eos=True))


def quantile(values: list[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="30m")
    parser.add_argument("--rounds", type=int, default=2, help="of all contestants in turn; the median is reported")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    choose_threads(None)
    dim, layers, heads, kv, width, hidden = SIZES[chosen.size]
    layer = Layer(Attn(heads, kv, width, Rope(width), qk_norm=True), MLP(hidden))
    model = init_weights(Decoder(DecoderSpec(8192, dim, (layer,) * layers, context=4096))).bfloat16().eval()
    play(model, few_shot(random.Random(0))[:4], {})  # kernels are compiled
    rows = []
    for kind in (agent, few_shot):
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
        for _ in range(chosen.rounds):
            for name, options in CONTESTANTS.items():
                rounds[name].append(play(model, kind(random.Random(0)), options))
        for name, found in rounds.items():
            row = {key: round(statistics.median(r[key] for r in found), 4) for key in found[0]}
            rows.append({"trace": kind.__name__, "contestant": name} | row)
            print(f"{kind.__name__:9} {name:12}", "  ".join(f"{key} {1e3 * value:7.0f} ms" for key, value in row.items()), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps({"experiment": "step_pace", "size": chosen.size, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
