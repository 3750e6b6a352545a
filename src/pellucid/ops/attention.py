"""Scaled dot-product attention: the formula, and PyTorch's fused path behind the same signature.

Shapes: B batch, H query heads, K key/value heads (H = K * group), T query length, S key length, d head dim.
    q (B, H, T, d)   k, v (B, K, S, d)   mask broadcastable to (B, 1, T, S), True = visible   ->   (B, H, T, d)

Causality is aligned at the BOTTOM RIGHT: the last query sees every key, so that a chunk of new queries against a
longer cache sees the whole past. PyTorch's own `is_causal` is aligned at the top left, which is only the same when
T == S.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.ops.softmax import softmax


def visible(T: int, S: int, *, causal: bool = True, window: int | None = None, device: torch.device | None = None) -> Tensor:
    """(T, S) bool: which key each query may see. Query t stands at key position S - T + t.

    window: the number of keys a query sees, itself included (Mistral's convention: i - window < j <= i).
    """
    i = torch.arange(S - T, S, device=device)[:, None]
    j = torch.arange(S, device=device)[None, :]
    seen = (j <= i) if causal else torch.ones(T, S, dtype=torch.bool, device=device)
    return seen & (j > i - window) if window is not None else seen


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, mask: Tensor | None = None, window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v, Vaswani et al. 2017 (arXiv 1706.03762), equation 1.

    GQA (arXiv 2305.13245): each key/value head serves H / K consecutive query heads. Computed in float32 at least.
    A query that sees nothing gets zeros.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).mT) * scale
    seen = visible(q.shape[2], k.shape[2], causal=causal, window=window, device=q.device)
    if mask is not None:
        seen = seen & mask
    return (softmax(scores.masked_fill(~seen, -torch.inf)) @ v.to(wide)).to(q.dtype)


def attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, mask: Tensor | None = None, window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same through `F.scaled_dot_product_attention` (tiled, never holds the T x S scores where it has a kernel)."""
    T, S = q.shape[2], k.shape[2]
    if T == 1 and window is None and q.shape[1] != k.shape[1]:
        return _one_query(q, k, v, mask, scale)
    if causal and mask is None and window is None and T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    seen = visible(T, S, causal=causal, window=window, device=q.device) if (causal and T > 1) or window else None
    if mask is not None:
        seen = mask if seen is None else seen & mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Decoding: the query heads of a group become rows that share one reading of their key/value head."""
    B, H, _, d = q.shape
    K = k.shape[1]
    out = F.scaled_dot_product_attention(q.view(B, K, H // K, d), k, v, attn_mask=mask, scale=scale)
    return out.reshape(B, H, 1, d)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, mask: Tensor | None = None, window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """The fast path of this machine; `attention_reference` is what it must equal."""
    return attention_sdpa(q, k, v, causal=causal, mask=mask, window=window, scale=scale)
