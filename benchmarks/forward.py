"""Forward, forward and backward, and single steps of decoding, in tokens/s, for dense models, mixtures of experts and latent attention,
beside transformers with the same weights.

    pellucid bench forward --out benchmarks/results/forward.json
    python benchmarks/forward.py --experts      the paths of ops.experts instead, over numbers of tokens

transformers runs with each attention and each implementation of experts that a CPU can run in bearable time; its default on a CPU
is sdpa with grouped_mm. Ratios are given to that default and to the fastest of them. Weights and activations are float32, or
bfloat16; gradients are made for all parameters, from the mean cross-entropy. Logits are compared before anything is timed. Each
library is one process, in turns with the other; pellucid has freed memory kept for the next step, as its training loop does.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import Contestant, begin, finish, in_turns, options, quiet_transformers, ratios, table, take_turns
from pellucid.engine.decode import choose_step
from pellucid.models import load, save
from pellucid.nn import MLA, MLP, Attn, Decoder, DecoderSpec, KVCache, Layer, MoE, Rope, count_parameters, init_weights
from pellucid.ops import (
    ExpertWeights,
    choose_experts,
    chunked_cross_entropy,
    experts_few,
    experts_grouped,
    experts_reference,
    experts_sorted,
    pairs_by_expert,
    route,
)
from pellucid.runtime import choose_threads, keep_freed_memory

VOCAB, DIM = 4096, 512
ATTN = Attn(8, 4, 64, Rope(64, 1e6), qk_norm=True)
LATENT = MLA(8, None, 256, 64, 64, Rope(32, interleaved=True))


def model(layers: int, layer: Layer, **fields: Any) -> DecoderSpec:
    return DecoderSpec(VOCAB, DIM, (layer,) * layers, context=2048, **fields)


SPECS = {
    "dense": model(10, Layer(ATTN, MLP(1536)), family="qwen3"),
    "64 experts, 8 a token": model(6, Layer(ATTN, MoE(64, 8, 128, renormalize=True)), family="qwen3_moe"),  # Qwen3-MoE's proportions
    "8 experts, 2 a token": model(6, Layer(Attn(8, 4, 64, Rope(64, 1e6)), MoE(8, 2, 1024, renormalize=True)), family="mixtral"),
    "latent attention": model(10, Layer(LATENT, MLP(1536)), family="deepseek_v3", extra=(
        ("n_routed_experts", 8), ("num_experts_per_tok", 2), ("moe_intermediate_size", 128), ("n_shared_experts", 1), ("first_k_dense_replace", 10))),
}

MODES = ("forward", "forward and backward", "decoding")
PROMPT, STEPS = 64, 8  # of decoding: single tokens for all rows behind a prompt
Call = Callable[[], int]  # one round of work; returns its number of tokens


def peers(spec: DecoderSpec, mode: str) -> list[tuple[str, str]]:
    """(attention, experts) of transformers, its default first."""
    if not any(isinstance(layer.ffn, MoE) for layer in spec.layers):
        return [("sdpa", ""), ("eager", "")]
    batched = [("sdpa", "batched_mm")] if mode == "decoding" else []  # it copies an expert's weights for every token
    return [("sdpa", "grouped_mm"), ("eager", "grouped_mm"), ("sdpa", "eager"), *batched]


class Ours:
    def __init__(self, folder: str, dtype: str):
        keep_freed_memory()
        self.model = load(folder, dtype=dtype)
        self.step = choose_step(self.model).value
        self.cache: KVCache | None = None

    def calls(self, spec: DecoderSpec, x: Tensor) -> list[Call]:
        return [partial(getattr(self, mode.replace(" ", "_")), x) for mode in MODES]

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> int:
        self.logits(x)
        return x.numel()

    def forward_and_backward(self, x: Tensor) -> int:
        labels = x[:, 1:].flatten()
        hidden = self.model.hidden(x)[:, :-1].flatten(0, 1)
        (chunked_cross_entropy(hidden, self.model.head_weight, labels) / len(labels)).backward()
        self.model.zero_grad()
        return x.numel()

    @torch.no_grad()
    def decoding(self, x: Tensor) -> int:
        if self.cache is None:
            self.cache = KVCache(self.model.spec, len(x), PROMPT + STEPS, dtype=self.model.embed.weight.dtype)
            self.model(x[:, :PROMPT], cache=self.cache)
        self.cache.length = PROMPT
        for i in range(PROMPT, PROMPT + STEPS):
            self.step(x[:, i], self.cache)
        return len(x) * STEPS


class Theirs:
    def __init__(self, folder: str, dtype: str):
        from transformers import AutoModelForCausalLM

        quiet_transformers()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.keys: Any = None

    def calls(self, spec: DecoderSpec, x: Tensor) -> list[Call]:
        return [partial(self.as_peer, *peer, partial(getattr(self, mode.replace(" ", "_")), x))
                for mode in MODES for peer in peers(spec, mode)]

    def as_peer(self, attention: str, experts: str, call: Call) -> int:
        self.model.set_attn_implementation(attention)
        if experts:
            self.model.set_experts_implementation(experts)
        return call()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x, use_cache=False).logits  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> int:
        self.logits(x)
        return x.numel()

    def forward_and_backward(self, x: Tensor) -> int:
        self.model(input_ids=x, labels=x, use_cache=False).loss.backward()
        self.model.zero_grad()
        return x.numel()

    @torch.no_grad()
    def decoding(self, x: Tensor) -> int:
        from transformers import DynamicCache

        if self.keys is None:
            self.keys = DynamicCache(config=self.model.config)
            self.model(input_ids=x[:, :PROMPT], past_key_values=self.keys)
        if (longer := self.keys.get_seq_length() - PROMPT) > 0:
            self.keys.crop(-longer)
        for i in range(PROMPT, PROMPT + STEPS):
            self.model(input_ids=x[:, i : i + 1], past_key_values=self.keys)
        return len(x) * STEPS


def contestant(what: dict[str, Any]) -> tuple[dict[str, Any], Call, Callable[[], dict[str, Any]]]:
    """One library: some logits, and its calls, of which each turn takes the next (twice: the first time is not measured)."""
    choose_threads(what["threads"])
    x = torch.randint(0, VOCAB, (what["rows"], what["length"]), generator=torch.Generator().manual_seed(0))
    library = (Ours if what["library"] == "pellucid" else Theirs)(what["folder"], what["dtype"])
    turns = itertools.cycle([call for call in library.calls(SPECS[what["model"]], x) for _ in range(2)])
    return {"logits": library.logits(x[:1, :32])[0, -1, :64].tolist()}, lambda: next(turns)(), lambda: {}


def compare(name: str, dtype: str, common: dict[str, Any], rounds: int, seconds: float) -> dict[str, Any]:
    spec, start = SPECS[name], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        save(init_weights(Decoder(spec)).to(getattr(torch, dtype)), Path(folder) / "model")
        what = common | {"model": name, "dtype": dtype, "folder": str(Path(folder) / "model")}
        ours, theirs = (Contestant(__file__, what | {"library": library}) for library in ("pellucid", "transformers"))
    check(torch.tensor(ours.ready["logits"]), torch.tensor(theirs.ready["logits"]), dtype)
    rates: dict[str, dict[str, list[float]]] = {mode: {} for mode in MODES}
    for turn in range(rounds + 1):
        for mode in MODES:
            found = {"pellucid": ours.turn(), **{" ".join(("transformers", *filter(None, peer))): theirs.turn() for peer in peers(spec, mode)}}
            for key, rate in found.items() if turn else ():
                rates[mode].setdefault(key, []).append(rate)
        if turn >= 2 and time.perf_counter() - start > seconds:
            break
    ours.end(), theirs.end()
    return {mode: told(f"{name}, {dtype}, {mode}", found) for mode, found in rates.items()}


def check(got: Tensor, want: Tensor, dtype: str) -> None:
    share = ((got - want).norm() / want.norm()).item()
    if not share < {"float32": 1e-4, "bfloat16": 0.2}[dtype]:  # rounded, a router may choose another expert
        raise SystemExit(f"the logits differ by {share:.1e} of their size before anything is timed")


def told(title: str, rates: dict[str, list[float]]) -> dict[str, Any]:
    found = {key: {"median": round(statistics.median(r), 1), "best": round(max(r), 1), "rounds": len(r)} for key, r in rates.items()}
    table(title, found)
    default, *others = (key for key in found if key != "pellucid")
    fastest = max((default, *others), key=lambda key: found[key]["median"])
    return {"tokens_per_second": found, "fastest_peer": fastest, "ratios": ratios(
        found, {"to the default": ("pellucid", default), f"to {fastest},": ("pellucid", fastest)})}


def compare_experts(rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of the paths of ops.experts without gradients, and which is chosen."""
    found: dict[str, Any] = {}
    for dtype, (D, E, k, width) in itertools.product((torch.float32, torch.bfloat16), ((512, 64, 8, 128), (1024, 32, 4, 512), (512, 8, 2, 1024))):
        w = ExpertWeights((torch.randn(E, 2 * width, D) * D**-0.5).to(dtype), (torch.randn(E, D, width) * width**-0.5).to(dtype))
        for N in (1, 8, 32, 64, 128, 256, 1024, 4096):
            x, pairs = torch.randn(N, D).to(dtype), pairs_by_expert(*route(torch.randn(N, E), k), E)
            paths = {"reference": experts_reference, "grouped": experts_grouped, "sorted": experts_sorted}
            paths |= {"few": experts_few} if N <= 256 else {}
            with torch.no_grad():
                times = in_turns({name: partial(path, x, pairs, w) for name, path in paths.items()}, rounds, seconds)
            name = f"{str(dtype).removeprefix('torch.')} D{D} E{E} k{k} I{width} N{N}"
            found[name] = {path: round(1000 * statistics.median(t), 3) for path, t in times.items()} | {"chosen": choose_experts(x, pairs, w)[0]}
            print(f"  {name}: {found[name]}", flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, seconds=60.0, rounds=4)
    parser.add_argument("--models", nargs="+", choices=list(SPECS), default=list(SPECS))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--experts", action="store_true", help="compare the paths of ops.experts instead")
    chosen = parser.parse_args(argv)
    if chosen.contestant:
        return take_turns(lambda: contestant(chosen.contestant))
    result = begin("experts" if chosen.experts else "forward", chosen)
    if chosen.experts:
        result["milliseconds"] = compare_experts(chosen.rounds, 0.5)
        return finish(result, chosen.json)
    result |= {"rows": chosen.rows, "tokens_per_row": chosen.length, "models": {}}
    common = {"rows": chosen.rows, "length": chosen.length, "threads": chosen.threads}
    for name in chosen.models:
        result["models"][name] = {"parameters": count_parameters(SPECS[name]), **{
            dtype: compare(name, dtype, common, chosen.rounds, chosen.seconds) for dtype in ("float32", "bfloat16")}}
    return finish(result, chosen.json)


if __name__ == "__main__":
    raise SystemExit(main())
