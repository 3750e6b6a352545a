"""Loading a checkpoint of about 1 GB: seconds and peak memory, beside transformers, each in processes of its own, in turns.

    pellucid bench load
    python benchmarks/load.py --json benchmarks/results/load.json

The checkpoint is random: a dense Qwen3 in bfloat16 in three shards, as large models on the Hub come, and the same with its
weights in float32 files. A process is asked for the time of its load call (imports and a tiny model's forward pass are paid before), for the time until
the first logits (a call may return before it has read anything: pages of a mapped file come when they are touched), and for the
largest resident size it ever had, as the kernel counts it (VmHWM: mapped file pages count too), less that before the call.
The files are in the page cache for everybody: what is compared is the work, not the disk.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import begin, finish, options
from pellucid.models import save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, count_parameters, init_weights

LAYER = Layer(Attn(16, 8, 128, Rope(128, 1e6), qk_norm=True), MLP(3072))
SPEC = DecoderSpec(65536, 1024, (LAYER,) * 26, tied=True, context=4096, family="qwen3")  # as Qwen3-0.6B, a smaller vocabulary
CASES = {"bf16 file -> bf16": ("bfloat16", "bfloat16"), "bf16 file -> float32": ("bfloat16", "float32"),
         "float32 file -> float32": ("float32", "float32")}

CHILD = """
import json, re, sys, time
import torch
library, folder, dtype = sys.argv[1:]
def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
if library == "pellucid":
    import pellucid.models, pellucid.nn
    from pellucid import load
    call = lambda: load(folder, dtype=dtype)
else:
    from transformers import AutoModelForCausalLM, logging
    import transformers.models.qwen3.modeling_qwen3
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    call = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
tiny = json.load(open(folder + "/config.json")) | {"num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 64, "intermediate_size": 16}
with torch.inference_mode():  # what a library imports and compiles for its first forward pass is not loading
    if library == "pellucid":
        pellucid.nn.init_weights(pellucid.nn.Decoder(pellucid.models.spec_of(tiny))).to(getattr(torch, dtype))(torch.arange(32)[None])
    else:
        from transformers import Qwen3Config, Qwen3ForCausalLM
        Qwen3ForCausalLM(Qwen3Config(**tiny)).to(getattr(torch, dtype))(torch.arange(32)[None])
before, start = resident("VmRSS"), time.perf_counter()
model = call()
seconds = time.perf_counter() - start
with torch.inference_mode():
    model(torch.arange(32)[None])
ready = time.perf_counter() - start
peak = resident("VmHWM") - before
weights = sum(p.nbytes for p in model.parameters())
sums = sum(float(p.detach().float().sum()) for p in model.parameters())
print(json.dumps({"seconds": seconds, "ready": ready, "peak": peak, "weights": weights, "sum": sums}))
"""


def measured(library: str, folder: Path, dtype: str) -> dict[str, float]:
    """One load in a new process."""
    done = subprocess.run([sys.executable, "-c", CHILD, library, str(folder), dtype], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compare(folder: Path, dtype: str, rounds: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {"pellucid": [], "transformers": []}
    for _ in range(rounds):
        for library, found in runs.items():
            found.append(measured(library, folder, dtype))
    assert len({round(r["sum"], 2) for found in runs.values() for r in found}) == 1, "the libraries read different weights"
    row: dict[str, Any] = {}
    for library, found in runs.items():
        row[library] = {"seconds": round(statistics.median(r["seconds"] for r in found), 3),
                        "best": round(min(r["seconds"] for r in found), 3),
                        "ready": round(statistics.median(r["ready"] for r in found), 3),
                        "best_ready": round(min(r["ready"] for r in found), 3),
                        "peak_over_weights": round(max(r["peak"] for r in found) / found[0]["weights"], 3)}
    ours, theirs = row["pellucid"], row["transformers"]
    return row | {"times_as_fast": {kind: round(theirs[kind] / ours[kind], 2) for kind in ("seconds", "best", "ready", "best_ready")}}


def main(argv: list[str] | None = None) -> int:
    chosen = options(__doc__, rounds=3).parse_args(argv)
    result = begin("load", chosen) | {"parameters": count_parameters(SPEC), "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        model = init_weights(Decoder(SPEC))
        for name in ("float32", "bfloat16"):
            save(model.to(getattr(torch, name)), Path(folder) / name, shard_bytes=400 * 10**6 if name == "bfloat16" else 10**10)
        del model
        for title, (stored, dtype) in CASES.items():
            row = result["cases"][title] = compare(Path(folder) / stored, dtype, chosen.rounds)
            print(f"{title}: " + "; ".join(
                f"{library} {row[library]['seconds']:.2f} s ({row[library]['ready']:.2f} to the first logits), peak {row[library]['peak_over_weights']:.2f} x weights"
                for library in ("pellucid", "transformers")) + f"; {row['times_as_fast']['seconds']:.2f} times as fast ({row['times_as_fast']['ready']:.2f})", flush=True)
    return finish(result, chosen.json)


if __name__ == "__main__":
    raise SystemExit(main())
