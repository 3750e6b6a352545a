"""Batched sampling tokens/s of pellucid beside transformers' `generate`: same weights, prompts and lengths, in turns.

    pellucid bench sample --out benchmarks/results/sample.json

128 prompts of 32 tokens on the ~1 M parameter model. "fixed": every answer has 64 tokens. "ragged": answers end at
different lengths, from 8 to 128 tokens, as real answers do: one pass with `generate` goes on until the longest is done,
pellucid lets finished sequences go. Tokens counted are those asked for.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from common import finish, options, turns
from pellucid.engine import Sample, SamplingParams, run_all
from pellucid.models import save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, count_parameters, init_weights

BATCH, PROMPT = 128, 32


def main(argv: list[str] | None = None) -> int:
    asked = options(__doc__, argv, rounds=3)
    layer = Layer(Attn(4, 2, 32, Rope(32), qk_norm=True), MLP(384))
    model = init_weights(Decoder(DecoderSpec(2048, 128, (layer,) * 4, tied=True, context=512))).eval()
    with tempfile.TemporaryDirectory() as folder:
        save(model, f"{folder}/model")
        theirs = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    half = init_weights(Decoder(model.spec)).to(torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 2048, (BATCH, PROMPT), generator=generator)
    ragged = (8 + 120 * torch.rand(BATCH, generator=generator) ** 2).int().tolist()
    rows = []
    for lengths, kind in (([64] * BATCH, "fixed"), (ragged, "ragged")):
        for temperature in (0.0, 1.0):
            speeds = turns({
                "pellucid float32": ours(model, prompts, lengths, temperature),
                "pellucid bfloat16": ours(half, prompts, lengths, temperature),
                "transformers": generate(theirs, prompts, lengths, temperature),
            }, asked.rounds)
            ratios = {k: v / speeds["transformers"] for k, v in speeds.items() if k != "transformers"}
            rows.append({"lengths": kind, "temperature": temperature, "parameters": count_parameters(model.spec), "batch": BATCH,
                         "tokens_per_second": speeds, "ratio": ratios})
            print(f"{kind} T={temperature:g} " + "  ".join(f"{k} {v:,.0f}" for k, v in speeds.items())
                  + "   times " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()), flush=True)
    finish("sample", rows, asked.json)
    return 0


def ours(model: Decoder, prompts: torch.Tensor, lengths: list[int], temperature: float) -> Callable[[], int]:
    params = SamplingParams(temperature=temperature, ignore_eos=True)

    def run() -> int:
        samples = [Sample(p, replace(params, max_tokens=n), i) for i, (p, n) in enumerate(zip(prompts.tolist(), lengths))]
        run_all(model, samples, [])
        return sum(len(s.tokens) for s in samples)

    return run


def generate(model: torch.nn.Module, prompts: torch.Tensor, lengths: list[int], temperature: float) -> Callable[[], int]:
    longest = max(lengths)

    def run() -> int:
        with torch.inference_mode():
            model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=longest, min_new_tokens=longest,
                           do_sample=temperature > 0, top_k=0, pad_token_id=0)
        return sum(lengths)

    return run


if __name__ == "__main__":
    sys.exit(main())
