"""RMSNorm (arXiv 1910.07467, equation 4): divide by the root mean square, then scale. No mean, no bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """w * (x / sqrt(mean(x^2) + eps)) over the last dimension; statistics in float32, cast back, then the weight.

    x (..., D), weight (D,) -> (..., D). This order (cast, then weight) is Llama's and Qwen's; gpt-oss multiplies first.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    return weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The same through PyTorch's fused kernel where inputs are float32 (elsewhere casts would change the order)."""
    if x.dtype == torch.float32 and weight.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return rms_norm_reference(x, weight, eps)
