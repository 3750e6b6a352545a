"""DeepSeek-V3.2's lightning indexer: which keys a query may see (DeepSeek sparse attention).

    I[t, s] = sum_h w[t, h] relu(q[t, h] . k[s])          the `top_k` keys of largest I among the visible ones are chosen

Few small heads and one shared key make it cheap; the choice is what attention then works on. No gradient passes through it.

Legend: B batch, T queries, S keys, H index heads, e their width.
    q (B, T, H, e)   k (B, S, e)   w (B, T, H), which holds all scale factors   ->   I (B, T, S) float32
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.ops.visible import visible

SCORES_LIMIT = 2**24
"""Numbers that one step of the fast twin may hold."""


def index_scores_reference(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """The equation. Holds B x T x H x S numbers. The future is -inf; the last query stands at the last key."""
    products = torch.einsum("bthe,bse->bths", q.float(), k.float())
    scores = torch.einsum("bth,bths->bts", w.float(), products.relu())
    return scores.masked_fill(~visible(q.shape[1], k.shape[1], device=q.device), -torch.inf)


@torch.no_grad()
def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """The same for a few queries at a time, each against the keys that it may see."""
    (B, T, H, _), S = q.shape, k.shape[1]
    q, k, w = q.float(), k.float(), w.float()
    rows = max(1, min(T, SCORES_LIMIT // (B * H * S)))
    out = q.new_full((B, T, S), -torch.inf)
    for a in range(0, T, rows):
        b = min(a + rows, T)
        high = S - T + b
        products = torch.bmm(q[:, a:b].flatten(1, 2), k[:, :high].mT).relu_()  # (B, n H, high)
        scores = torch.matmul(w[:, a:b, None], products.unflatten(1, (b - a, H)))[:, :, 0]
        out[:, a:b, :high] = scores.masked_fill_(~visible(b - a, high, device=q.device), -torch.inf)
    return out


@torch.no_grad()
def choose_keys(scores: Tensor, top_k: int, mask: Tensor | None = None) -> Tensor:
    """scores (B, T, S) -> (B, T, k) the chosen keys of each query, k = min(top_k, S).

    mask (B or 1, T or 1, S): True = visible. What is hidden must not take the place of a key that is not: it counts last, but a
    query that sees fewer than k keys is still given some of it. Whoever uses the choice masks it again.
    """
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.topk(min(top_k, scores.shape[-1]), -1).indices


def chosen_mask(chosen: Tensor, keys: int) -> Tensor:
    """chosen (B, T, k) -> (B, T, keys) bool: True where a key was chosen."""
    return torch.zeros(*chosen.shape[:2], keys, dtype=torch.bool, device=chosen.device).scatter_(-1, chosen, True)
