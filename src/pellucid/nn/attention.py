"""Multi-head attention with grouped key/value heads, built from an `Attn` spec.

Legend: B batch, T new tokens, S all tokens, H query heads, K key/value heads, d head dim, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pellucid.nn.context import Context
from pellucid.nn.linear import Linear
from pellucid.nn.site import Site
from pellucid.nn.specs import Attn, Rope
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
        T = x.shape[1]
        q, k, v, gate = self.heads(x, ctx, *ctx.rotation(self.rope))
        if (attend := getattr(ctx.cache, "attend", None)) is not None:  # a cache with kernels that read it where it lies
            return self.joined(attend(self.index, q, k, v, self.spec.window, self.spec.scale, self.sinks), gate, x.dtype)
        end = T
        if ctx.cache is not None:
            end = ctx.cache.length + T
            k, v = ctx.cache.extend(self.index, k, v)
            q = q.to(k.dtype)
        bias = ctx.bias(q.dtype)
        if self.spec.window is not None and k.shape[2] > end:  # a window counts from the last key: no empty ones there
            k, v, bias = k[:, :, :end], v[:, :, :end], None if bias is None else bias[..., :end]
        if bias is not None and bias.shape[-1] > k.shape[2]:  # a cache may leave out what lies behind the window
            bias = bias[..., bias.shape[-1] - k.shape[2] :]
        out = attention(q, k, v, causal=self.spec.causal, mask=bias, window=self.spec.window, scale=self.spec.scale,
                        sinks=self.sinks)
        return self.joined(out, gate, x.dtype)

    @property
    def rope(self) -> Rope:
        return self.spec.rope.in_training if self.training else self.spec.rope

    def joined(self, out: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Results of the heads (B, H, T, d) -> (B, T, D)"""
        out = out.transpose(1, 2).flatten(2).to(dtype)
        return self.o(out if gate is None else out * torch.sigmoid(gate))  # type: ignore[no-any-return]

    def heads(
        self, x: Tensor, ctx: Context, cos: Tensor | None, sin: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q (B, H, T, d), k, v (B, K, T, d), normed and turned (None: not turned), and the gate (B, T, H d) before its sigmoid."""
        H, K, d = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        qkv, gate = self.qkv(x), None
        if self.spec.gate:
            qkv, gate = qkv.split(((H + 2 * K) * d, H * d), -1)
        norms = (self.q_norm.scale, self.k_norm.scale) if self.spec.qk_norm else None
        eps = self.q_norm.eps if self.spec.qk_norm else 0.0
        q, k, v = qkv_heads(qkv.unflatten(-1, (H + 2 * K, d)), H, cos, sin, norms, eps, self.spec.rope.interleaved)
        if self.spec.logn and not self.training:
            q = q * log_n_scale(ctx.positions, self.spec.logn).to(q.dtype)[:, None, :, None]
        return q, k, v, gate
