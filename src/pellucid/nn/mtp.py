"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): a layer more for each token further ahead.

Depth k = 1, 2, ... reads, at place i, what depth k - 1 made of that place (depth 0: the main model, after its final norm) and
the embedding of token i + k; through the shared head it predicts token i + k + 1:

    h_i^k = norm(layer(W [norm(embed(t_{i+k})) ; norm(h_i^{k-1})]))

Legend: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pellucid.nn.block import Block
from pellucid.nn.context import Context
from pellucid.nn.linear import Linear
from pellucid.nn.site import Site
from pellucid.nn.specs import DecoderSpec
from pellucid.ops import chunked_cross_entropy
from pellucid.ops.loss import IGNORE


class PredictionLayer(nn.Module):
    """embedded, hidden (B, T, D) -> (B, T, D), for the head."""

    def __init__(self, block: Block, site: Site):
        super().__init__()
        self.norm_embedded, self.norm_hidden = site.new_norm(), site.new_norm()
        self.join = Linear(2 * site.dim, site.dim)
        self.block = block
        self.norm = site.new_norm()

    def forward(self, embedded: Tensor, hidden: Tensor, ctx: Context) -> Tensor:
        x = self.join(torch.cat((self.norm_embedded(embedded), self.norm_hidden(hidden)), -1))
        return self.norm(self.block.leave(self.block(self.block.enter(x), ctx)))  # type: ignore[no-any-return]


def prediction_spec(spec: DecoderSpec, depth: int) -> DecoderSpec:
    """Depth k as a model of one layer: what its own `KVCache` is made from (it runs k tokens behind the main one)."""
    return replace(spec, layers=(spec.mtp[depth - 1],), mtp=())


def same_document(documents: Tensor, depth: int) -> Tensor:
    """documents (B, T) -> (B, T - k): those of tokens i + k; -1, as for padding, where token i is of another one."""
    behind, ahead = documents[:, :-depth], documents[:, depth:]
    return torch.where(behind == ahead, ahead, -1)


def prediction_loss(
    states: Sequence[Tensor], head: Tensor, labels: Tensor, documents: Tensor | None = None, weight: float = 0.3,
) -> Tensor:
    """weight / depths * sum over depths and places of -log p(token i + k + 1): a sum in nats, like `chunked_cross_entropy`, so that
    the caller divides it by the number of labels as the main loss (equations 24 and 25).

    states: (B, T - k, D) of depth k = 1, 2, ...; head (V, D). labels (B, T): labels[i] is token i + 1, or -100.
    weight: 0.3 for most of DeepSeek-V3's training, 0.1 at its end.
    """
    total = head.new_zeros((), dtype=torch.float32)
    for k, hidden in enumerate(states, 1):
        wanted = labels[:, k:]
        if documents is not None:
            wanted = wanted.masked_fill(same_document(documents, k) < 0, IGNORE)
        total = total + chunked_cross_entropy(hidden.flatten(0, 1), head, wanted.flatten())
    return total * (weight / max(len(states), 1))
