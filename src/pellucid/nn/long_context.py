"""Attention beyond the trained context: blocks for `Attn.reach`, in place of plain attention, with its weights.

Both keep relative positions within what was trained, by turning a query differently for near and for far keys.
Legend: B batch, T new tokens, S all keys, H query heads, K key/value heads, d head dim. i: a query's position, j: a key's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pellucid.nn.attention import Attention
from pellucid.nn.context import Context
from pellucid.ops import apply_rope, attention, attention_of_versions, visible


class LongAttention(Attention):
    def turned(self, x: Tensor, positions: Tensor, ctx: Context) -> Tensor:
        """x (B, H or K, T, d) turned by any positions (B or 1, T)."""
        if self.rope.dim == 0:
            return x
        cos, sin = ctx.angles(self.rope, positions)
        return apply_rope(x, cos.to(x.dtype), sin.to(x.dtype), interleaved=self.rope.interleaved)

    def met(self, versions: list[Tensor], k: Tensor, v: Tensor, which: Tensor) -> Tensor:
        return attention_of_versions(versions, k, v, which, scale=self.spec.scale, sinks=self.sinks)


class StreamingAttention(LongAttention):
    """StreamingLLM (arXiv 2309.17453): a query sees the first s tokens (the sinks, which attention rests on) and the last W.

    Positions are those inside the cache: the distance to a near key is i - j, to a sink that is far away it is s + W - 1 - j, as if
    the sinks stood right before the window. So keys are kept as they were before the rotation, and turned when they are read.
    What is kept is of constant size, whatever the length: keys and values (B, K, s + W, d), the window's as a ring.
    """

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        q, k, v, gate = self.heads(x, ctx, None, None)
        s, reach = self.sizes
        i = ctx.positions.expand(x.shape[:2])
        if ctx.real is not None:
            i = i.masked_fill(~ctx.real, -1)
        begin = i.masked_fill(i < 0, torch.iinfo(i.dtype).max).amin(1, keepdim=True)  # (B, 1): of the first new token
        seen = None
        if ctx.cache is None:
            j, seen = i, ctx.mask
        else:
            k, v, j = self.kept(k, v, i, begin, ctx.cache)
        past = (begin - (reach - 1)).clamp_min(0)  # what has left the cache before the first new token
        near, far = self.turned(q, (i - past).clamp_min(0), ctx), self.turned(q, i.clamp(0, reach - 1), ctx)
        k = self.turned(k, torch.where(j < s, j, j - past).clamp_min(0), ctx)
        return self.joined(self.met([near, far], k, v, self.which(i[..., None], j[:, None], seen)), gate, x.dtype)

    @property
    def sizes(self) -> tuple[int, int]:
        """The sinks, and all that is kept."""
        reach: Any = self.spec.reach
        return reach.sinks, reach.sinks + reach.window

    def which(self, i: Tensor, j: Tensor, seen: Tensor | None) -> Tensor:
        """(B, T, S): 0 for keys within the window, 1 for the sinks, -1 for those that are not seen."""
        s, reach = self.sizes
        kept = (j >= 0) & (j <= i) & ((j > i - (reach - s)) | (j < s))
        if seen is not None:
            kept = kept & seen[:, 0]
        return torch.where(j < s, 1, 0).masked_fill(~kept, -1)

    def kept(self, k: Tensor, v: Tensor, i: Tensor, begin: Tensor, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Takes the new tokens' keys and values into the cache; returns what they may see: keys, values, positions (B, S)."""
        s, reach = self.sizes
        state = cache.states[self.index]
        if not state:
            state["k"], state["v"] = (x.new_zeros(*x.shape[:2], reach, x.shape[3]) for x in (k, v))
        old_k, old_v, j = state["k"], state["v"], self.places(begin)
        if k.shape[2] > 1:  # early queries still see what later ones push out
            old_k, old_v, j = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2), torch.cat((j, i), 1)
        stays = (i >= 0) & ((i < s) | (i > i.amax(1, keepdim=True) - (reach - s)))
        row, column = stays.nonzero(as_tuple=True)
        place = i[row, column]
        place = torch.where(place < s, place, s + (place - s) % (reach - s))
        state["k"][row, :, place], state["v"][row, :, place] = k[row, :, column], v[row, :, column]
        return (old_k, old_v, j) if k.shape[2] > 1 else (old_k, old_v, self.places(begin + 1))

    def places(self, tokens: Tensor) -> Tensor:
        """tokens (B, 1) that have been kept -> (B, s + W): which position each place of the cache holds, -1 for none."""
        s, reach = self.sizes
        place = torch.arange(reach, device=tokens.device)[None]
        last = tokens - 1
        ring = last - (last - place) % (reach - s)  # the newest position that falls on this place
        found = torch.where(place < s, place, ring)
        return found.masked_fill((found > last) | ((place >= s) & (found < s)), -1)


class DualChunkAttention(LongAttention):
    """Dual chunk attention (arXiv 2402.17463): the text is cut into chunks of s = size - local tokens, and keys stand at position
    j mod s. A query stands at i mod s for keys of its own chunk; for the chunk before at i mod s + s, but at most size - 1, so that
    the nearest `local` keys across the border keep their true distances; for all earlier chunks at size - 1.

    Where the spec says how long the trained sequences were, the keys of longer ones are stretched, which sharpens the scores
    (Qwen2.5-1M, arXiv 2501.15383, section 3.1; by the length at the time when a key is written, as in vLLM). So a long prompt read in
    pieces differs a little from one read at once, unless the cache knows the prompt's length beforehand, as the engine's does.
    """

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        q, k, v, gate = self.heads(x, ctx, None, None)
        reach: Any = self.spec.reach
        i, s = ctx.positions, reach.size - reach.local
        if reach.trained:
            k = k * self.sharpness(ctx, reach.trained).to(k.dtype)[:, None, None, None]
        k, j, bias = self.turned(k, i % s, ctx), i, ctx.bias(q.dtype)
        if ctx.cache is not None:
            end = ctx.cache.length + x.shape[1]
            k, v = ctx.cache.extend(self.index, k, v)
            q, bias = q.to(k.dtype), ctx.bias(k.dtype)
            columns = torch.arange(k.shape[2], device=k.device)[None]
            j = (i[:, -1:] + columns - (end - 1)).clamp_min(0)
        if int(i.max()) < s:  # no border yet: attention as it always is
            out = attention(self.turned(q, i, ctx), k, v, causal=True, mask=bias, scale=self.spec.scale, sinks=self.sinks)
            return self.joined(out, gate, x.dtype)
        own, before = self.turned(q, i % s, ctx), self.turned(q, (i % s + s).clamp_max(reach.size - 1), ctx)
        far = self.turned(q, torch.full_like(i, reach.size - 1), ctx)
        seen = visible(x.shape[1], k.shape[2], device=k.device)[None] if ctx.mask is None else ctx.mask[:, 0]
        chunks = ((i // s)[..., None] - (j // s)[:, None]).clamp(0, 2)
        return self.joined(self.met([own, before, far], k, v, chunks.masked_fill(~seen, -1)), gate, x.dtype)

    @staticmethod
    def sharpness(ctx: Context, trained: int) -> Tensor:
        """(B or 1,) what the keys that are written now are multiplied by."""
        length = ctx.positions.amax(-1) + 1
        if ctx.cache is not None and ctx.cache.began is not None:
            length = torch.maximum(length, ctx.cache.began)
        return (0.1 * torch.log(length / trained) + 1).clamp_min(1.0)
