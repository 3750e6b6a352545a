"""From the product of the q/k/v projection to what attention reads: cut into heads, q and k normed and turned.

Shapes: qkv (B, T, H + 2K, d) for H query heads and K key/value heads; cos, sin (B or 1, T, r) as `rope_angles` makes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pellucid.ops.compiled import jit_serves
from pellucid.ops.norm import rms_norm
from pellucid.ops.rope import apply_rope


def qkv_heads_reference(
    qkv: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None, norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6, interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """rope(norm(q)) (B, H, T, d), rope(norm(k)) (B, K, T, d), v (B, K, T, d).  norms: the weights (d,) of q's and k's norm,
    None for models without (norms before the scores: arXiv 2302.05442); cos, sin: None where nothing is turned."""
    K, d = (qkv.shape[2] - heads) // 2, qkv.shape[-1]
    qk, v = qkv.split((heads + K, K), 2)
    if norms is not None:
        weight = torch.cat((norms[0].expand(heads, d), norms[1].expand(K, d)))
        wide = torch.promote_types(qkv.dtype, weight.dtype)  # 1 + w in float32 must not be rounded before it is applied
        qk = rms_norm(qk.to(wide), weight.to(wide), eps).to(qkv.dtype)
    if cos is not None and sin is not None:
        qk = apply_rope(qk, cos, sin, heads_last=True, interleaved=interleaved)
    q, k = qk.transpose(1, 2).split((heads, K), 1)
    return q, k, v.transpose(1, 2)


def qkv_heads(
    qkv: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None, norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6, interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same; on a CPU in one pass over q and k each way, in float32 until the end."""
    if cos is None or sin is None or interleaved or not jit_serves(qkv, cos, sin):
        return qkv_heads_reference(qkv, heads, cos, sin, norms, eps, interleaved)
    q_norm, k_norm = (None, None) if norms is None else norms
    return _Heads.apply(qkv, heads, cos, sin, q_norm, k_norm, eps)  # type: ignore[no-any-return]


class _Heads(torch.autograd.Function):
    """The gradient is turned back by the same angle, then goes through the norm (see `_RMSNorm`)."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: int, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from pellucid.ops.jit import train
        from pellucid.ops.jit.lanes import array

        (B, T, count, d), r = qkv.shape, cos.shape[-1]
        K = (count - heads) // 2
        qkv, cos, sin = qkv.contiguous(), cos.reshape(-1, r), sin.reshape(-1, r)
        weight = qkv.new_empty(0, d, dtype=torch.float32)
        if q_norm is not None and k_norm is not None:
            weight = torch.cat((q_norm.expand(heads, d), k_norm.expand(K, d))).float()
        qk, rstd = qkv.new_empty(B, T, heads + K, d), weight.new_empty(B * T, heads + K)
        rows = array(qkv.view(B * T, count, d))
        train.heads(rows, array(cos), array(sin), array(weight), eps, array(qk.view(B * T, heads + K, d)), array(rstd))
        ctx.save_for_backward(qkv, cos, sin, weight, rstd)
        ctx.norms = q_norm, k_norm
        v = qkv[:, :, heads + K :].contiguous()  # a view of an input would not pass autograd.Function untouched
        return qk[:, :, :heads].transpose(1, 2), qk[:, :, heads:].transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from pellucid.ops.jit import train
        from pellucid.ops.jit.lanes import array

        qkv, cos, sin, weight, rstd = ctx.saved_tensors
        (B, T, count, d), H = qkv.shape, grads[0].shape[1]
        d_qkv, dw = torch.empty_like(qkv), weight.new_zeros(train.CHUNKS, count - grads[2].shape[1], d)
        heads_last = (g.transpose(1, 2).contiguous().view(B * T, -1, d) for g in grads)
        rows = qkv.view(B * T, count, d), cos, sin, weight, rstd, d_qkv.view(B * T, count, d), dw
        train.heads_backward(*(array(t) for t in (*heads_last, *rows)))
        if ctx.norms[0] is None:
            return d_qkv, None, None, None, None, None, None
        dw = dw.sum(0)
        of_norms = (part.sum(0).to(norm.dtype) for part, norm in zip((dw[:H], dw[H:]), ctx.norms, strict=True))
        return d_qkv, None, None, None, *of_norms, None
