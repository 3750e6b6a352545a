"""Cross-entropy and log-probabilities of given tokens without holding all logits at once.

A batch of M tokens over a vocabulary of V needs M * V logits, and as many gradients: for small models this is the
largest tensor of all. The chunked form computes logits for a few thousand tokens, takes what it needs, and recomputes
them in the backward pass.

Shapes: hidden (M, D), head weight (V, D), labels (M,) with -100 where nothing is to be predicted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pellucid.ops.compiled import jit_serves

IGNORE = -100


def cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum (not mean) over labelled tokens of -log softmax(hidden @ weight^T)[label]: a scalar in nats.

    The sum, because only the caller knows by how many tokens the whole optimizer step is to be divided.
    """
    logits = hidden @ weight.mT
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, ignore_index=IGNORE, reduction="sum")


def rows_of_chunk(vocab: int) -> int:
    """Rows whose logits stay in a CPU's caches (about two million numbers), yet enough for efficient products."""
    return max(256, 2**21 // vocab)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes loss and gradient chunk by chunk in the forward pass: d loss / d logits = softmax - onehot."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        w = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=total.dtype, device=weight.device) if need_weight else None
        labelled = labels != IGNORE
        if bool((labelled & (labels < 0)).any()):  # indexing would count them from the end of the vocabulary
            raise IndexError(f"labels must be token ids or {IGNORE}")
        for rows in labelled.nonzero().squeeze(-1).split(chunk):
            h = hidden[rows]
            losses, P = _losses_and_gradient(h @ w.mT, labels[rows])
            total += losses.sum()
            if d_hidden is not None:
                d_hidden[rows] = P @ w
            if d_weight is not None:
                d_weight += P.mT @ h
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        d_hidden, d_weight = ctx.saved_tensors
        hidden_grad = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
        weight_grad = None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None


def _losses_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(logits)[label] (rows,) and softmax(logits) - onehot(label) (rows, V)."""
    if jit_serves(logits):
        from pellucid.ops.jit import train
        from pellucid.ops.jit.lanes import array

        if bool((labels >= logits.shape[-1]).any()):
            raise IndexError("labels must be smaller than the vocabulary")
        losses = logits.new_empty(len(labels), dtype=torch.float32)
        train.cross_entropy(array(logits), labels.contiguous().numpy(), array(losses))  # in place
        return losses, logits
    picked = torch.arange(len(labels), device=labels.device), labels
    P = torch.softmax(logits, -1)
    losses = -_log_of_picked(P, logits, picked)
    P[picked] -= 1.0
    return losses, P


def _logprobs_and_entropies(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[label] and the entropy of softmax(logits / temperature), (rows,) each, float32 or wider."""
    if jit_serves(logits):
        from pellucid.ops.jit import train
        from pellucid.ops.jit.lanes import array

        if bool(((labels < 0) | (labels >= logits.shape[-1])).any()):
            raise IndexError("tokens must be ids of the vocabulary")
        logps, entropies = (logits.new_empty(len(labels), dtype=torch.float32) for _ in range(2))
        train.log_probability(array(logits), labels.contiguous().numpy(), 1 / temperature, array(logps), array(entropies))
        return logps, entropies
    logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature), -1)
    return logp.gather(1, labels[:, None]).squeeze(1), torch.special.entr(logp.exp()).sum(-1)


def _log_of_picked(P: Tensor, logits: Tensor, picked: tuple[Tensor, Tensor]) -> Tensor:
    """log softmax(logits)[picked] (rows,), from P = softmax(logits). Rows whose probability is so small that its
    logarithm would be wrong or -inf are computed again in log space: rare, and exact."""
    logp = P[picked].to(torch.promote_types(P.dtype, torch.float32)).log()
    small = (logp < 0.7 * math.log(torch.finfo(P.dtype).tiny)).nonzero().squeeze(-1)
    if len(small):
        exact = torch.log_softmax(logits[small].to(logp.dtype), -1)
        logp[small] = exact.gather(1, picked[1][small, None]).squeeze(1)
    return logp


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """`cross_entropy_reference` with memory for `chunk` rows of logits; gradients are made during the forward pass.

    Only labelled rows are computed: a batch whose prompts carry no loss costs no more than its answers. `weight` may
    be wider than `hidden` (float32 master weights): it is cast here and its gradient comes back in its own dtype,
    accumulated in float32. In bfloat16 each token's probability is rounded (relative 2^-9) before its logarithm.
    """
    chunk = rows_of_chunk(weight.shape[0]) if chunk is None else chunk
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk)  # type: ignore[no-any-return]


def token_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log-probability of each given token, and optionally the entropy of its distribution (both (M,), float32, nats).

    logits are divided by `temperature` first: the distribution that was sampled from is the one to differentiate.
    Chunk by chunk; the backward pass computes the logits again. Entropy carries no gradient.
    """
    logp, H = _TokenLogprobs.apply(hidden, weight, tokens, temperature, entropy, rows_of_chunk(weight.shape[0]))
    return logp, H if entropy else None


class _TokenLogprobs(torch.autograd.Function):
    """d logp[y] / d logits = onehot - softmax; rows that get no gradient (masked tokens) cost nothing."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, entropy: bool, chunk: int,
    ) -> tuple[Tensor, Tensor]:
        w = weight.to(hidden.dtype)
        parts = [_logprobs_and_entropies(h @ w.mT, y, temperature) for h, y in zip(hidden.split(chunk), tokens.split(chunk))]
        logps, entropies = zip(*parts)
        ctx.save_for_backward(hidden, weight, tokens)
        ctx.temperature, ctx.chunk = temperature, chunk
        result = torch.cat(logps), torch.cat(entropies) if entropy else logps[0].new_empty(0)
        ctx.mark_non_differentiable(result[1])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens = ctx.saved_tensors
        w, g = weight.to(hidden.dtype), grads[0] / ctx.temperature
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros(weight.shape, dtype=g.dtype, device=g.device) if ctx.needs_input_grad[1] else None
        for rows in g.nonzero().squeeze(-1).split(ctx.chunk):
            h = hidden[rows]
            _, P = _losses_and_gradient((h @ w.mT).div_(ctx.temperature), tokens[rows])
            minus = g[rows, None].neg().to(h.dtype)  # scales rows: cheaper on h and d_hidden than on P
            if d_hidden is not None:
                d_hidden[rows] = (P @ w).mul_(minus)
            if d_weight is not None:
                d_weight += P.mT @ (h * minus)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None
