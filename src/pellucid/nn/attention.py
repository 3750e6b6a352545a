"""Multi-head attention with grouped key/value heads, built from an `Attn` spec.

Legend: B batch, T new tokens, S all tokens, H query heads, K key/value heads, d head dim, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pellucid.nn.context import Context
from pellucid.nn.linear import Linear
from pellucid.nn.site import Site
from pellucid.nn.specs import Attn
from pellucid.ops import attention, log_n_scale, qkv_heads


class Attention(nn.Module):
    """x (B, T, D) -> (B, T, D). One product makes q, k, v (and the gate); q and k are normed and turned together."""

    def __init__(self, spec: Attn, site: Site):
        super().__init__()
        self.spec, self.index = spec, site.index
        H, K, d = spec.heads, spec.kv_heads, spec.head_dim
        gate = (H * d,) if spec.gate else ()
        self.qkv = Linear(site.dim, (H * d, K * d, K * d, *gate), spec.qkv_bias, groups=H)
        self.o = Linear(H * d, site.dim, spec.out_bias)
        if spec.qk_norm:
            self.q_norm, self.k_norm = site.head_norm(d), site.head_norm(d)
        self.sinks = nn.Parameter(torch.zeros(H)) if spec.sinks else None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        B, T, _ = x.shape
        H, d = self.spec.heads, self.spec.head_dim
        q, k, v, gate = self.heads(x, ctx)
        if self.spec.logn:
            q = q * log_n_scale(ctx.positions, self.spec.logn).to(q.dtype)[:, None, :, None]
        end = T
        if ctx.cache is not None:
            end = ctx.cache.length + T
            k, v = ctx.cache.extend(self.index, k, v)
            q = q.to(k.dtype)
        bias = ctx.bias(q.dtype)
        if self.spec.window is not None and k.shape[2] > end:  # a window counts from the last key: no empty ones there
            k, v, bias = k[:, :, :end], v[:, :, :end], None if bias is None else bias[..., :end]
        out = attention(q, k, v, causal=self.spec.causal, mask=bias, window=self.spec.window, scale=self.spec.scale,
                        sinks=self.sinks)
        out = out.transpose(1, 2).reshape(B, T, H * d).to(x.dtype)
        return self.o(out if gate is None else out * torch.sigmoid(gate))  # type: ignore[no-any-return]

    def heads(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q (B, H, T, d), k, v (B, K, T, d), normed and turned, and the gate (B, T, H d) before its sigmoid."""
        H, K, d = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        qkv, gate = self.qkv(x), None
        if self.spec.gate:
            qkv, gate = qkv.split(((H + 2 * K) * d, H * d), -1)
        cos, sin = ctx.rotation(self.spec.rope)
        norms = (self.q_norm.scale, self.k_norm.scale) if self.spec.qk_norm else None
        eps = self.q_norm.eps if self.spec.qk_norm else 0.0
        q, k, v = qkv_heads(qkv.unflatten(-1, (H + 2 * K, d)), H, cos, sin, norms, eps, self.spec.rope.interleaved)
        return q, k, v, gate
