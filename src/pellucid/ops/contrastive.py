"""The contrastive loss of paired embeddings: CLIP (arXiv 2103.00020, figure 3), InfoNCE (arXiv 1807.03748) both ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """a (N, P), b (N, P): the n-th of each belong together -> a scalar in nats, the mean over rows and columns of

        -log softmax(scale * cos(a_i, b_j))[i]

    scale: one over the temperature. Computed in float32 at least.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    similarity = scale * F.normalize(a.to(wide), dim=-1) @ F.normalize(b.to(wide), dim=-1).mT
    pairs = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(similarity, pairs) + F.cross_entropy(similarity.mT, pairs)) / 2
