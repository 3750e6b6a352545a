"""Distillation: divergences between the distributions of a teacher t and a student s over the next token.

    forward KL   sum_v t_v (log t_v - log s_v)      covers all that the teacher would say (beta = 0)
    reverse KL   sum_v s_v (log s_v - log t_v)      says only what the teacher would say  (beta = 1)
    JSD          beta KL(t || m) + (1 - beta) KL(s || m),  m = (1 - beta) s + beta t      in between

(generalised Jensen-Shannon divergence, GKD, arXiv 2306.13649, eq. 1, with trl's convention for the ends). On the student's
own samples the reverse KL is on-policy distillation. Shapes: M tokens, V vocabulary, K tokens of a sparse teacher. Values
are per token, (M,), nats; sum them with `aggregate`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pellucid.align.choices import check_name
from pellucid.align.head import by_rows
from pellucid.errors import BadInput

Tail = Literal["bucket", "renormalise", "drop"]


def jsd_rows(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """Log-probabilities of student and teacher, (M, V) each -> (M,). An event that both give probability 0 adds 0."""
    if not 0 <= beta <= 1:
        raise BadInput(f"beta = {beta:g} is not in [0, 1]", next="0 is the forward KL, 1 the reverse KL")
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def distill_logits(
    student: Tensor, teacher: Tensor, student_weight: Tensor, teacher_weight: Tensor, *, beta: float = 0.0,
    temperature: float = 1.0, chunk: int | None = None,
) -> Tensor:
    """The divergence at every token from hidden states, over the whole vocabulary, (M,), chunk by chunk.

    student (M, D), teacher (M, E): last hidden states of the same tokens; weights (V, D), (V, E): their heads. Both
    logits are divided by `temperature`. No gradient reaches the teacher. Nothing of size M * V is kept.
    """
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise BadInput(f"teacher and student differ in vocabulary: {teacher_weight.shape[0]} and {student_weight.shape[0]}",
                       "their tokens are not the same", "distil over text (sequence level), or choose another teacher")
    head = teacher_weight.detach()

    def rows(logits: Tensor, h: Tensor) -> Tensor:
        other = (h @ head.to(h.dtype).mT).to(logits.dtype) / temperature
        return jsd_rows(logits.log_softmax(-1), other.log_softmax(-1), beta)

    return by_rows(rows, student, student_weight, teacher.detach(), temperature=temperature, chunk=chunk)


def sparse_rows(student: Tensor, ids: Tensor, teacher: Tensor, *, beta: float = 0.0, tail: Tail = "bucket") -> Tensor:
    """The divergence where the teacher is known at K tokens only: student log-probabilities (M, V), ids (M, K) and the
    teacher's log-probabilities (M, K) there; -inf marks an unused place.

    tail, what becomes of the probability outside the K tokens:
      "bucket"       one more event holds the rest of each side: a lower bound of the full divergence, never negative
      "renormalise"  both sides are renormalised over the K tokens: the student's mass outside them costs nothing
      "drop"         the K terms of the sum alone (verl's forward-KL top-k); may be negative, and unstable for beta = 1
    """
    check_name("tail", tail, Tail)
    valid = teacher > -torch.inf
    s = torch.where(valid, student.gather(-1, ids), -torch.inf)
    if tail == "bucket":
        s, teacher = (torch.cat([x, _rest(x)], -1) for x in (s, teacher))
    elif tail == "renormalise":
        s, teacher = (x - torch.logsumexp(x, -1, keepdim=True) for x in (s, teacher))
    return jsd_rows(s, teacher, beta)


def distill_top_k(
    student: Tensor, student_weight: Tensor, ids: Tensor, teacher: Tensor, *, beta: float = 0.0, tail: Tail = "bucket",
    temperature: float = 1.0, chunk: int | None = None,
) -> Tensor:
    """`sparse_rows` from the student's hidden states, (M,), chunk by chunk. The teacher's log-probabilities are taken as
    they are: at the same temperature."""

    def rows(logits: Tensor, k: Tensor, t: Tensor) -> Tensor:
        return sparse_rows(logits.log_softmax(-1), k, t, beta=beta, tail=tail)

    return by_rows(rows, student, student_weight, ids, teacher.detach(), temperature=temperature, chunk=chunk)


def top_k_of(teacher: Tensor, teacher_weight: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of a local teacher and their log-probabilities, (M, k) each: what is kept for later."""
    with torch.no_grad():
        both = by_rows(lambda logits: torch.stack([x.double() for x in logits.log_softmax(-1).topk(k, -1)], -1),
                       teacher, teacher_weight, temperature=temperature)
    return both[..., 1].long(), both[..., 0].to(torch.float32)


def dft(logp: Tensor) -> Tensor:
    """-sg[p] log p of every token, (M,): supervised fine-tuning with the bounded gradient of a reward (arXiv 2508.05629)."""
    return -logp.detach().exp() * logp


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) from log-probabilities; 0 log 0 = 0."""
    inside = p > -torch.inf
    p, q = torch.where(inside, p, 0.0), torch.where(inside, q, 0.0)
    return torch.where(inside, p.exp() * (p - q), 0.0).sum(-1)


def _rest(logp: Tensor) -> Tensor:
    """log(1 - sum exp(logp)), (M, K) -> (M, 1); the sum is held below 1, where rounding would make the rest negative."""
    total = torch.logsumexp(logp, -1, keepdim=True).clamp(max=-1e-7)
    return (-torch.expm1(total)).log()
