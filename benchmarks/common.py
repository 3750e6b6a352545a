"""What the benchmarks share: sizes, contestants that take turns, one model in both libraries, the result file.

Contestants run on the same machine, with the same threads, in turns (A B C, A B C, ...), so that a busy moment hits all
of them. Each is a process of its own, as its user would run it: what one library asks of the allocator, or leaves in
caches and heaps, neither helps nor hurts another. Medians and fastest rounds are both kept, and ratios of both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pellucid.models import save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, count_parameters, init_weights
from pellucid.runtime import choose_threads, machine_card, release_memory

SIZES = {  # dim, layers, heads, key/value heads, head dim, feed-forward width
    "1M": (128, 4, 4, 2, 32, 384),
    "5M": (256, 6, 8, 4, 32, 768),
    "30M": (512, 10, 8, 4, 64, 1536),
}


def spec_of(size: str, vocab: int = 2048, context: int = 1024) -> DecoderSpec:
    """A Qwen3 of about that many parameters."""
    D, layers, H, K, d, hidden = SIZES[size]
    layer = Layer(Attn(H, K, d, Rope(d), qk_norm=True), MLP(hidden))
    return DecoderSpec(vocab, D, (layer,) * layers, tied=True, context=context)


def write_twin(size: str, folder: Path) -> Path:
    """The folder that both libraries open: the same weights, in float32."""
    save(init_weights(Decoder(spec_of(size))), folder)
    return folder


class Contestant:
    """The parent's side: a process that runs `script --contestant WHAT` and answers one JSON line a turn."""

    def __init__(self, script: str, what: dict[str, Any]):
        command = [sys.executable, script, "--contestant", json.dumps(what)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._answer()

    def turn(self) -> float:
        """tokens/s"""
        print("turn", file=self.process.stdin, flush=True)
        return float(self._answer()["rate"])

    def end(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.close()
        last = self._answer()
        self.process.wait()
        return last

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a contestant failed; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def take_turns(prepare: Callable[[], tuple[dict[str, Any], Callable[[], int], Callable[[], dict[str, Any]]]]) -> int:
    """A contestant's side. `prepare` gives what to say when ready, one round of work (it returns its number of tokens), and
    what to say at the end.

    Every turn begins with a round that is not measured, and ends by giving free memory back: the activations of all
    contestants would not fit beside each other.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(fields: dict[str, Any]) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    ready, call, last = prepare()
    answer(ready)
    for _ in sys.stdin:
        call()
        began = time.perf_counter()
        tokens = call()
        answer({"rate": tokens / (time.perf_counter() - began)})
        release_memory()
    answer(last())
    return 0


def contest(contestants: dict[str, Contestant], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """tokens/s of every contestant: `rounds` rounds, fewer once `seconds` have passed (but two at least), after one that
    is not kept."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    start = time.perf_counter()
    for turn in range(rounds + 1):
        for name, contestant in contestants.items():
            rate = contestant.turn()
            if turn:
                found[name].append(rate)
        if turn >= 2 and time.perf_counter() - start > seconds:
            break
    return {name: {"median": round(statistics.median(r), 1), "best": round(max(r), 1), "rounds": len(r)} for name, r in found.items()}


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of every call of one process, for what is compared within a library; rounds as in `contest`."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - began)
        if turn >= 2 and time.perf_counter() - start > seconds:
            break
    return times


def table(title: str, rows: dict[str, dict[str, float]], unit: str = "tokens/s") -> None:
    print(title)
    for name, row in rows.items():
        print(f"  {name:36s} {row['median']:10.0f} {unit} (best round {row['best']:.0f})", flush=True)


def ratios(rows: dict[str, dict[str, float]], pairs: dict[str, tuple[str, str]]) -> dict[str, dict[str, float]]:
    """How many times as fast the first of each pair is: by medians, and by fastest rounds (steadier on a busy machine)."""
    found = {title: {kind: round(rows[a][kind] / rows[b][kind], 3) for kind in ("median", "best")} for title, (a, b) in pairs.items()}
    print("  " + "; ".join(f"{title} {r['median']:.2f}x (best rounds {r['best']:.2f}x)" for title, r in found.items()), flush=True)
    return found


def options(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="keep the result here")
    parser.add_argument("--threads", type=int, help="PyTorch threads (default: all usable cores)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=240.0, help="stop a comparison after about so long")
    parser.add_argument("--contestant", type=json.loads, help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)
    return parser


def begin(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """The head of a result: what was run, on what."""
    import transformers

    quiet_transformers()
    torch.manual_seed(0)
    threads = choose_threads(chosen.threads)
    print(f"{name}: {threads} threads")
    return {"benchmark": name, "threads": threads.value, "created": time.strftime("%Y-%m-%d"),
            "machine": machine_card() | {"transformers": transformers.__version__}}


def quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def finish(result: dict[str, Any], path: Path | None) -> int:
    """Keeps the result where asked; the last line of stdout is the result itself."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, separators=(",", ":")))
    return 0


def parameters(size: str) -> int:
    return count_parameters(spec_of(size))
