"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), built from an `MLA` spec.

Legend: B batch, T new tokens, S all tokens, D model width, H heads; n entries of a head's key that are not rotated, r that
are, c of a latent, e of a value.
"""

from __future__ import annotations

from torch import Tensor, nn

from pellucid.nn.context import Context
from pellucid.nn.indexer import LightningIndexer
from pellucid.nn.linear import Linear, RMSNorm
from pellucid.nn.site import Site
from pellucid.nn.specs import MLA
from pellucid.ops import apply_rope, bias_of, chosen_mask, latent_attention


class LatentAttention(nn.Module):
    """x (B, T, D) -> (B, T, D). What a token leaves behind is its latent (c) and one rotated key (r), not keys and values of all
    heads; with an indexer also that one's key."""

    def __init__(self, spec: MLA, site: Site):
        super().__init__()
        self.spec, self.index = spec, site.index
        H, head = spec.heads, spec.nope + spec.rope.dim
        self.scale = head**-0.5 if spec.scale is None else spec.scale
        if spec.q_rank is None:
            self.q = Linear(site.dim, H * head)
        else:
            self.q_a = Linear(site.dim, spec.q_rank, spec.bias)
            self.q_norm = RMSNorm(spec.q_rank, spec.eps)
            self.q_b = Linear(spec.q_rank, H * head)
        self.kv_a = Linear(site.dim, spec.kv_rank + spec.rope.dim, spec.bias)
        self.kv_norm = RMSNorm(spec.kv_rank, spec.eps)
        self.kv_b = Linear(spec.kv_rank, H * (spec.nope + spec.v_dim))
        self.o = Linear(H * spec.v_dim, site.dim, spec.bias)
        self.indexer = None
        if spec.indexer is not None:
            assert spec.q_rank is not None, "an indexer reads the queries' latent"
            self.indexer = LightningIndexer(spec.indexer, spec.q_rank, spec.rope, site)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        q_latent, q = self.queries(x)
        q_nope, q_rope = self.turned(q, ctx)
        kept = self.entries(x, ctx)
        if ctx.cache is not None:
            kept = ctx.cache.extend(self.index, *kept)
        latent, k_rope, bias = kept[0], kept[1], ctx.bias(x.dtype)
        if self.indexer is not None:
            latent, k_rope, bias = self.chosen(self.indexer, x, q_latent, kept, ctx)
        up = self.kv_b.weight.unflatten(0, (self.spec.heads, -1))  # (H, n + e, c)
        out = latent_attention(q_nope, q_rope, latent, k_rope, up, mask=bias, scale=self.scale)
        return self.o(out.transpose(1, 2).flatten(2).to(x.dtype))  # type: ignore[no-any-return]

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The queries' latent (x itself where there is none), and queries (B, T, H, n + r)."""
        if self.spec.q_rank is None:
            return x, self.q(x).unflatten(-1, (self.spec.heads, -1))
        latent = self.q_norm(self.q_a(x))
        return latent, self.q_b(latent).unflatten(-1, (self.spec.heads, -1))

    def turned(self, heads: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """(B, T, H, m + r) -> (B, H, T, m), and the last r entries, rotated: (B, H, T, r)."""
        rope = self.spec.rope
        cos, sin = ctx.rotation(rope)
        assert cos is not None and sin is not None
        plain, turn = heads.split((heads.shape[-1] - rope.dim, rope.dim), -1)
        turn = apply_rope(turn, cos, sin, heads_last=True, interleaved=rope.interleaved)
        return plain.transpose(1, 2), turn.transpose(1, 2)

    def entries(self, x: Tensor, ctx: Context) -> tuple[Tensor, ...]:
        """What the new tokens leave in the cache: latents (B, 1, T, c), rotated keys (B, 1, T, r), the indexer's keys."""
        latent, k_rope = self.turned(self.kv_a(x)[:, :, None], ctx)
        entries = self.kv_norm(latent), k_rope
        return entries if self.indexer is None else (*entries, self.indexer.keys(x, ctx))

    def chosen(
        self, indexer: LightningIndexer, x: Tensor, q_latent: Tensor, kept: tuple[Tensor, ...], ctx: Context,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """latent, k_rope and bias of what the indexer leaves visible: for one new token only the chosen keys, gathered; for
        several all keys, and the choice as a mask."""
        (latent, k_rope, keys), T, bias = kept, x.shape[1], ctx.bias(x.dtype)
        end = latent.shape[2] if ctx.cache is None else ctx.cache.length + T  # columns behind it are empty
        if end <= indexer.spec.top_k:
            return latent, k_rope, bias
        latent, k_rope, keys = latent[:, :, :end], k_rope[:, :, :end], keys[:, :, :end]
        seen = None if ctx.mask is None else ctx.mask[:, 0, :, :end]
        chosen = indexer.choose(x, q_latent, keys, seen, ctx)
        if T > 1:
            mask = chosen_mask(chosen, end) if seen is None else chosen_mask(chosen, end) & seen
            return latent, k_rope, bias_of(mask[:, None], x.dtype)
        rows = chosen.mT  # (B, k, 1)
        latent, k_rope = (t[:, 0].gather(1, rows.expand(-1, -1, t.shape[-1]))[:, None] for t in (latent, k_rope))
        if bias is not None:
            bias = bias[:, 0, 0, :end].expand(len(chosen), -1).gather(1, chosen[:, 0])[:, None, None]
        return latent, k_rope, bias
