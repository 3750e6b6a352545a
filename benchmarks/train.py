"""Training tokens/s of pellucid beside plain transformers code: same configuration, data, AdamW, machine, in turns.

    pellucid bench train --out benchmarks/results/train.json

transformers: Qwen3ForCausalLM(input_ids, labels), loss.backward(), AdamW, in float32 and under bfloat16 autocast.
nanoGPT style: a plain eager GPT (LayerNorm, GELU, learned positions, SDPA) of about the same size, bfloat16 autocast.
pellucid: its own step in bfloat16 activations. Each turn is two optimizer steps of 16 rows x 256 tokens (4 x 256 at 30 M).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from common import finish, options, turns
from pellucid.models.families import config_of
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, count_parameters, init_weights
from pellucid.ops import chunked_cross_entropy

SIZES = {"1M": (128, 4, 4, 2, 384, 2048, 16), "5M": (256, 5, 8, 2, 704, 4096, 16), "30M": (512, 8, 8, 4, 1408, 8192, 4)}
LENGTH, STEPS = 256, 2


def main(argv: list[str] | None = None) -> int:
    asked = options(__doc__, argv, rounds=3)
    rows = []
    for name, (dim, layers, heads, kv_heads, ffn, vocab, batch) in SIZES.items():
        d = dim // heads
        layer = Layer(Attn(heads, kv_heads, d, Rope(d), qk_norm=True), MLP(ffn))
        spec = DecoderSpec(vocab, dim, (layer,) * layers, tied=True, context=LENGTH)
        tokens = torch.randint(0, vocab, (batch, LENGTH + 1), generator=torch.Generator().manual_seed(0))
        speeds = turns({
            "pellucid": ours(spec, tokens), "transformers float32": theirs(spec, tokens, False),
            "transformers bfloat16": theirs(spec, tokens, True), "nanoGPT style bfloat16": nano(spec, tokens),
        }, asked.rounds)
        ratios = {k: speeds["pellucid"] / v for k, v in speeds.items() if k != "pellucid"}
        rows.append({"size": name, "parameters": count_parameters(spec), "tokens_per_second": speeds, "ratio": ratios})
        print(f"{name:>4} " + "  ".join(f"{k} {v:,.0f}" for k, v in speeds.items())
              + "   times " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()), flush=True)
    finish("train", rows, asked.json)
    return 0


def repeated(model: nn.Module, loss: Callable[[], Tensor], tokens: int) -> Callable[[], int]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def run() -> int:
        for _ in range(STEPS):
            loss().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return STEPS * tokens

    return run


def ours(spec: DecoderSpec, tokens: Tensor) -> Callable[[], int]:
    model = init_weights(Decoder(spec))
    model.compute_dtype = torch.bfloat16
    inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()

    def loss() -> Tensor:
        hidden = model.hidden(inputs).flatten(0, 1)
        return chunked_cross_entropy(hidden, model.head_weight.to(hidden.dtype), labels) / len(labels)

    return repeated(model, loss, len(labels))


def theirs(spec: DecoderSpec, tokens: Tensor, half: bool) -> Callable[[], int]:
    model = Qwen3ForCausalLM(Qwen3Config(**config_of(spec))).train()
    inputs = tokens[:, :-1].contiguous()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(input_ids=inputs, labels=inputs).loss

    return repeated(model, loss, inputs.numel())


class NanoBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def nano(spec: DecoderSpec, tokens: Tensor) -> Callable[[], int]:
    dim, heads = spec.dim, spec.layers[0].mixer.heads
    embed, positions = nn.Embedding(spec.vocab, dim), nn.Embedding(LENGTH, dim)
    model = nn.ModuleList([embed, positions, *[NanoBlock(dim, heads) for _ in spec.layers], nn.LayerNorm(dim)])
    inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = embed(inputs) + positions(torch.arange(LENGTH))
            for block in list(model)[2:]:
                x = block(x)
            return F.cross_entropy(F.linear(x, embed.weight).flatten(0, 1), labels)

    return repeated(model, loss, len(labels))


if __name__ == "__main__":
    sys.exit(main())
