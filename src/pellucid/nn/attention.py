"""Multi-head attention with grouped key/value heads, built from an `Attn` spec.

Legend: B batch, T new tokens, S all tokens, H query heads, K key/value heads, d head dim, D model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from pellucid.nn.context import Context
from pellucid.nn.linear import Linear, RMSNorm
from pellucid.nn.specs import Attn
from pellucid.ops import attention, qkv_heads


class Attention(nn.Module):
    """x (B, T, D) -> (B, T, D). One product makes q, k and v; q and k are normed and turned together."""

    def __init__(self, spec: Attn, dim: int, eps: float, index: int, norm: type[RMSNorm] = RMSNorm):
        super().__init__()
        self.spec, self.index = spec, index
        H, K, d = spec.heads, spec.kv_heads, spec.head_dim
        self.qkv = Linear(dim, (H * d, K * d, K * d), spec.qkv_bias)
        self.o = Linear(H * d, dim, spec.out_bias)
        if spec.qk_norm:
            self.q_norm, self.k_norm = norm(d, eps), norm(d, eps)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        B, T, _ = x.shape
        H, K, d = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        cos, sin = ctx.rotation(self.spec.rope)
        norms = (self.q_norm.scale, self.k_norm.scale) if self.spec.qk_norm else None
        eps = self.q_norm.eps if self.spec.qk_norm else 0.0
        q, k, v = qkv_heads(self.qkv(x).view(B, T, H + 2 * K, d), H, cos, sin, norms, eps, self.spec.rope.interleaved)
        end = T
        if ctx.cache is not None:
            end = ctx.cache.length + T
            k, v = ctx.cache.extend(self.index, k, v)
            q = q.to(k.dtype)
        bias = ctx.bias(q.dtype)
        if self.spec.window is not None and k.shape[2] > end:  # a window counts from the last key: no empty ones there
            k, v, bias = k[:, :, :end], v[:, :, :end], None if bias is None else bias[..., :end]
        out = attention(q, k, v, mask=bias, window=self.spec.window, scale=self.spec.scale)
        return self.o(out.transpose(1, 2).reshape(B, T, H * d).to(x.dtype))
