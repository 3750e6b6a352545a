"""What the benchmarks share: sizes, timing in turns, one model in both libraries, the result file.

Contestants run in one process, on the same machine, with the same threads, in turns (A B C, A B C, ...), so that a busy
moment hits all of them. Medians and fastest rounds are both kept, and ratios of both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, count_parameters, init_weights
from pellucid.runtime import choose_threads, machine_card

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


def twins(size: str) -> tuple[Decoder, Any]:
    """The same weights twice: our decoder, and transformers' Qwen3ForCausalLM opened from the folder that we write."""
    from transformers import AutoModelForCausalLM

    from pellucid.models import save

    ours = init_weights(Decoder(spec_of(size)))
    with tempfile.TemporaryDirectory() as folder:
        save(ours, Path(folder) / "model")
        return ours, AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of every call: `rounds` rounds, fewer once `seconds` have passed (but two at least), after one unmeasured."""
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


def rates(times: dict[str, list[float]], tokens: float) -> dict[str, dict[str, float]]:
    """tokens/s of each contestant: of its median round, and of its fastest."""
    return {name: {"median": round(tokens / statistics.median(t), 1), "best": round(tokens / min(t), 1), "rounds": len(t)}
            for name, t in times.items()}


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
    parser.add_argument("--seconds", type=float, default=60.0, help="stop a comparison after about so long")
    parser.set_defaults(**defaults)
    return parser


def begin(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """The head of a result: what was run, on what."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    threads = choose_threads(chosen.threads)
    print(f"{name}: {threads} threads")
    return {"benchmark": name, "threads": threads.value, "created": time.strftime("%Y-%m-%d"),
            "machine": machine_card() | {"transformers": transformers.__version__}}


def finish(result: dict[str, Any], path: Path | None) -> int:
    """Keeps the result where asked; the last line of stdout is the result itself."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, separators=(",", ":")))
    return 0


def parameters(size: str) -> int:
    return count_parameters(spec_of(size))
