"""The decoder: ONE definition under training, generation, reinforcement learning, quantization and serving.

Legend: B batch, T new tokens, S cached + new tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.errors import BadInput
from pellucid.nn.block import run_layers
from pellucid.nn.build import build_layer
from pellucid.nn.cache import KVCache
from pellucid.nn.context import Context, Routing, open_context, padding_positions
from pellucid.nn.linear import NORMS, Linear, embedding
from pellucid.nn.mtp import PredictionLayer, same_document
from pellucid.nn.site import Site
from pellucid.nn.specs import DecoderSpec


class Decoder(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V).

    positions: (B, T), default 0, 1, ...; or counted behind the cache; or from `mask`.
    documents: (B, T) ids of packed documents; attention stays within equal ids.   parents: (B, T), the document that a token's own
    goes on from, which it sees too: several continuations of one text stand behind it in a row (see `context.branching`).
    mask: (B, T), 1 = real token, for padded batches.   cache: a `KVCache` that is read and extended.
    routing: collects what the routers of a mixture of experts decide (for balance losses).
    compute_dtype: the dtype of activations; None means the weights' own.
    """

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.spec = spec
        self.compute_dtype: torch.dtype | None = None
        self.embed = embedding(spec.vocab, spec.dim)
        self.positions = embedding(spec.context, spec.dim) if spec.positions == "learned" else None
        self.layers = nn.ModuleList(
            build_layer(layer, Site(spec.dim, spec.eps, spec.norm, i)) for i, layer in enumerate(spec.layers))
        self.norm = NORMS[spec.norm](spec.dim, spec.eps)
        self.head = None if spec.tied else Linear(spec.dim, spec.vocab)
        site = Site(spec.dim, spec.eps, spec.norm)
        self.mtp = nn.ModuleList(PredictionLayer(build_layer(layer, site), site) for layer in spec.mtp)

    @property
    def head_weight(self) -> Tensor:
        """(V, D)"""
        return self.embed.weight if self.head is None else self.head.weight

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None,
        cache: KVCache | None = None, mask: Tensor | None = None, routing: Routing | None = None, parents: Tensor | None = None,
    ) -> Tensor:
        """The last hidden state (B, T, D), after the final norm."""
        if positions is None and cache is None and mask is not None:
            positions = padding_positions(mask)
        dtype = self.compute_dtype or self.embed.weight.dtype
        ctx = open_context(tokens, dtype, positions, documents, cache, mask, parents=parents)
        ctx.routing = routing
        return self.run(tokens, ctx)

    def run(self, tokens: Tensor, ctx: Context) -> Tensor:
        """The last hidden state (B, T, D) in a context that is open already; an engine brings one of segments."""
        x = self.embedded(tokens)
        if self.positions is not None:
            if tokens.shape[1] > self.spec.context and (last := int(ctx.positions.max())) >= self.spec.context:
                raise BadInput(f"a text of {last + 1} tokens", f"this model has {self.spec.context} positions", "cut the text")
            x = x + F.embedding(ctx.positions, self.positions.weight).to(x.dtype)
        x = run_layers(self.layers, x, ctx)
        if ctx.cache is not None:
            ctx.cache.advance(tokens.shape[1])
        return self.norm(x)  # type: ignore[no-any-return]

    def embedded(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)"""
        x = F.embedding(tokens, self.embed.weight)
        if self.spec.embed_scale != 1:
            x = x * x.new_full((), self.spec.embed_scale)  # the factor is rounded to the weights' dtype, as in training
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

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

    def predict(
        self, depth: int, tokens: Tensor, hidden: Tensor, positions: Tensor | None = None, documents: Tensor | None = None,
        cache: KVCache | None = None, mask: Tensor | None = None, routing: Routing | None = None,
    ) -> Tensor:
        """Multi-token prediction by the layer of that depth (1: the first): hidden states (B, T, D) whose `logits` are of the token
        behind `tokens`. For speculative decoding; see nn/mtp.py.

        hidden: of the places `depth` before `tokens`, from `hidden` (depth 1) or from this function for the depth before.
        positions: of `tokens`.  cache: of `prediction_spec`.
        """
        embedded = self.embedded(tokens)
        ctx = open_context(tokens, embedded.dtype, positions, documents, cache, mask)
        ctx.routing = routing
        out: Tensor = self.mtp[depth - 1](embedded, hidden, ctx)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return out

    def predict_all(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor | None = None, documents: Tensor | None = None,
        mask: Tensor | None = None, routing: Routing | None = None,
    ) -> list[Tensor]:
        """The same for whole sequences, as in training: for each depth k the hidden states (B, T - k, D), of which the i-th predicts
        token i + k + 1. hidden (B, T, D): what `hidden` gives for the same arguments. See `prediction_loss`."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None] if mask is None else padding_positions(mask)
        states = []
        for k in range(1, len(self.mtp) + 1):
            hidden = self.predict(
                k, tokens[:, k:], hidden[:, :-1], positions[:, k:], None if documents is None else same_document(documents, k),
                mask=None if mask is None else mask[:, :-k].bool() & mask[:, k:].bool(), routing=routing)
            states.append(hidden)
        return states
