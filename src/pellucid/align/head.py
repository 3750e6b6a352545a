"""Numbers of single tokens that need their whole distribution, without keeping one of M * V logits.

    values = by_rows(fn, hidden, weight, *rows)

computes the logits of a few hundred tokens, gives them to `fn`, and forgets them; the backward pass computes them again.
Shapes: hidden (M, D), head weight (V, D), every other tensor (M, ...) by token. `ops.token_logprobs` is the faster special
case of log-probabilities alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pellucid.ops.loss import rows_of_chunk


def by_rows(
    fn: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *rows: Any, temperature: float = 1.0, chunk: int | None = None,
) -> Tensor:
    """fn(logits / temperature (c, V) in float32 or wider, *pieces of rows) -> (c, ...), over all tokens: (M, ...).

    Differentiable in hidden, weight, and those of `rows` that are floating tensors with gradient. rows: tensors (M, ...) or
    objects that slice like them (`Support`).
    """
    chunk = rows_of_chunk(weight.shape[0]) if chunk is None else chunk

    def piece(h: Tensor, w: Tensor, *parts: Any) -> Tensor:
        logits = h @ w.to(h.dtype).mT
        return fn(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, *parts)

    found = []
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        given = (hidden[part], weight, *(x[part] for x in rows))
        again = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)
        found.append(checkpoint(piece, *given, use_reentrant=False, preserve_rng_state=False) if again else piece(*given))
    return torch.cat(found) if found else fn(weight.new_zeros((0, weight.shape[0])), *(x[:0] for x in rows))


def entropies(hidden: Tensor, weight: Tensor, temperature: float = 1.0) -> Tensor:
    """H of every token's distribution, (M,) nats, WITH gradient: what an entropy bonus needs."""
    return by_rows(entropy_rows, hidden, weight, temperature=temperature)


def entropy_rows(logits: Tensor) -> Tensor:
    """-sum_v p_v log p_v, (M, V) -> (M,)."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def log_square_rows(logits: Tensor) -> Tensor:
    """log sum_v p_v^2, (M, V) -> (M,): the log-probability that a policy would expect of its own sample (WPO)."""
    return torch.logsumexp(2 * logits.log_softmax(-1), -1)
