"""The original Transformer's shape (arXiv 1706.03762): an encoder reads the source, a decoder writes the target.

Legend: B batch, S source tokens, T target tokens, D model width, V target vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.nn.block import run_layers
from pellucid.nn.build import build_layer
from pellucid.nn.cache import KVCache
from pellucid.nn.context import Context, open_context
from pellucid.nn.linear import Linear, embedding
from pellucid.nn.site import Site
from pellucid.nn.specs import EncoderDecoderSpec, Layer
from pellucid.ops import sinusoids


class EncoderDecoder(nn.Module):
    """source (B, S), target (B, T) int64 -> logits (B, T, V); logits[:, t] are of the token behind target[:, t].

    source_mask, mask: (B, S) and (B, T), 1 = real token.   *_documents: ids of packed documents, which see only themselves
    and their own source; then give *_positions too.   cache: a `KVCache`: read and extended by the decoder.
    compute_dtype: the dtype of activations; None means the weights' own.
    """

    def __init__(self, spec: EncoderDecoderSpec):
        super().__init__()
        self.spec = spec
        self.compute_dtype: torch.dtype | None = None
        vocab = spec.target_vocab or spec.vocab
        self.embed = embedding(spec.vocab, spec.dim)
        self.target_embed = embedding(vocab, spec.dim) if spec.target_vocab else None
        self.encoder = Stack(spec.encoder, spec)
        self.decoder = Stack(spec.decoder, spec)
        self.head = None if spec.tied else Linear(spec.dim, vocab)
        self.logits_bias = nn.Parameter(torch.zeros(1, vocab), requires_grad=False) if spec.logits_bias else None

    def draw_own(self, generator: torch.Generator) -> None:
        """Vectors that have variance 1 once they are scaled, as much as the sinusoids that are added to them."""
        for table in (self.embed, self.target_embed):
            if table is not None and self.spec.embed_scale != 1:
                table.weight.normal_(0, 1 / self.spec.embed_scale, generator=generator)
        if self.logits_bias is not None:
            self.logits_bias.zero_()

    @property
    def head_weight(self) -> Tensor:
        """(V, D)"""
        return self.head.weight if self.head is not None else (self.target_embed or self.embed).weight

    def encode(
        self, source: Tensor, mask: Tensor | None = None, positions: Tensor | None = None, documents: Tensor | None = None,
    ) -> Tensor:
        """The memory (B, S, D) that the decoder attends to."""
        x = self.embedded(source, self.embed.weight)
        ctx = open_context(source, x.dtype, positions, documents, mask=mask, causal=False)
        return self.encoder(x + self.places(ctx.positions, x), ctx)  # type: ignore[no-any-return]

    def hidden(
        self, target: Tensor, memory: Tensor | None, source_mask: Tensor | None = None, mask: Tensor | None = None,
        cache: KVCache | None = None, positions: Tensor | None = None, documents: Tensor | None = None,
        source_documents: Tensor | None = None,
    ) -> Tensor:
        """The decoder's last hidden state (B, T, D). memory: None where the cache has seen it."""
        x = self.embedded(target, (self.target_embed or self.embed).weight)
        ctx = open_context(target, x.dtype, positions, documents, cache, mask)
        ctx.memory = memory
        ctx.memory_mask = None if source_mask is None else source_mask.bool()[:, None, None, :]
        if documents is not None and source_documents is not None:
            own = (documents[:, None, :, None] == source_documents[:, None, None, :])
            ctx.memory_mask = own if ctx.memory_mask is None else own & ctx.memory_mask
        x = self.decoder(x + self.places(ctx.positions, x), ctx)
        if cache is not None:
            cache.advance(target.shape[1])
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        bias = None if self.logits_bias is None else self.logits_bias[0].to(hidden.dtype)
        return F.linear(hidden, self.head_weight.to(hidden.dtype), bias)

    def forward(
        self, source: Tensor, target: Tensor, source_mask: Tensor | None = None, mask: Tensor | None = None,
        source_positions: Tensor | None = None, positions: Tensor | None = None, source_documents: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        memory = self.encode(source, source_mask, source_positions, source_documents)
        return self.logits(self.hidden(target, memory, source_mask, mask, None, positions, documents, source_documents))

    def embedded(self, tokens: Tensor, table: Tensor) -> Tensor:
        """(B, T) -> (B, T, D), without positions."""
        x = F.embedding(tokens, table) * self.spec.embed_scale
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def places(self, positions: Tensor, x: Tensor) -> Tensor:
        """(B or 1, T) -> (B or 1, T, D)"""
        return sinusoids(positions, self.spec.dim, self.spec.positions == "sinusoid-pairs").to(x.dtype)


class Stack(nn.Module):
    """Layers, and perhaps one more norm behind them."""

    def __init__(self, layers: tuple[Layer, ...], spec: EncoderDecoderSpec):
        super().__init__()
        self.layers = nn.ModuleList(
            build_layer(layer, Site(spec.dim, spec.eps, spec.norm, i)) for i, layer in enumerate(layers))
        self.norm = Site(spec.dim, spec.eps, spec.norm).new_norm() if spec.final_norm else None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = run_layers(self.layers, x, ctx)
        return x if self.norm is None else self.norm(x)
