"""Attention of a decoder to an encoder's output, built from the `cross` spec of a layer.

Legend: B batch, T target tokens, S source tokens, H query heads, K key/value heads, d head dim, D model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from pellucid.nn.context import Context
from pellucid.nn.linear import Linear
from pellucid.nn.site import Site
from pellucid.nn.specs import Attn
from pellucid.ops import attention


class CrossAttention(nn.Module):
    """x (B, T, D) -> (B, T, D): queries from x, keys and values from `ctx.memory` (B, S, D).

    With a cache, keys and values are made once, in the first pass, and kept among the layer's states.
    """

    def __init__(self, spec: Attn, site: Site):
        super().__init__()
        self.spec, self.index = spec, site.index
        H, K, d = spec.heads, spec.kv_heads, spec.head_dim
        self.q = Linear(site.dim, H * d, spec.qkv_bias)
        self.kv = Linear(site.dim, (K * d, K * d), spec.qkv_bias)
        self.o = Linear(H * d, site.dim, spec.out_bias)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        q = self.q(x).unflatten(-1, (self.spec.heads, -1)).transpose(1, 2)
        k, v = self.memory(ctx)
        out = attention(q.to(k.dtype), k, v, causal=False, mask=ctx.memory_bias(k.dtype), scale=self.spec.scale)
        return self.o(out.transpose(1, 2).flatten(2).to(x.dtype))  # type: ignore[no-any-return]

    def memory(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """k, v (B, K, S, d)"""
        kept = {} if ctx.cache is None else ctx.cache.states[self.index]
        if "memory_k" not in kept:
            if ctx.memory is None:
                raise ValueError("cross-attention needs the encoder's output, or a cache that has seen it")
            kv = self.kv(ctx.memory).unflatten(-1, (2, self.spec.kv_heads, -1))
            kept["memory_k"], kept["memory_v"] = kv.permute(2, 0, 3, 1, 4)
        return kept["memory_k"], kept["memory_v"]
