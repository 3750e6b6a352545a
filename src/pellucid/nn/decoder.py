"""The decoder: ONE definition under training, generation, reinforcement learning, quantization and serving.

Legend: B batch, T new tokens, S cached + new tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.nn.block import Block
from pellucid.nn.build import build_layer
from pellucid.nn.cache import KVCache
from pellucid.nn.context import Context, Routing, document_mask, padding_positions
from pellucid.nn.linear import NORMS, Linear
from pellucid.nn.site import Site
from pellucid.nn.specs import DecoderSpec
from pellucid.ops import visible


class Decoder(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V).

    positions: (B, T), default 0, 1, ...; or counted behind the cache; or from `mask`.
    documents: (B, T) ids of packed documents; attention stays within equal ids.
    mask: (B, T), 1 = real token, for padded batches.   cache: a `KVCache` that is read and extended.
    routing: collects what the routers of a mixture of experts decide (for balance losses).
    compute_dtype: the dtype of activations; None means the weights' own.
    """

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.spec = spec
        self.compute_dtype: torch.dtype | None = None
        self.embed = nn.Embedding(spec.vocab, spec.dim)
        self.positions = nn.Embedding(spec.context, spec.dim) if spec.positions == "learned" else None
        self.layers = nn.ModuleList(
            build_layer(layer, Site(spec.dim, spec.eps, spec.norm, i)) for i, layer in enumerate(spec.layers))
        self.norm = NORMS[spec.norm](spec.dim, spec.eps)
        self.head = None if spec.tied else Linear(spec.dim, spec.vocab)

    @property
    def head_weight(self) -> Tensor:
        """(V, D)"""
        return self.embed.weight if self.head is None else self.head.weight

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None,
        cache: KVCache | None = None, mask: Tensor | None = None, routing: Routing | None = None,
    ) -> Tensor:
        """The last hidden state (B, T, D), after the final norm."""
        x = F.embedding(tokens, self.embed.weight)
        if self.spec.embed_scale != 1:
            x = x * x.new_tensor(self.spec.embed_scale)  # the factor is rounded to the weights' dtype, as in training
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        ctx = self._context(tokens, positions, documents, cache, mask, x.dtype)
        ctx.routing = routing
        if self.positions is not None:
            x = x + F.embedding(ctx.positions, self.positions.weight).to(x.dtype)
        first: Block = self.layers[0]  # type: ignore[assignment]
        x = first.enter(x)
        for layer in self.layers:
            x = layer(x, ctx)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(first.leave(x))  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        if self.head is None:
            return F.linear(hidden, self.embed.weight.to(hidden.dtype))
        return self.head(hidden)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None,
        cache: KVCache | None = None, mask: Tensor | None = None, routing: Routing | None = None,
    ) -> Tensor:
        return self.logits(self.hidden(tokens, positions, documents, cache, mask, routing))

    def _context(
        self, tokens: Tensor, positions: Tensor | None, documents: Tensor | None, cache: KVCache | None,
        mask: Tensor | None, dtype: torch.dtype,
    ) -> Context:
        T = tokens.shape[1]
        if cache is not None and (documents is not None or mask is not None):
            raise ValueError("a cache carries its own mask: documents and mask cannot be given with it")
        if positions is None:
            if cache is not None:
                positions = cache.positions(T)
            elif mask is not None:
                positions = padding_positions(mask)
            else:
                positions = torch.arange(T, device=tokens.device)[None]
        seen, real = None, None if mask is None else mask.bool()
        if documents is not None:
            seen = document_mask(documents)
        if mask is not None:
            keys = mask.bool()[:, None, None, :]
            seen = keys if seen is None else seen & keys
        if cache is not None:
            seen, real = cache.key_mask(T), cache.real(T)
        if seen is not None and T > 1:  # fold causality in once instead of once a layer
            seen = seen & visible(T, seen.shape[-1], device=tokens.device)
        return Context(positions, dtype, seen, cache, causal=seen is None, real=real, documents=documents)
