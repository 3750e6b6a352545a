"""Attention whose queries are turned differently for different keys: what methods that bend distances come down to.

Shapes: B batch, H query heads, K key/value heads (H = K * group), T query length, S key length, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TILE_ENTRIES = 2**23  # scores held at a time


def attention_of_versions(
    versions: Sequence[Tensor], k: Tensor, v: Tensor, which: Tensor, *, scale: float | None = None, sinks: Tensor | None = None,
) -> Tensor:
    """softmax of the scores of versions[which[b, i, j]][b, :, i] with k[b, :, j], times v.

    versions: of the queries, each (B, H, T, d).  k, v (B, K, S, d).  which (B or 1, T, S): -1 where a query does not see a key;
    a query that sees none gets zeros.  sinks (H,): as in `ops.attention`.  In float32 at least; (B, H, T, d) in v's dtype.
    """
    (B, H, T, d), K = versions[0].shape, k.shape[1]
    scale = d**-0.5 if scale is None else scale
    wide = torch.promote_types(v.dtype, torch.float32)
    k_wide, v_wide, rows = k.to(wide), v.to(wide), max(1, TILE_ENTRIES // (B * H * k.shape[2]))
    out = []
    for start in range(0, T, rows):
        part = slice(start, start + rows)
        choice = which[:, part]
        scores = _scores([q[:, :, part].to(wide) for q in versions], k_wide, choice[:, None, None]) * scale  # (B, K, H / K, t, S)
        blind = (choice < 0).all(-1)[:, None, None, :, None]
        scores = scores.masked_fill(blind, 0)
        if sinks is not None:
            front = sinks.to(wide).view(1, K, H // K, 1, 1).expand(*scores.shape[:4], 1)
            weights = torch.cat((scores, front), -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        mixed = weights.masked_fill(blind, 0).flatten(2, 3) @ v_wide
        out.append(mixed.unflatten(2, (H // K, -1)).flatten(1, 2).to(v.dtype))
    return torch.cat(out, 2)


def _scores(versions: Sequence[Tensor], k: Tensor, choice: Tensor) -> Tensor:
    """(B, K, H / K, T, S), -inf where choice (B or 1, 1, 1, T, S) is negative. Each version meets only the stretch of keys in which
    some query wants it."""
    (B, H, T, d), (_, K, S, _) = versions[0].shape, k.shape
    scores = k.new_full((B, K, H // K, T, S), -torch.inf)
    for n, q in enumerate(versions):
        wanted = (choice == n).flatten(0, -2).any(0).nonzero()
        if not len(wanted):
            continue
        stretch = slice(int(wanted[0]), int(wanted[-1]) + 1)
        met = (q.reshape(B, K, -1, d) @ k[:, :, stretch].mT).unflatten(2, (H // K, T))
        scores[..., stretch] = torch.where(choice[..., stretch] == n, met, scores[..., stretch])
    return scores
