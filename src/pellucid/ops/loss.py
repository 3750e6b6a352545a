"""Cross-entropy and log-probabilities of given tokens without holding all logits at once.

A batch of M tokens over a vocabulary of V needs M * V logits, and as many gradients: for small models this is the
largest tensor of all. The chunked form computes logits for a few thousand tokens, takes what it needs, and recomputes
them in the backward pass.

Shapes: hidden (M, D), head weight (V, D), labels (M,) with -100 where nothing is to be predicted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum (not mean) over labelled tokens of -log softmax(hidden @ weight^T)[label]: a scalar in nats.

    The sum, because only the caller knows by how many tokens the whole optimizer step is to be divided.
    """
    return F.cross_entropy((hidden @ weight.mT).float(), labels, ignore_index=IGNORE, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes loss and gradient chunk by chunk in the forward pass: d loss / d logits = softmax - onehot."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        for start in range(0, hidden.shape[0], chunk):
            h, y = hidden[start : start + chunk], labels[start : start + chunk]
            logp = torch.log_softmax((h @ weight.mT).float(), -1)
            total += F.nll_loss(logp, y, ignore_index=IGNORE, reduction="sum")
            if not (need_hidden or need_weight):
                continue
            d_logits = logp.exp_()
            rows = torch.arange(len(y), device=y.device)
            keep = y != IGNORE
            d_logits[rows, y.clamp_min(0)] -= 1.0
            d_logits *= keep[:, None]
            d_logits = d_logits.to(h.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[start : start + chunk])
            if d_weight is not None:
                d_weight += (d_logits.mT @ h).float()
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        d_hidden, d_weight = ctx.saved_tensors
        hidden_grad = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
        weight_grad = None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 2048) -> Tensor:
    """`cross_entropy_reference` with memory for `chunk` rows of logits; gradients are made during the forward pass."""
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk)  # type: ignore[no-any-return]


def token_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """log-probability of each given token, and optionally the entropy of its distribution (both (M,), float32, nats).

    logits are divided by `temperature` first: the distribution that was sampled from is the one to differentiate.
    """
    logits = (hidden @ weight.mT).float()
    if temperature != 1.0:
        logits = logits / temperature
    logp = torch.log_softmax(logits, -1)
    picked = logp.gather(-1, tokens[:, None]).squeeze(-1)
    if not entropy:
        return picked, None
    with torch.no_grad():
        h = -(logp.detach().exp() * logp.detach()).sum(-1)
    return picked, h
