"""RMSNorm (arXiv 1910.07467, equation 4): divide by the root mean square, then scale. No mean, no bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pellucid.ops.compiled import jit_serves


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """w * (x / sqrt(mean(x^2) + eps)) over the last dimension; statistics in float32, cast back, then the weight.

    x (..., D), weight (D,), or (heads, D) for a weight of each head -> (..., D). This order (cast, then weight) is Llama's and Qwen's; gpt-oss multiplies first.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    return weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The same in fewer passes over memory, forward and backward; rounds in the same places as the reference."""
    if jit_serves(x, weight):
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _RMSNormJit.apply(x, weight, eps)  # type: ignore[no-any-return]
        return _kernel(x.contiguous(), weight.contiguous(), eps)[0]
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]
    if weight.dim() == 1 and x.dtype == weight.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return _normalize(x, eps)[0] * weight


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) in x's dtype, and 1 / rms(x) (..., 1) in float32 at least."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (h * rstd if h is x else h.mul_(rstd)).to(x.dtype), rstd


class _RMSNorm(torch.autograd.Function):
    """y = w * n with n = x r, r = 1 / rms(x).  dx = r (g w - n mean(g w n)),  dw = sum over rows of g n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        n, rstd = _normalize(x, eps)
        ctx.save_for_backward(n, rstd, weight)
        return n * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        n, rstd, weight = ctx.saved_tensors
        g, n_wide, w = grads[0].to(rstd.dtype), n.to(rstd.dtype), weight.to(rstd.dtype)
        gn = g * n_wide
        d_weight = gn.flatten(0, -1 - w.dim()).sum(0).to(weight.dtype)
        dot = (gn @ w if w.dim() == 1 else (gn * w).sum(-1))[..., None]
        gw = g * w if g is grads[0] else g.mul_(w)  # in place where g is a wider copy
        d_x = gw.addcmul_(n_wide, dot, value=-1 / n.shape[-1]).mul_(rstd)
        return d_x.to(n.dtype), d_weight, None


def _kernel(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of contiguous x, and 1 / rms(x) of each row."""
    from pellucid.ops.jit import train
    from pellucid.ops.jit.lanes import array

    D = x.shape[-1]
    y, rstd = torch.empty_like(x), x.new_empty(x.numel() // D, dtype=torch.float32)
    train.norm(array(x.view(-1, D)), array(weight.view(-1, D)), eps, array(y.view(-1, D)), array(rstd))
    return y, rstd


class _RMSNormJit(torch.autograd.Function):
    """`_RMSNorm` by compiled kernels: one pass over memory each way, and x is kept instead of n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, rstd = _kernel(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        from pellucid.ops.jit import train
        from pellucid.ops.jit.lanes import array

        x, weight, rstd = ctx.saved_tensors
        D = x.shape[-1]
        rows, w = x.view(-1, D), weight.view(-1, D)
        dx, dw = torch.empty_like(x), rstd.new_zeros(train.CHUNKS, *w.shape)
        train.norm_backward(*(array(t) for t in (grads[0].contiguous().view(-1, D), rows, w, rstd, dx.view(-1, D), dw)))
        return dx, dw.sum(0).view(weight.shape).to(weight.dtype), None
