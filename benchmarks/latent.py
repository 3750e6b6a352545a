"""Multi-head latent attention beside transformers': one layer of DeepSeek-V2-Lite's sizes, the same weights, in one process, in turns.

    python benchmarks/latent.py --json benchmarks/results/latent.json

forward: a prompt without a cache, and with its gradients.  step: one new token behind a cache of so many; transformers makes keys and
values of all heads anew from the cached latents (expanded), ours works on the latents (absorbed). All results are compared first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import begin, finish, in_turns, options, rates, ratios, table
from pellucid.models.hub import spec_of
from pellucid.models.known import find_config
from pellucid.nn import KVCache, Layer
from pellucid.nn.build import build
from pellucid.nn.context import open_context
from pellucid.nn.site import Site

NAMES = {"q": "q_proj", "kv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_b": "kv_b_proj", "o": "o_proj"}


class Pair:
    """The layer in both libraries, with shared weights, and calls on either."""

    def __init__(self, dtype: torch.dtype):
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
            DeepseekV3Attention,
            DeepseekV3RotaryEmbedding,
        )

        fields = find_config("deepseek-v2-lite")
        self.spec, self.dtype = spec_of(fields), dtype
        self.config = DeepseekV3Config(**{k: v for k, v in fields.items() if k != "model_type"})
        self.config._attn_implementation = "sdpa"
        self.theirs, self.rope = DeepseekV3Attention(self.config, 0), DeepseekV3RotaryEmbedding(self.config)
        self.theirs.to(dtype)
        self.mixer = self.spec.layers[0].mixer
        self.ours = build(self.mixer, Site(self.spec.dim, self.spec.eps, "rms"))
        for mine, name in NAMES.items():
            getattr(self.ours, mine).weight = getattr(self.theirs, name).weight

    def forward(self, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        T = x.shape[1]
        positions = torch.arange(T)[None]
        return {"ours": lambda: self.ours(x, open_context(x[..., 0], x.dtype, positions)),
                "transformers": lambda: self.theirs(x, self.rope(x, positions), None)[0]}

    def step(self, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        """The last token of x behind a cache of the others."""
        from transformers import DynamicCache

        T = x.shape[1]
        cache, past = KVCache(self.cached_spec(), len(x), T, dtype=x.dtype), DynamicCache(config=self.config)
        positions = torch.arange(T)[None]
        self.ours(x[:, :-1], open_context(x[:, :-1, 0], x.dtype, cache=cache))
        cache.advance(T - 1)
        self.theirs(x[:, :-1], self.rope(x, positions[:, :-1]), None, past)
        layer, last = past.layers[0], positions[:, -1:]
        kept = layer.keys, layer.values

        def theirs() -> Tensor:
            layer.keys, layer.values = kept
            return self.theirs(x[:, -1:], self.rope(x, last), None, past)[0]  # type: ignore[no-any-return]

        return {"ours": lambda: self.ours(x[:, -1:], open_context(x[:, -1:, 0], x.dtype, cache=cache)), "transformers": theirs}

    def cached_spec(self) -> Any:
        from dataclasses import replace

        return replace(self.spec, layers=(Layer(self.mixer, None),))


def with_gradients(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        call().sum().backward()
        return torch.empty(0)

    return run


def main(argv: list[str] | None = None) -> int:
    chosen = options(__doc__, rounds=7, seconds=25.0).parse_args(argv)
    result = begin("latent", chosen) | {"layer": "deepseek-v2-lite", "cases": {}}
    for dtype in (torch.float32, torch.bfloat16):
        pair = Pair(dtype)
        word = str(dtype).removeprefix("torch.")
        for name, B, T in (("forward", 1, 512), ("forward and backward", 1, 512), ("step", 1, 1024), ("step", 8, 1024), ("step", 1, 8192)):
            x = torch.randn(B, T, pair.spec.dim, generator=torch.Generator().manual_seed(T)).to(dtype)
            with torch.set_grad_enabled("backward" in name):
                calls = pair.step(x) if name == "step" else pair.forward(x)
                a, b = (calls[k]().detach().float() for k in ("ours", "transformers"))
                worst = float((a - b).norm() / b.norm())
                assert worst < (1e-4 if dtype == torch.float32 else 0.02), f"{name}: the libraries differ by {worst:.1e}"
                if "backward" in name:
                    calls = {k: with_gradients(call) for k, call in calls.items()}
                title = f"{name}, {word}, batch {B}, {T} tokens"
                rows = rates(in_turns(calls, chosen.rounds, chosen.seconds / 5), B if name == "step" else B * T)
            table(title, rows)
            result["cases"][title] = {"tokens_per_second": rows, "differ": worst, **ratios(rows, {"times as fast": ("ours", "transformers")})}
    return finish(result, chosen.json)


if __name__ == "__main__":
    raise SystemExit(main())
