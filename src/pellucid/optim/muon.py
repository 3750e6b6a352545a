"""Muon: momentum whose update matrix is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

AdamW scales each weight by itself; Muon looks at the whole matrix. It replaces the momentum M = U S V^T by U V^T: every
direction of the update gets the same length, so directions that the gradient touches rarely are learned too. The
orthogonal factor comes from a few Newton-Schulz steps: matrix products only, no SVD.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# A quintic a x + b x^3 + c x^5 iterated on the singular values: steep at 0, and near 1 for x in (0, 1].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(m: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., R, C) -> about U V^T of m = U S V^T, singular values roughly in [0.7, 1.2] after 5 steps; a batch at once."""
    a, b, c = COEFFICIENTS
    x = m.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the Gram matrix of the short side is the smaller one
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # singular values into [0, 1]
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(m.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, times lr * sqrt(max(1, rows / columns)); decoupled weight decay.

    params: weights of two dimensions, or of three (the matrices of experts, each by itself), or groups with a `parts` list:
    the row counts of the matrices that a weight stacks (q, k, v;
    gate, up). Each matrix is orthogonalised by itself, all matrices of one shape in one batch of products.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0,
                 steps: int = 5, dtype: torch.dtype = torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps, parts=None))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            parts = group["parts"] or [(p.shape[-2],) for p in group["params"]]
            for p, rows in zip(group["params"], parts):
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(momentum, group["momentum"])  # Nesterov: look one step ahead
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                for piece, target in zip(direction.split(rows, -2), p.split(rows, -2)):
                    by_shape[piece.shape].append((piece, target))
            for shape, pairs in by_shape.items():
                updates = orthogonalize(torch.stack([d for d, _ in pairs]), group["steps"], self.dtype)
                scale = group["lr"] * max(1.0, shape[-2] / shape[-1]) ** 0.5
                for (_, target), update in zip(pairs, updates):
                    target.add_(update, alpha=-scale)
