"""Attention by plain batched products over tiles of query rows: the fast path of a CPU.

A causal tile of rows a..b needs only the keys up to its last row: with n tiles, (n + 1) / 2n of the square is
computed; and where a mask hides most of these from all of the tile's queries (other documents of a packed row, other
continuations of a prompt), only the others are read. Query heads that share a key/value head are stacked as further rows, so that one product serves the group.
The probabilities are kept for the backward pass: memory grows with T * S, where FlashAttention (arXiv 2205.14135)
recomputes them.

Legend: B batch, H query heads, K key/value heads, G = H / K, T queries, S keys, d head dim, n queries and w keys of a
tile. Signatures and masks as in `ops.attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from pellucid.ops.visible import bias_of, visible

ROWS = 64  # queries of a tile: few enough to skip most of the hidden half, enough for efficient products
TILES = 16  # at most: each tile costs some ten calls
WORTH = 0.75  # keys are gathered where at most this share of a tile's is seen


def attention_tiled(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, mask: Tensor | None = None, window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`attention_reference` in q's own precision: in bfloat16, scores and probabilities are rounded to bfloat16."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    T, S = q.shape[2], k.shape[2]
    regular = S >= T if causal else window is None  # what the tiles know how to cut; the rest goes into the mask
    if regular and (mask is None or mask.dtype != torch.bool):
        return _Tiled.apply(q, k, v, mask, causal, window, scale)  # type: ignore[no-any-return]
    seen = visible(T, S, causal=causal, window=window, device=q.device)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        seen, mask = seen & mask, None
    bias = bias_of(seen, q.dtype) if mask is None else bias_of(seen, q.dtype) + mask
    out = _Tiled.apply(q, k, v, bias, causal and regular, window if regular else None, scale)
    return out.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def attention_one_query(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, window: int | None = None, scale: float | None = None,
) -> Tensor:
    """T = 1, the last position: the G query heads of a group are rows that share one reading of their key/value head."""
    B, H, _, d = q.shape
    K = k.shape[1]
    if window is not None:
        k, v = k[:, :, -window:], v[:, :, -window:]
        mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., -window:]
    blind = None
    if mask is not None and mask.dtype == torch.bool:
        blind, mask = ~mask.any(-1, keepdim=True), bias_of(mask, q.dtype)
    scores = (q * (d**-0.5 if scale is None else scale)).reshape(B, K, H // K, d) @ k.mT
    if mask is not None:
        scores = scores + mask
    out = (torch.softmax(scores, -1) @ v).view(B, H, 1, v.shape[-1])
    return out if blind is None else out.masked_fill(blind, 0.0)


def tiles(T: int, S: int, causal: bool, window: int | None) -> Iterator[tuple[int, int, int, int]]:
    """(a, b, low, high): queries a..b and the keys low..high that any of them sees.

    >>> list(tiles(128, 130, True, None))
    [(0, 64, 0, 66), (64, 128, 0, 130)]
    """
    rows = max(ROWS, -(-T // TILES)) if causal else T
    for a in range(0, T, rows):
        b = min(a + rows, T)
        yield a, b, max(0, S - T + a - window + 1) if window else 0, S - T + b if causal else S


def saved_bytes(q: Tensor, k: Tensor, causal: bool, window: int | None = None) -> int:
    """Bytes of probabilities that `attention_tiled` holds at a time: all tiles if gradients are wanted, else one."""
    B, H, T, _ = q.shape
    sizes = [(b - a) * (high - low) for a, b, low, high in tiles(T, max(T, k.shape[2]), causal, window)]
    kept = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return B * H * q.element_size() * (sum(sizes) if kept else max(sizes))


@lru_cache(maxsize=32)
def _edge(n: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """(n, keys) bias of a tile's last `keys` keys: the causal triangle, and the window if there is one."""
    with torch.inference_mode(False):
        return bias_of(visible(n, keys, window=window), dtype)


_SEEN = WeakIdKeyDictionary()  # bias -> what `seen_keys` found: all layers of a pass share one


def seen_keys(bias: Tensor | None, plan: list[tuple[int, int, int, int]], edge: int) -> list[Tensor | None]:
    """For each tile the keys that any of its queries may see, of any sequence, and always the last `edge` of them; None: nearly all, or no mask."""
    if bias is None or bias.shape[-2] == 1 or len(plan) == 1 or torch.compiler.is_compiling():
        return [None] * len(plan)
    known = _SEEN.setdefault(bias, {})
    if (found := known.get((len(plan), edge))) is None:
        found = known[len(plan), edge] = [_keys_of(bias, a, b, low, high, edge) for a, b, low, high in plan]
    return found  # type: ignore[no-any-return]


def _keys_of(bias: Tensor, a: int, b: int, low: int, high: int, edge: int) -> Tensor | None:
    seen = (bias[..., a:b, low:high] > -torch.inf).flatten(0, -2).any(0)
    seen[high - low - edge :] = True
    keys = seen.nonzero().squeeze(-1) + low
    return keys if len(keys) <= WORTH * (high - low) else None


class _Tiled(torch.autograd.Function):
    """P = softmax(q (scale k)^T + bias), O = P v.   dV = P^T dO,  dP = dO V^T,  dS = P (dP - sum(P dP)),
    dQ = dS (scale k),  dK = scale dS^T q."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, window: int | None, scale: float,
    ) -> Tensor:
        (B, H, T, d), (K, S, e) = q.shape, v.shape[1:]
        ctx.plan, ctx.scale, ctx.shape = list(tiles(T, S, causal, window)), scale, (B, H, K, T, S, d)
        ctx.seen = seen_keys(bias, ctx.plan, min(ctx.plan[0][1], S) if causal else 0) if window is None else [None] * len(ctx.plan)
        groups = q.unflatten(1, (K, H // K))  # (B, K, G, T, d)
        k, v = (k * scale).reshape(B * K, S, d), v.reshape(B * K, S, e)
        out = q.new_empty(B, T, H, e)  # heads last: the output projection reads it without a copy
        kept = []
        for (a, b, low, high), seen in zip(ctx.plan, ctx.seen, strict=True):
            rows = groups[:, :, :, a:b].reshape(B * K, -1, d)
            keys, entries = _read(k, low, high, seen), _read(v, low, high, seen)
            scores = torch.bmm(rows, keys.mT)
            by_head = scores.view(B, H, b - a, keys.shape[1])
            if bias is not None:
                some = bias[..., a:b, :] if bias.shape[-2] > 1 else bias
                by_head += some[..., low:high] if seen is None else some.index_select(-1, seen)
            if causal:
                edge = _edge(b - a, high - low if window else b - a, window, q.dtype)
                by_head[..., keys.shape[1] - edge.shape[1] :] += edge
            P = torch.softmax(scores, -1)
            out[:, a:b] = torch.bmm(P, entries).view(B, H, b - a, e).transpose(1, 2)
            if any(ctx.needs_input_grad[:3]):
                kept += [rows, P]
        ctx.save_for_backward(k, v, *kept)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, v, *kept = ctx.saved_tensors
        B, H, K, T, S, d = ctx.shape
        groups = grads[0].unflatten(1, (K, H // K))
        dq = k.new_empty(B, T, H, d)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for (a, b, low, high), seen, rows, P in zip(ctx.plan, ctx.seen, kept[::2], kept[1::2], strict=True):
            g = groups[:, :, :, a:b].reshape(B * K, -1, v.shape[-1])
            dP = torch.bmm(g, _read(v, low, high, seen).mT)
            dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
            dq[:, a:b] = torch.bmm(dS, _read(k, low, high, seen)).view(B, H, b - a, d).transpose(1, 2)
            if seen is None:
                dk[:, low:high].baddbmm_(dS.mT, rows)
                dv[:, low:high].baddbmm_(P.mT, g)
            else:
                dk.index_add_(1, seen, torch.bmm(dS.mT, rows))
                dv.index_add_(1, seen, torch.bmm(P.mT, g))
        return dq.transpose(1, 2), dk.mul_(ctx.scale).view(B, K, S, d), dv.view(B, K, S, -1), None, None, None, None


def _read(x: Tensor, low: int, high: int, seen: Tensor | None) -> Tensor:
    """x (N, S, d) -> the keys low..high, or those that are seen."""
    return x[:, low:high] if seen is None else x.index_select(1, seen)
