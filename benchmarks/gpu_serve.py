"""The engine on a CUDA GPU beside transformers' continuous batching, with the same weights in one process.

    pellucid bench gpu --out benchmarks/results/gpu_serve.json

    decode     one request: milliseconds between tokens, and the bytes that a step must read over that time, as a share of the measured
               bandwidth (the better of a copy and of a sum); by the GPU's own clock beside: the same recorded step over and over
    batch      256 requests at once, 128 tokens in and 128 out: output tokens by the whole time
    mixed      256 requests of 32 to 512 tokens in and 16 to 256 out
    step       where the time of a step goes, by kernel (PyTorch's profiler), and what the host adds

Weights are random and made on the GPU, in bfloat16; tokens are random, greedy, the end token ignored: right for speed, and for nothing
else. That both compute the same is checked first: logits behind a prompt. transformers runs with the fastest attention that it finds
here (`transformers_attention` in the result), in its continuous batching with its own defaults, and as `generate` on one padded batch.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import begin, finish, options
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.models.hub import spec_of
from pellucid.models.known import find_config
from pellucid.nn import Decoder
from pellucid.nn.count import cache_bytes
from pellucid.runtime import Choice

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": 640, "max_position_embeddings": 4096}
Work = list[tuple[list[int], int]]
"""Prompts, and how many tokens each is to get."""


def build(name: str, device: torch.device, tiny: bool) -> tuple[Decoder, dict[str, Any]]:
    fields = find_config(name) | (TINY if tiny else {})
    torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        with device:
            model = Decoder(spec_of(fields)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, p.shape[-1] ** -0.5)
            else:
                p.fill_(1.0)
    return model.requires_grad_(False), fields


def theirs(model: Decoder, fields: dict[str, Any]) -> Any:
    """transformers' model of the same shape, over our memory."""
    import transformers

    weight = model.embed.weight
    config = transformers.AutoConfig.for_model(**fields)
    with weight.device:
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=weight.dtype, attn_implementation="sdpa").eval().requires_grad_(False)
    shared = dict(renamed(model))
    for key, p in made.named_parameters():
        assert p.shape == shared[key].shape, key
        p.data = shared[key]
    made.tie_weights()
    return made


def renamed(model: Any) -> Any:
    """(transformers' name, our tensor), stacked matrices cut."""
    yield "model.embed_tokens.weight", model.embed.weight
    yield "model.norm.weight", model.norm.weight
    if model.head is not None:
        yield "lm_head.weight", model.head.weight
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}."
        yield from zip((at + f"self_attn.{n}_proj.weight" for n in "qkv"), layer.mixer.qkv.weight.split(layer.mixer.qkv.parts), strict=True)
        yield at + "self_attn.o_proj.weight", layer.mixer.o.weight
        yield at + "self_attn.q_norm.weight", layer.mixer.q_norm.weight
        yield at + "self_attn.k_norm.weight", layer.mixer.k_norm.weight
        yield at + "input_layernorm.weight", layer.norm1.weight
        yield at + "post_attention_layernorm.weight", layer.norm2.weight
        yield from zip((at + f"mlp.{n}_proj.weight" for n in ("gate", "up")), layer.ffn.gate_up.weight.split(layer.ffn.gate_up.parts), strict=True)
        yield at + "mlp.down_proj.weight", layer.ffn.down.weight


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rates(device: torch.device) -> dict[str, float]:
    """Bytes a second: of a copy (read and written), and of a sum."""
    size = 2**32 if device.type == "cuda" else 2**24
    a = torch.zeros(size // 4, dtype=torch.float32, device=device).normal_()
    b = torch.empty_like(a)
    found = {}
    for name, call, moved in (("copy", lambda: b.copy_(a), 2 * size), ("sum", a.sum, size)):
        call()
        wait(device)
        start = time.perf_counter()
        for _ in range(10):
            call()
        wait(device)
        found[name] = 10 * moved / (time.perf_counter() - start)
    return found


# --- work ------------------------------------------------------------------------------------------------------------------


def even(vocab: int, count: int, length: int, new: int, seed: int) -> Work:
    chance = random.Random(seed)
    return [([chance.randrange(10, vocab - 10) for _ in range(length)], new) for _ in range(count)]


def mixed(vocab: int, count: int, scale: float, seed: int) -> Work:
    """The same lengths at every seed, other tokens."""
    lengths, chance = random.Random(7), random.Random(seed)
    sizes = [(max(1, int(lengths.randint(32, 512) * scale)), max(1, int(lengths.randint(16, 256) * scale))) for _ in range(count)]
    return [([chance.randrange(10, vocab - 10) for _ in range(n)], new) for n, new in sizes]


def config_for(work: Work, **more: Any) -> EngineConfig:
    tokens = sum(-(-(len(p) + new + 1) // 16) * 16 for p, new in work)
    return EngineConfig(**{"running": len(work), "cache_tokens": tokens, "budget": 8192, **more})


def ours_once(engine: Engine, work: Work) -> float:
    """Seconds until all are answered."""
    requests = [Request(p, SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)) for p, new in work]
    start = time.perf_counter()
    for r in requests:
        engine.add(r)
    while engine.busy:
        engine.step()
    seconds = time.perf_counter() - start
    assert all(r.generated == new for r, (_, new) in zip(requests, work, strict=True))
    return seconds


def output_rate(once: Callable[[Work], float], works: list[Work]) -> dict[str, float]:
    """Output tokens a second; the first round is not kept."""
    found = [sum(new for _, new in work) / once(work) for work in works][1:]
    return {"median": round(statistics.median(found), 1), "best": round(max(found), 1), "rounds": len(found)}


class Continuous:
    """transformers' continuous batching, as `once` for `output_rate`."""

    def __init__(self, model: Any, work: Work, together: int):
        from transformers import ContinuousBatchingConfig, GenerationConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        self.model = model
        longest, most = max(len(p) for p, _ in work), max(new for _, new in work)
        blocks = sum(-(-(len(p) + new) // 256) for p, new in work) + len(work) // 8 + 8
        self.manager = model.init_continuous_batching(
            generation_config=GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=blocks, max_requests_per_batch=together, max_batch_tokens=8192),
            workload_hints=WorkloadHints(max_prompt_length=longest, max_generated_length=most, num_requests=len(work)))
        self.attention = model.config._attn_implementation
        self.manager.warmup()
        self.manager.start()

    def __call__(self, work: Work) -> float:
        start, left = time.perf_counter(), len(work)
        for p, new in work:
            self.manager.add_request(p, max_new_tokens=new)
        made = 0
        while left:
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                assert result.error is None, result.error
                made, left = made + len(result.generated_tokens), left - 1
            elif result is None and not self.manager.is_running():
                raise RuntimeError("transformers' generation thread ended")
        seconds = time.perf_counter() - start
        assert made == sum(new for _, new in work), (made, sum(new for _, new in work))
        return seconds

    def close(self) -> None:
        self.manager.stop(block=True)
        self.manager.destroy()


def generate_once(model: Any) -> Callable[[Work], float]:
    """`generate` on one batch of equally long prompts."""

    def once(work: Work) -> float:
        device, new = model.device, work[0][1]
        ids = torch.tensor([p for p, _ in work], device=device)
        wait(device)
        start = time.perf_counter()
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        assert made.shape[1] == ids.shape[1] + new
        wait(device)
        return time.perf_counter() - start

    return once


# --- one request ---------------------------------------------------------------------------------------------------------------


def must_read(model: Decoder, engine: Engine, context: float, rows: int = 1) -> float:
    """Bytes of a step of so many rows with so many tokens of context each: weights (of the embedding what the head needs) and cache."""
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name != "embed.weight" or model.head is None)
    return weights + rows * context * sum(cache_bytes(layer.mixer, engine.runner.pages.codes) for layer in model.spec.layers)


def decode(model: Decoder, way: str, prompt: int, new: int, rate: float) -> dict[str, Any]:
    """way: recorded, launched (the same kernels without graphs), layers (the model as it is written, recorded), waiting (without steps
    that begin before the last one's token is read)."""
    (work,) = even(model.spec.vocab, 1, prompt, new, 1),
    engine = Engine(model, config=config_for(work))
    gpu = engine.runner.gpu
    assert gpu is not None, engine.runner.path.reason
    if way == "launched":
        gpu.graphs = Choice(False, "to compare")
    elif way == "layers":
        gpu.fused = None
    engine.ahead.possible &= way in ("recorded", "launched")
    request = Request(work[0][0], SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True))
    engine.add(request)
    while request.generated < max(4, new // 4):
        engine.step()
    first, start = request.generated, time.perf_counter()
    while engine.busy:
        engine.step()
    seconds = (time.perf_counter() - start) / (request.generated - first)
    read = must_read(model, engine, prompt + (new + first) / 2)
    found = {"milliseconds": 1e3 * seconds, "tokens_per_second": 1 / seconds, "bandwidth": read / seconds / rate}
    graph = None if way == "launched" else gpu.recorded[max(gpu.recorded)].graph
    if graph is not None:
        found |= (on_gpu := replayed(graph))
        found["bandwidth_on_gpu"] = read / (on_gpu["milliseconds_on_gpu"] / 1e3) / rate
    return {k: round(v, 4) for k, v in found.items()}


def replayed(graph: Any, times: int = 50) -> dict[str, float]:
    """A recorded step by the GPU's clock, back to back."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        graph.replay()
    begun.record()
    for _ in range(times):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    return {"milliseconds_on_gpu": begun.elapsed_time(ended) / times}


def parts(model: Decoder, rows: int, prompt: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Where a step of so many requests goes."""
    from torch.profiler import ProfilerActivity, profile

    work = even(model.spec.vocab, rows, prompt, 4 * steps + 40, 3)
    engine = Engine(model, config=config_for(work))
    for p, new in work:
        engine.add(Request(p, SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)))
    while engine.totals["generated_tokens"] < 16 * rows:
        engine.step()
    wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    wait(device)
    wall = (time.perf_counter() - start) / steps
    waiting = host_only(engine, steps)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=kinds) as profiler:
        for _ in range(steps):
            engine.step()
        wait(device)
    kernels: dict[str, list[float]] = {}
    for event in profiler.events():
        if "cuda" in str(event.device_type).lower():
            row = kernels.setdefault(event.name, [0.0, 0])
            row[0] += event.time_range.elapsed_us()
            row[1] += 1
    total = sum(us for us, _ in kernels.values())
    top = sorted(kernels.items(), key=lambda item: -item[1][0])[:14]
    return {"step_ms": round(1e3 * wall, 4), "kernels_ms": round(total / steps / 1e3, 4), "host_ms": round(1e3 * waiting, 4),
            "kernels": [{"name": name[:80], "ms": round(us / steps / 1e3, 4), "launches": n / steps} for name, (us, n) in top]}


def host_only(engine: Engine, steps: int) -> float:
    """Seconds of a step's Python: from the moment a step's tokens are on the host to the launch of the step after the next."""
    from pellucid.engine.transfer import Coming

    waited, read = [0.0], Coming.read

    def timed(self: Coming) -> Tensor:
        start = time.perf_counter()
        found = read(self)
        waited[0] += time.perf_counter() - start
        return found

    Coming.read = timed  # type: ignore[method-assign]
    try:
        start = time.perf_counter()
        for _ in range(steps):
            engine.step()
        return (time.perf_counter() - start - waited[0]) / steps
    finally:
        Coming.read = read  # type: ignore[method-assign]


def agree(model: Decoder, other: Any, length: int = 64) -> float:
    """The largest difference of logits behind a prompt, over their standard deviation: by the engine, and by transformers."""
    prompt = even(model.spec.vocab, 1, length, 2, 9)[0][0]
    engine = Engine(model, config=EngineConfig(running=2, cache_tokens=length + 64))
    seen: list[Tensor] = []
    engine.runner.observer = lambda order, states: seen.append(states.clone())
    engine.add(Request(prompt, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, logit_bias={11: 1e4})))
    while engine.busy:
        engine.step()
    with torch.inference_mode():
        mine = model.logits(torch.cat([s[-1:] for s in seen])).float()
        want = other(torch.tensor([[*prompt, 11]], device=mine.device)).logits[0, -2:].float()
    return round(((mine - want).abs().max() / want.std()).item(), 4)


def keep(result: dict[str, Any], name: str, path: Path | None, found: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(result | {name: found}, indent=1) + "\n", encoding="utf-8")


def release(device: torch.device) -> None:
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(name: str, chosen: argparse.Namespace, device: torch.device, rate: float) -> dict[str, Any]:
    model, fields = build(name, device, chosen.tiny)
    count, size, vocab = chosen.requests, 8 if chosen.tiny else 128, model.spec.vocab
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}

    def note(key: str, value: Any) -> None:
        found[key] = value
        chosen.keep(found)
        print(f"[{time.perf_counter() - BEGAN:6.1f} s] {name} {key}: {value}", flush=True)

    def attempt(key: str, call: Callable[[], Any]) -> None:
        """What fails is named in the result; the rest goes on."""
        try:
            note(key, call())
        except Exception as error:
            if chosen.tiny:
                raise
            note(key, {"failed": f"{type(error).__name__}: {error}"[:500]})
        release(device)

    def ours(works: list[Work]) -> dict[str, float]:
        engine = Engine(model, config=config_for(works[0]))
        return output_rate(lambda work: ours_once(engine, work), works)

    if "decode" in chosen.works:
        for way in chosen.ways:
            attempt(f"decode {way}", partial(decode, model, way, size, 2 * size, rate))
        if chosen.long:
            attempt(f"decode {chosen.long} tokens of context", partial(decode, model, "recorded", chosen.long, 64, rate))
    batches = [even(vocab, count, size, size, seed) for seed in range(chosen.rounds + 1)]
    mixtures = [mixed(vocab, count, size / 128, seed) for seed in range(chosen.rounds + 1)]
    if "batch" in chosen.works:
        attempt("batch", lambda: ours(batches))
    if "mixed" in chosen.works:
        attempt("mixed", lambda: ours(mixtures))
    if "step" in chosen.works:
        for rows in (1, count):
            attempt(f"step of {rows}", partial(parts, model, rows, size, 4 if chosen.tiny else 20, device))
    if chosen.theirs:
        other = theirs(model, fields)
        attempt("largest difference of logits", lambda: agree(model, other))
        if "decode" in chosen.works:
            works = [even(vocab, 1, size, size // 2, seed) for seed in range(2)]
            attempt("transformers generate, one request", lambda: output_rate(generate_once(other), works))
        if "batch" in chosen.works:
            attempt("transformers generate, batch", lambda: output_rate(generate_once(other), [[(p, 4) for p, _ in batches[0]], batches[1]]))
        for key, works in (("batch", batches), ("mixed", mixtures)):
            for together in (chosen.together if key == "batch" else [min(chosen.together)]) if key in chosen.works else ():
                attempt(f"transformers continuous, {key}, {together} together", partial(continuous, other, works[:2], together, found))
        best = {key: max((row["median"] for k, row in found.items() if k.startswith(f"transformers continuous, {key}") and "median" in row), default=None)
                for key in ("batch", "mixed")}
        note("times transformers", {key: round(found[key]["median"] / rate, 2) for key, rate in best.items() if rate and "median" in found.get(key, {})})
    return found


def continuous(other: Any, works: list[Work], together: int, found: dict[str, Any]) -> dict[str, float]:
    contestant = Continuous(other, works[0], together)
    found["transformers_attention"] = contestant.attention
    try:
        return output_rate(contestant, [[(p, 2) for p, _ in works[0]], works[1]])
    finally:
        contestant.close()


BEGAN = time.perf_counter()


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, rounds=2)
    parser.add_argument("--configs", nargs="+", default=["qwen3-0.6b", "qwen3-8b"])
    parser.add_argument("--works", nargs="+", choices=("decode", "batch", "mixed", "step"), default=["decode", "batch", "mixed", "step"])
    parser.add_argument("--ways", nargs="+", choices=("recorded", "launched", "layers", "waiting"), default=["recorded", "waiting", "layers"],
                        help="how one request is decoded")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--together", nargs="+", type=int, default=[256, 64], help="requests that transformers may run at a time; the best counts")
    parser.add_argument("--long", type=int, default=8192, help="decode behind so many tokens as well; 0: not")
    parser.add_argument("--ours-only", dest="theirs", action="store_false", help="without transformers")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters, also on a CPU by Triton's interpreter: to try the script")
    chosen = parser.parse_args(argv)
    if not torch.cuda.is_available() and not chosen.tiny:
        raise SystemExit("this benchmark needs a CUDA GPU")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    result = begin("gpu_serve", chosen)
    measured = rates(device)
    result |= {"card": torch.cuda.get_device_name(0) if device.type == "cuda" else "none", "bytes_per_second": {k: round(v) for k, v in measured.items()},
               "requests": chosen.requests}
    print(result["card"], {k: f"{v / 1e12:.2f} TB/s" for k, v in measured.items()}, flush=True)
    for name in chosen.configs:
        chosen.keep = partial(keep, result, name, chosen.json)  # what comes later may fail
        result[name] = measure(name, chosen, device, max(measured.values()))
        release(device)
    return finish(result, chosen.json)


if __name__ == "__main__":
    raise SystemExit(main())
