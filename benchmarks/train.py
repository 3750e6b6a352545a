"""Training tokens/s beside plain transformers code and a nanoGPT-style loop: same rows, same sizes, AdamW, clipping.

    pellucid bench train --out benchmarks/results/train.json

Every contestant does whole steps: forward, loss, backward, clipping, AdamW. transformers and pellucid start from the same
weights, and their first losses are compared. pellucid has freed memory kept for the next step, as its training loop does
(`runtime.keep_freed_memory`); the others leave the allocator as it is, as training scripts do. `--attention` compares the paths of `ops.attention` instead.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    SIZES,
    Contestant,
    begin,
    contest,
    finish,
    in_turns,
    options,
    parameters,
    quiet_transformers,
    ratios,
    spec_of,
    table,
    take_turns,
    write_twin,
)
from pellucid.models import load
from pellucid.nn import Decoder
from pellucid.ops import (
    attention_reference,
    attention_sdpa,
    attention_tiled,
    bias_of,
    choose_attention,
    chunked_cross_entropy,
)
from pellucid.optim import OptimConfig, build_optimizer
from pellucid.runtime import choose_threads, keep_freed_memory

LR = 3e-4


class PlainGPT(nn.Module):
    """GPT-2's block as nanoGPT-style code writes it: learned positions, LayerNorm, one product for q, k and v, SDPA, GELU."""

    def __init__(self, vocab: int, dim: int, layers: int, heads: int, context: int):
        super().__init__()
        self.heads = heads
        self.wte, self.wpe = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "ln1": nn.LayerNorm(dim), "attn": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim),
            "ln2": nn.LayerNorm(dim), "up": nn.Linear(dim, 4 * dim), "down": nn.Linear(4 * dim, dim)}) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.wte.weight
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        B, T = x.shape
        h = self.wte(x) + self.wpe(torch.arange(T))
        for b in self.blocks:
            q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in b["attn"](b["ln1"](h)).chunk(3, -1))
            h = h + b["proj"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            h = h + b["down"](F.gelu(b["up"](b["ln2"](h))))
        logits = self.head(self.norm(h))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.flatten())


def plain_step(model: nn.Module, loss_of: Callable[[], Tensor], bf16: bool) -> Callable[[], float]:
    """One step as training scripts write it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


class OurStep:
    """One step of pellucid, with the seconds of its parts."""

    def __init__(self, model: Decoder, rows: Tensor, labels: Tensor, dtype: torch.dtype | None, documents: Tensor | None = None):
        self.model, self.rows, self.labels, self.documents = model, rows, labels.flatten(), documents
        model.compute_dtype = dtype
        self.optimizer = build_optimizer(model, OptimConfig("adamw", lr=LR))
        keep_freed_memory()  # as `train.Stepper` does
        self.parts: dict[str, list[float]] = {}

    def __call__(self) -> float:
        clock, marks = time.perf_counter, [time.perf_counter()]
        hidden = self.model.hidden(self.rows, documents=self.documents).flatten(0, 1)
        marks.append(clock())
        loss = chunked_cross_entropy(hidden, self.model.head_weight, self.labels) / len(self.labels)
        marks.append(clock())
        loss.backward()
        marks.append(clock())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(clock())
        for name, a, b in zip(("layers forward", "head, loss and its gradient", "layers backward", "clip and AdamW"), marks, marks[1:]):
            self.parts.setdefault(name, []).append(b - a)
        return loss.item()

    def split(self) -> dict[str, float]:
        """Share of the step's median parts."""
        middle = {name: statistics.median(t[1:]) for name, t in self.parts.items()}
        return {name: round(t / sum(middle.values()), 3) for name, t in middle.items()}


def data(size: str, rows: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and labels (rows, T), and ids of documents of about 100 tokens, for rows that pack several."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, spec_of(size).vocab, (rows, T + 1), generator=generator)
    ends = torch.rand(rows, T, generator=generator) < 1 / 100
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), ends.cumsum(-1) - ends.long()


def contestant(what: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], int], Callable[[], dict[str, Any]]]:
    """One of those that are compared, in this process: its first loss, a step, and where its time goes."""
    choose_threads(what["threads"])
    size, T, bf16 = what["size"], what["length"], what["dtype"] == "bf16"
    x, labels, documents = data(size, what["rows"], T)
    step: Callable[[], float]
    if what["kind"] == "pellucid":
        model = load(what["folder"]).train()
        step = OurStep(model, x, labels, torch.bfloat16 if bf16 else None, documents if what["packed"] else None)
    elif what["kind"] == "transformers":
        from transformers import AutoModelForCausalLM

        quiet_transformers()
        theirs = AutoModelForCausalLM.from_pretrained(what["folder"], dtype=torch.float32)
        step = plain_step(theirs, lambda: theirs(input_ids=x, labels=labels, shift_labels=labels, use_cache=False).loss, bf16)
    else:
        D, layers, H, *_ = SIZES[size]
        gpt = PlainGPT(spec_of(size).vocab, D, layers, H, T)
        step = plain_step(gpt, lambda: gpt(x, labels), bf16)

    def call() -> int:
        step()
        return x.numel()

    return {"loss": step()}, call, lambda: {"split": step.split()} if isinstance(step, OurStep) else {}


def compare(size: str, rows: int, T: int, rounds: int, seconds: float, threads: int | None) -> dict[str, Any]:
    asked = [("pellucid", "bf16", False), ("pellucid", "bf16", True), ("transformers", "bf16", False), ("nanoGPT-style", "bf16", False),
             ("pellucid", "float32", False), ("transformers", "float32", False), ("nanoGPT-style", "float32", False)]
    with tempfile.TemporaryDirectory() as folder:
        common = {"size": size, "rows": rows, "length": T, "threads": threads, "folder": str(write_twin(size, Path(folder) / "model"))}
        contestants = {f"{kind} {dtype}{', packed documents' if packed else ''}":
                       Contestant(__file__, common | {"kind": kind, "dtype": dtype, "packed": packed}) for kind, dtype, packed in asked}
    check_first_losses({name: c.ready["loss"] for name, c in contestants.items()})
    found = contest(contestants, rounds, seconds)
    split = {name: c.end() for name, c in contestants.items()}["pellucid bf16"]["split"]
    table(f"{size} ({parameters(size) / 1e6:.2f}M parameters), {rows} x {T} tokens a step", found)
    compared = ratios(found, {
        "bf16 / transformers bf16": ("pellucid bf16", "transformers bf16"),
        "bf16 / transformers float32": ("pellucid bf16", "transformers float32"),
        "float32 / transformers float32": ("pellucid float32", "transformers float32"),
        "bf16 / nanoGPT-style bf16": ("pellucid bf16", "nanoGPT-style bf16")})
    print("  where pellucid's bf16 step goes: " + ", ".join(f"{name} {share:.0%}" for name, share in split.items()))
    return {"parameters": parameters(size), "rows": rows, "tokens_per_row": T, "tokens_per_second": found,
            "ratios": compared, "split": split}


def check_first_losses(losses: dict[str, float]) -> None:
    """Both libraries compute the same thing before they are timed."""
    for dtype, tolerance in (("float32", 1e-4), ("bf16", 1e-2)):
        got, want = losses[f"pellucid {dtype}"], losses[f"transformers {dtype}"]
        if not math.isclose(got, want, abs_tol=tolerance):
            raise SystemExit(f"the losses differ before the first step in {dtype}: {got} and {want}")


def forward_and_back(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> None:
    attention(q, k, v, mask=bias).sum().backward()


def compare_attention(rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of one call, forward and backward, of each path of `ops.attention`, with document masks."""
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for B, H, K, T, d in ((32, 4, 2, 128, 32), (16, 4, 2, 256, 32), (16, 8, 4, 256, 64), (4, 8, 4, 1024, 64), (1, 8, 4, 4096, 64)):
            q, k, v = (torch.randn(B, n, T, d).to(dtype).requires_grad_() for n in (H, K, K))
            documents = (torch.arange(T) // 100).expand(B, T)
            mask = (documents[:, None, :, None] == documents[:, None, None, :]) & torch.ones(T, T).tril().bool()
            bias = bias_of(mask, dtype)
            paths = {"sdpa": attention_sdpa, "tiled": attention_tiled} | ({"reference": attention_reference} if T < 512 else {})
            calls = {name: partial(forward_and_back, f, q, k, v, bias) for name, f in paths.items()}
            times = in_turns(calls, rounds, seconds)
            name = f"{str(dtype).removeprefix('torch.')} B{B} H{H} K{K} T{T} d{d}"
            found[name] = {path: round(1000 * statistics.median(t), 2) for path, t in times.items()} | {"chosen": choose_attention(q, k)[0]}
            print(f"  {name}: {found[name]}", flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--attention", action="store_true", help="compare the attention paths instead")
    chosen = parser.parse_args(argv)
    if chosen.contestant:
        return take_turns(partial(contestant, chosen.contestant))
    result = begin("attention" if chosen.attention else "train", chosen)
    if chosen.attention:
        result["milliseconds"] = compare_attention(chosen.rounds, chosen.seconds / 40)
    else:
        result["sizes"] = {size: compare(size, chosen.rows, chosen.length, chosen.rounds, chosen.seconds, chosen.threads)
                           for size in chosen.sizes}
    return finish(result, chosen.json)


if __name__ == "__main__":
    raise SystemExit(main())
