"""Scaled dot-product attention: the formula, its fast twins, and the one place that chooses between them.

Shapes: B batch, H query heads, K key/value heads (H = K * group), T query length, S key length, d head dim.
    q (B, H, T, d)   k (B, K, S, d)   v (B, K, S, e)   ->   (B, H, T, e), where mostly e = d
    mask: broadcastable to (B, 1, T, S); bool, True = visible; or a float bias added to the scores (0 or -inf for a
    plain mask), in which every query must see something. A bool mask may leave a query nothing: it gets zeros.

Causality is aligned at the BOTTOM RIGHT: the last query sees every key, so that a chunk of new queries against a
longer cache sees the whole past. PyTorch's own `is_causal` is aligned at the top left, which is only the same when
T == S.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.ops.softmax import softmax
from pellucid.ops.tiles import attention_one_query, attention_tiled, saved_bytes
from pellucid.ops.visible import bias_of, visible

__all__ = ["attention", "attention_reference", "attention_sdpa", "choose_attention", "visible"]

SAVED_LIMIT = 256 * 2**20
"""Bytes of probabilities that one call may keep for its backward pass before the memory-saving path is taken."""


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, mask: Tensor | None = None, window: int | None = None,
    scale: float | None = None, sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v, Vaswani et al. 2017 (arXiv 1706.03762), equation 1.

    GQA (arXiv 2305.13245): each key/value head serves H / K consecutive query heads. Computed in float32 at least.
    sinks (H,): a logit of each head that takes part in the softmax and adds nothing (gpt-oss; "softmax off by one").
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).mT) * scale
    seen = visible(q.shape[2], k.shape[2], causal=causal, window=window, device=q.device)
    if mask is not None:
        scores, seen = (scores, seen & mask) if mask.dtype == torch.bool else (scores + mask, seen)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    return (softmax(scores)[..., : k.shape[2]] @ v.to(wide)).to(q.dtype)


def attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, mask: Tensor | None = None, window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same through `F.scaled_dot_product_attention` (tiled, never holds the T x S scores where it has a kernel)."""
    T, S = q.shape[2], k.shape[2]
    if causal and mask is None and window is None and T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    seen = visible(T, S, causal=causal, window=window, device=q.device) if (causal and T > 1) or window else None
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    if seen is not None:
        mask = seen & mask if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
    if mask.dtype != torch.bool:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_of(mask, q.dtype), scale=scale, enable_gqa=True)
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def choose_attention(q: Tensor, k: Tensor, causal: bool = True) -> tuple[str, str]:
    """('sdpa' | 'one_query' | 'tiled', why), from device, shapes and whether gradients are wanted.

    Measured with PyTorch 2.13 on two cores (`benchmarks/train.py --attention` repeats it): SDPA's backward kernel runs
    at a fraction of the speed of plain batched products, the more so in bfloat16.
    """
    if q.device.type != "cpu":
        return "sdpa", f"{q.device.type} has fused kernels"
    if q.shape[2] == 1:
        return "one_query", "one new token: two small products beat the fused kernel on a CPU"
    size = saved_bytes(q, k, causal)
    if size > SAVED_LIMIT:
        return "sdpa", f"probabilities would take {size / 2**20:.0f} MiB: recompute them instead"
    return "tiled", f"probabilities take {size / 2**20:.1f} MiB: keeping them is faster than recomputing"


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, mask: Tensor | None = None, window: int | None = None,
    scale: float | None = None, sinks: Tensor | None = None,
) -> Tensor:
    """The fast path of this machine; `attention_reference` is what it must equal."""
    if sinks is not None:
        return _attention_with_sinks(q, k, v, sinks, causal=causal, mask=mask, window=window, scale=scale)
    choice, _ = choose_attention(q, k, causal)
    if choice == "one_query":
        return attention_one_query(q, k, v, mask=mask, window=window, scale=scale)
    path = attention_tiled if choice == "tiled" else attention_sdpa
    return path(q, k, v, causal=causal, mask=mask, window=window, scale=scale)


def _attention_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *, causal: bool, mask: Tensor | None, window: int | None, scale: float | None,
) -> Tensor:
    """One more key in front, that every query sees, whose value is zero and whose score is the sink's logit: queries get an entry for
    each head of their group (1 for their own), in which that key holds the logits. So gradients reach them as they reach keys."""
    (B, H, T, d), (K, S) = q.shape, k.shape[1:3]
    scale, G = d**-0.5 if scale is None else scale, H // K
    own = torch.eye(G, dtype=q.dtype, device=q.device).view(1, 1, G, 1, G).expand(B, K, G, T, G).flatten(1, 2)
    front = torch.cat((k.new_zeros(K, d), (sinks / scale).view(K, G).to(k.dtype)), -1)[None, :, None].expand(B, K, 1, d + G)
    k = torch.cat((front, torch.cat((k, k.new_zeros(B, K, S, G)), -1)), 2)
    if window is not None:  # it would hide the key in front
        seen = visible(T, S, causal=causal, window=window, device=q.device)[None, None]
        if mask is None or mask.dtype == torch.bool:
            mask = seen if mask is None else seen & mask
        else:
            mask = mask.masked_fill(~seen, -torch.inf)
        causal = False
    if mask is not None:
        always = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
        mask = torch.cat((always.expand(*mask.shape[:-1], 1), mask), -1)
    return attention(torch.cat((q, own), -1), k, torch.cat((v.new_zeros(B, K, 1, v.shape[-1]), v), 2), causal=causal, mask=mask, scale=scale)
