"""Sampling tokens/s beside transformers' `generate`: same weights, same prompts, batch 128.

    pellucid bench sample --out benchmarks/results/sample.json

Workloads: "fixed": every answer has the same length.  "mixed": answers end where an end token is drawn, at lengths that
differ widely (geometric, mean about 100), as they do in reinforcement learning and in serving; the tokens of each
library's own answers are counted. Greedy answers of both are compared token by token first (in float32).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import (
    SIZES,
    Contestant,
    begin,
    contest,
    finish,
    options,
    parameters,
    quiet_transformers,
    ratios,
    spec_of,
    table,
    take_turns,
    write_twin,
)
from pellucid.engine import Sample, SamplingParams, run_all
from pellucid.engine import batch as engine_batch
from pellucid.engine.native_batch import choose_step
from pellucid.models import load
from pellucid.nn import Decoder, KVCache
from pellucid.runtime import choose_threads

ENDS = list(range(3, 23))  # 20 of 2048 tokens: near-uniform draws end with probability of about 1 % at each token


def prompts_of(count: int, groups: int, vocab: int) -> list[list[int]]:
    """`groups` prompts of 16 to 32 tokens, each `count // groups` times: a problem and its samples."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 33, (groups,), generator=g).tolist()
    return [p for n in lengths for p in [torch.randint(100, vocab, (n,), generator=g).tolist()] * (count // groups)]


def padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, padded on the left."""
    longest = max(map(len, prompts))
    x, mask = torch.zeros(len(prompts), longest, dtype=torch.int64), torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, p in enumerate(prompts):
        x[row, longest - len(p) :], mask[row, longest - len(p) :] = torch.tensor(p), 1
    return x, mask


def ours_call(model: Decoder, prompts: list[list[int]], most: int, temperature: float, mixed: bool) -> Callable[[], list[list[int]]]:
    def call() -> list[list[int]]:
        params = SamplingParams(max_tokens=most, temperature=temperature, ignore_eos=not mixed)
        call.seed += len(prompts)  # type: ignore[attr-defined]
        samples = [Sample(p, params, call.seed + i) for i, p in enumerate(prompts)]  # type: ignore[attr-defined]
        run_all(model, samples, ENDS if mixed else [0])
        return [s.tokens for s in samples]

    call.seed = 0  # type: ignore[attr-defined]
    return call


def their_call(model: Any, prompts: list[list[int]], most: int, temperature: float, mixed: bool) -> Callable[[], list[list[int]]]:
    x, mask = padded(prompts)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    length = {"max_new_tokens": most, "eos_token_id": ENDS} if mixed else {"max_new_tokens": most, "eos_token_id": None}

    def call() -> list[list[int]]:
        rows = model.generate(x, attention_mask=mask, pad_token_id=0, **sampling, **length)[:, x.shape[1] :].tolist()
        return [row[: next((i + 1 for i, t in enumerate(row) if t in ENDS), len(row))] if mixed else row for row in rows]

    return call


class Stopwatch:
    """Adds up the seconds spent in methods while it is on."""

    def __init__(self, **methods: tuple[type, str]):
        self.methods, self.seconds = methods, dict.fromkeys(methods, 0.0)

    def __enter__(self) -> Stopwatch:
        self.originals = {name: getattr(owner, method) for name, (owner, method) in self.methods.items()}
        for name, (owner, method) in self.methods.items():
            setattr(owner, method, self._timed(name, self.originals[name]))
        self.start = time.perf_counter()
        return self

    def _timed(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return timed

    def __exit__(self, *_: object) -> None:
        self.total = time.perf_counter() - self.start
        for name, (owner, method) in self.methods.items():
            setattr(owner, method, self.originals[name])

    def shares(self) -> dict[str, float]:
        shares = {name: round(s / self.total, 3) for name, s in self.seconds.items()}
        return shares | {"the rest": round(1 - sum(shares.values()), 3)}


def split(model: Decoder, call: Callable[[], Any]) -> dict[str, float]:
    with Stopwatch(prefill=(engine_batch.Batch, "_prefill"), model=(type(choose_step(model).value), "__call__"),
                   sampler=(engine_batch.Sampler, "__call__"), copies=(KVCache, "keep")) as watch:
        call()
    return watch.shares()


def contestant(what: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], int], Callable[[], dict[str, Any]]]:
    """One of those that are compared, in this process: the beginnings of its greedy answers, a round, where its time goes."""
    choose_threads(what["threads"])
    prompts = prompts_of(what["batch"], what["prompts"], spec_of(what["size"]).vocab)
    workload = what["most"], what["temperature"], what["mixed"]
    if what["kind"] == "pellucid":
        model = load(what["folder"], dtype=what["dtype"])
        made, greedy = ours_call(model, prompts, *workload), ours_call(model, prompts, 24, 0.0, False)
    else:
        from transformers import AutoModelForCausalLM

        quiet_transformers()
        theirs = AutoModelForCausalLM.from_pretrained(what["folder"], dtype=getattr(torch, what["dtype"])).eval()
        made, greedy = their_call(theirs, prompts, *workload), their_call(theirs, prompts, 24, 0.0, False)
    return ({"greedy": greedy()}, lambda: sum(map(len, made())),
            lambda: {"split": split(model, made)} if what["kind"] == "pellucid" else {})


def compare(size: str, batch: int, groups: int, most: int, rounds: int, seconds: float, threads: int | None) -> dict[str, Any]:
    result: dict[str, Any] = {"parameters": parameters(size), "batch": batch, "prompts": groups}
    with tempfile.TemporaryDirectory() as folder:
        twin = write_twin(size, Path(folder) / "model")
        for title, temperature, mixed, length in (("fixed length, greedy", 0.0, False, most), ("fixed length, temperature 1", 1.0, False, most),
                                                  ("mixed lengths, temperature 1", 1.0, True, 3 * most)):
            common = {"size": size, "folder": str(twin), "threads": threads, "batch": batch, "prompts": groups, "most": length,
                      "temperature": temperature, "mixed": mixed}
            contestants = {f"{kind} {short}": Contestant(__file__, common | {"kind": kind, "dtype": dtype})
                           for kind in ("pellucid", "transformers") for short, dtype in (("float32", "float32"), ("bf16", "bfloat16"))}
            if contestants["pellucid float32"].ready["greedy"] != contestants["transformers float32"].ready["greedy"]:
                raise SystemExit("greedy answers differ: nothing to compare")
            result["greedy_equal"] = True
            found = contest(contestants, rounds, seconds)
            table(f"{size}, batch {batch} ({groups} prompts), at most {length} tokens: {title}", found)
            compared = ratios(found, {"float32 / float32": ("pellucid float32", "transformers float32"),
                                      "bf16 / bf16": ("pellucid bf16", "transformers bf16"),
                                      "bf16 / float32": ("pellucid bf16", "transformers float32")})
            last = {name: c.end() for name, c in contestants.items()}
            shares = {name: last[f"pellucid {name}"]["split"] for name in ("float32", "bf16")}
            print("  where pellucid's time goes (bf16): " + ", ".join(f"{k} {v:.0%}" for k, v in shares["bf16"].items()), flush=True)
            result[title] = {"max_tokens": length, "tokens_per_second": found, "ratios": compared, "split": shares}
    return result


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["1M"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=16, help="different prompts in the batch")
    parser.add_argument("--max-tokens", type=int, default=96)
    chosen = parser.parse_args(argv)
    if chosen.contestant:
        return take_turns(partial(contestant, chosen.contestant))
    result = begin("sample", chosen)
    result["sizes"] = {size: compare(size, chosen.batch, chosen.prompts, chosen.max_tokens, chosen.rounds, chosen.seconds, chosen.threads)
                       for size in chosen.sizes}
    return finish(result, chosen.json)


if __name__ == "__main__":
    raise SystemExit(main())
