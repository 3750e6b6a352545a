"""The encoder: every token sees every other one (or, in CLIP's text tower, those before it).

Legend: B batch, T tokens, D model width, V vocabulary, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.errors import BadInput
from pellucid.nn.block import run_layers
from pellucid.nn.build import build_layer
from pellucid.nn.context import open_context
from pellucid.nn.linear import Linear, embedding
from pellucid.nn.site import Site
from pellucid.nn.specs import EncoderSpec
from pellucid.ops import ACTIVATIONS


class Encoder(nn.Module):
    """tokens (B, T) int64 -> last hidden state (B, T, D).

    mask: (B, T), 1 = real token.   types: (B, T), which of the two texts of a pair a token belongs to; default all 0.
    positions: (B, T), default 0, 1, ... whatever the mask: absolute positions are counted from the left end, as in the
    reference, so pad on the right.   documents: (B, T) ids of packed documents; then give positions too.
    compute_dtype: the dtype of activations; None means the weights' own.
    """

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        self.spec = spec
        self.compute_dtype: torch.dtype | None = None
        site, D = Site(spec.dim, spec.eps, spec.norm), spec.dim
        self.embed = embedding(spec.vocab, D)
        self.positions = embedding(spec.context, D) if spec.positions == "learned" else None
        self.types = embedding(spec.token_types, D) if spec.token_types else None
        self.embed_norm = site.new_norm() if spec.embed_norm else None
        self.layers = nn.ModuleList(
            build_layer(layer, Site(D, spec.eps, spec.norm, i)) for i, layer in enumerate(spec.layers))
        self.norm = site.new_norm() if spec.final_norm else None
        self.pooler = Linear(D, D, bias=True) if spec.pooler else None
        self.head = MaskedHead(spec, site) if spec.head == "mlm" else None
        self.classifier = Linear(D, len(spec.labels), bias=True) if spec.head == "classifier" else None

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, types: Tensor | None = None, positions: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        x = self.embedded(tokens, types, positions)
        causal = self.spec.layers[0].mixer.causal
        ctx = open_context(tokens, x.dtype, positions, documents, mask=mask, causal=causal)
        x = run_layers(self.layers, x, ctx)
        return x if self.norm is None else self.norm(x)

    def embedded(self, tokens: Tensor, types: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Words, types and positions added up: (B, T) -> (B, T, D)"""
        x = F.embedding(tokens, self.embed.weight)
        if self.types is not None:
            x = x + (self.types.weight[0] if types is None else F.embedding(types, self.types.weight))
        if self.positions is not None:
            places = self.positions.weight
            if positions is None and tokens.shape[1] > len(places):
                raise BadInput(f"a text of {tokens.shape[1]} tokens", f"this model has {len(places)} positions", "cut the text")
            x = x + (places[: tokens.shape[1]] if positions is None else F.embedding(positions, places))
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        return x if self.embed_norm is None else self.embed_norm(x)

    def pooled(self, hidden: Tensor) -> Tensor:
        """tanh(W h[0]): (B, T, D) -> (B, D), from the first token."""
        if self.pooler is None:
            raise ValueError("this encoder has no pooler")
        return torch.tanh(self.pooler(hidden[:, 0]))

    def logits(self, hidden: Tensor) -> Tensor:
        """Of a masked language model (..., D) -> (..., V); of a classifier (B, T, D) -> (B, C)."""
        if self.head is not None:
            return self.head(hidden, self.embed.weight)  # type: ignore[no-any-return]
        if self.classifier is not None:
            return self.classifier(self.pooled(hidden))  # type: ignore[no-any-return]
        raise ValueError("this encoder has no head: its result is the hidden state")


class MaskedHead(nn.Module):
    """norm(act(W h)) E^T + b, with E (V, D) the embedding's own matrix."""

    def __init__(self, spec: EncoderSpec, site: Site):
        super().__init__()
        self.act = spec.layers[0].ffn.act
        self.dense = Linear(spec.dim, spec.dim, bias=True)
        self.norm = site.new_norm()
        self.bias = nn.Parameter(torch.zeros(spec.vocab))

    def draw_own(self, generator: torch.Generator) -> None:
        self.bias.zero_()

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        h = self.norm(ACTIVATIONS[self.act](self.dense(hidden)))
        return F.linear(h, embedding.to(h.dtype), self.bias.to(h.dtype))
