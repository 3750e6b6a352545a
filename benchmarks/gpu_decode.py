"""Decoding on a CUDA GPU: tokens/s of the engine by recorded steps, by the same kernels launched each time, and by the flat pass.

    python benchmarks/gpu_decode.py --json benchmarks/results/gpu_decode.json

Random weights of Qwen3-0.6B's shape in bfloat16. `bandwidth`: bytes of weights and cache that a step must read, over its time, as a
share of a measured copy of 1 GiB. Requests of --prompt tokens, --new tokens each; batches of 1, 16 and 64.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from common import begin, finish, options
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.models.hub import spec_of
from pellucid.models.known import find_config
from pellucid.nn import Decoder, init_weights
from pellucid.nn.count import cache_bytes
from pellucid.runtime import Choice


def copy_rate() -> float:
    """Bytes a second, read and written."""
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    b.copy_(a)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        b.copy_(a)
    torch.cuda.synchronize()
    return 20 * 2 * a.numel() / (time.perf_counter() - start)


def run(model: Decoder, way: str, batch: int, prompt: int, new: int, copied: float) -> dict[str, float]:
    engine = Engine(model, config=EngineConfig(running=batch, cache_tokens=batch * (prompt + new + 16), budget=4096, prefix="none"))
    step = engine.runner.gpu
    assert step is not None, engine.runner.path.reason
    if way == "launched":
        step.graphs = Choice(False, "to compare")
    elif way == "flat":
        engine.runner.gpu = None
    g = torch.Generator().manual_seed(0)
    for _ in range(batch):
        engine.add(Request(torch.randint(0, model.spec.vocab, (prompt,), generator=g).tolist(), SamplingParams(max_tokens=new, ignore_eos=True), 0))
    while engine.totals["generated_tokens"] < 4 * batch:  # prompts, compiling, recording
        engine.step()
    torch.cuda.synchronize()
    before, steps, start = engine.totals["generated_tokens"], engine.steps, time.perf_counter()
    while engine.busy:
        engine.step()
    seconds = time.perf_counter() - start
    tokens, steps = engine.totals["generated_tokens"] - before, engine.steps - steps
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    entries = batch * (prompt + new / 2) * sum(cache_bytes(layer.mixer, engine.runner.pages.codes) for layer in model.spec.layers)
    return {"tokens_per_second": tokens / seconds, "milliseconds": 1e3 * seconds / steps, "bandwidth": (weights + entries) * steps / seconds / copied}


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--config", default="qwen3-0.6b")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    result = begin("gpu_decode", chosen)
    model = init_weights(Decoder(spec_of(find_config(chosen.config))).to("cuda", torch.bfloat16), 0).eval()
    copied = copy_rate()
    rows: dict[str, Any] = {}
    for batch in (1, 16, 64):
        for way in ("recorded", "launched", "flat"):
            rows[f"{batch} {way}"] = run(model, way, batch, chosen.prompt, chosen.new, copied)
            print(batch, way, {k: round(v, 3) for k, v in rows[f"{batch} {way}"].items()})
    return finish(result | {"copy_bytes_per_second": copied, "prompt": chosen.prompt, "new": chosen.new, "rows": rows}, chosen.json)


if __name__ == "__main__":
    raise SystemExit(main())
