"""The gated delta net (arXiv 2412.06464), built from a `GDN` spec: linear attention, whose cache does not grow.

Legend: B batch, T new tokens, D model width, K key heads of width d, H value heads of width e, C = 2 K d + H e channels that the
convolution sees, W its width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.nn.context import Context
from pellucid.nn.linear import Linear, RMSNorm
from pellucid.nn.site import Site
from pellucid.nn.specs import GDN
from pellucid.ops import causal_conv, gated_delta, l2_norm


class GatedDeltaNet(nn.Module):
    """x (B, T, D) -> (B, T, D). What is kept of the past: the memory (B, H, d, e) in float32, and the last W - 1 inputs of the
    convolution (B, W - 1, C). Padding is multiplied out of x, so that it enters neither of them."""

    wide = ("A_log", "dt_bias")

    def __init__(self, spec: GDN, site: Site):
        super().__init__()
        self.spec, self.index = spec, site.index
        self.keys, self.values = spec.k_heads * spec.k_dim, spec.v_heads * spec.v_dim
        q, v, H = self.keys, self.values, spec.v_heads
        self.in_proj = Linear(site.dim, (q, q, v, v, H, H), groups=spec.k_heads)  # q, k, v, z, b, a
        self.conv = nn.Parameter(torch.zeros(2 * q + v, 1, spec.conv))
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(H)), nn.Parameter(torch.ones(H))
        self.norm = RMSNorm(spec.v_dim, site.eps)  # of each value head; not centred, even where the model's own norms are
        self.out = Linear(v, site.dim)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        if ctx.real is not None:
            x = x * ctx.real[..., None].to(x.dtype)
        kept = {} if ctx.cache is None else ctx.cache.states[self.index]
        mixed, z, b, a = self.in_proj(x).split((2 * self.keys + self.values, self.values, *(self.spec.v_heads,) * 2), -1)
        mixed, inputs = causal_conv(mixed, self.conv[:, 0], kept.get("inputs"), ctx.documents)
        q, k, v = self.heads(F.silu(mixed))
        decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        y, memory = gated_delta(q, k, v, decay.mT, b.sigmoid().mT, kept.get("memory"), ctx.documents)
        if ctx.cache is not None:
            ctx.cache.states[self.index] = {"memory": memory, "inputs": inputs}
        y = self.norm(y.transpose(1, 2)) * F.silu(z.float()).unflatten(-1, (self.spec.v_heads, -1))
        return self.out(y.flatten(2).to(x.dtype))  # type: ignore[no-any-return]

    def heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> q, k (B, K, T, d) of length 1 / sqrt(d) and 1, v (B, H, T, e)."""
        s = self.spec
        q, k, v = mixed.split((self.keys, self.keys, self.values), -1)
        q, k = (l2_norm(t.unflatten(-1, (s.k_heads, s.k_dim)).transpose(1, 2)) for t in (q, k))
        return q * s.k_dim**-0.5, k, v.unflatten(-1, (s.v_heads, s.v_dim)).transpose(1, 2)

    @torch.no_grad()
    def draw_own(self, generator: torch.Generator) -> None:
        """As the paper's code does (and Mamba-2's): rates of decay up to 16, step sizes from 0.001 to 0.1 spread evenly in their
        logarithm, of which dt_bias is what softplus makes them from."""
        self.conv.uniform_(-1, 1, generator=generator).mul_(self.spec.conv**-0.5)
        self.A_log.uniform_(0.01, 16, generator=generator).log_()
        step = self.dt_bias.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
