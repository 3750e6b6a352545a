"""The lightning indexer of DeepSeek-V3.2, built from an `Indexer` spec inside of latent attention.

Legend: B batch, T new tokens, S all tokens, D model width, H index heads, e their width.
"""

from __future__ import annotations

from torch import Tensor, nn

from pellucid.nn.context import Context
from pellucid.nn.linear import LayerNorm, Linear
from pellucid.nn.site import Site
from pellucid.nn.specs import Indexer, Rope
from pellucid.ops import apply_rope, choose_keys, index_scores


class LightningIndexer(nn.Module):
    """Chooses keys from small keys of its own, which the cache keeps. Its heads are [rotated | not], in halves, where those of
    latent attention are [not | rotated], in pairs."""

    def __init__(self, spec: Indexer, q_rank: int, rope: Rope, site: Site):
        super().__init__()
        self.spec, self.rope = spec, rope
        self.q = Linear(q_rank, spec.heads * spec.dim)  # from the latent that latent attention makes its queries of
        self.k = Linear(site.dim, spec.dim)
        self.k_norm = LayerNorm(spec.dim, 1e-6)
        self.weights = Linear(site.dim, spec.heads)
        self.weights.wide = ("weight",)  # type: ignore[assignment]

    def keys(self, x: Tensor, ctx: Context) -> Tensor:
        """x (B, T, D) -> (B, 1, T, e)"""
        return self._turned(self.k_norm(self.k(x))[:, :, None], ctx).transpose(1, 2)

    def choose(self, x: Tensor, q_latent: Tensor, keys: Tensor, seen: Tensor | None, ctx: Context) -> Tensor:
        """The keys (B, T, k) that each new token may see, of keys (B, 1, S, e); seen (B or 1, T or 1, S) or None."""
        q = self._turned(self.q(q_latent).unflatten(-1, (self.spec.heads, self.spec.dim)), ctx)
        w = self.weights(x.float()) * (self.spec.heads * self.spec.dim) ** -0.5
        return choose_keys(index_scores(q, keys[:, 0], w), self.spec.top_k, seen)

    def _turned(self, heads: Tensor, ctx: Context) -> Tensor:
        cos, sin = ctx.rotation(self.rope)
        assert cos is not None and sin is not None
        return apply_rope(heads, cos, sin, heads_last=True)
