"""From what routers chose to pairs (token, expert), sorted by expert: each expert then works on one block of rows.

Legend: N tokens, E experts, k chosen for each token, P pairs: N k, less what is padding or dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """tokens (P,) int64: rows of x. weights (P,): of the expert's result. counts: how many of them each expert has."""

    tokens: Tensor
    weights: Tensor
    counts: list[int]

    def of(self, first: int, last: int) -> Pairs:
        """Those of the experts first..last."""
        here = slice(sum(self.counts[:first]), sum(self.counts[:last]))
        return Pairs(self.tokens[here], self.weights[here], self.counts[first:last])


def pairs_by_expert(weights: Tensor, chosen: Tensor, experts: int, real: Tensor | None = None, capacity: int | None = None) -> Pairs:
    """weights, chosen (N, k), as from `route`. real (N,): False for padding, which goes to no expert.

    capacity: tokens that an expert takes at most. First choices go before second ones, and among equals earlier tokens
    before later ones (GShard, arXiv 2006.16668, algorithm 1); the others lose this expert and keep their residual.
    """
    N = len(chosen)
    ids = chosen.T if real is None else chosen.T.masked_fill(~real, experts)  # first choices of all tokens, then second ...
    ids, order = ids.flatten().sort(stable=True)
    counts = ids.bincount(minlength=experts)[:experts].tolist()
    order = order[: sum(counts)]
    if capacity is not None and counts and max(counts) > capacity:
        kept = torch.cat([torch.arange(n, device=ids.device) < capacity for n in counts])
        order, counts = order[kept], [min(n, capacity) for n in counts]
    return Pairs(order % N, weights.T.flatten().index_select(0, order), counts)


def pairs_of_choice(weights: Tensor, tokens: Tensor) -> Pairs:
    """weights, tokens (E, c), as from `expert_choice`."""
    return Pairs(tokens.flatten(), weights.flatten(), [tokens.shape[1]] * tokens.shape[0])


def capacity_of(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """Tokens for each expert: `factor` times an even share, rounded up (Switch, arXiv 2101.03961, equation 3); 1 at least."""
    return max(1, math.ceil(factor * tokens * top_k / experts))
