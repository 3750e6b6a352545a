"""Estimators of KL(policy || reference) from the sampled token alone, and what their gradients really are.

With d = log p_ref - log p, the token sampled from p. Values are per token; in expectation over the token, given the
prefix (alignment notes, section 4; each line is checked by enumeration in the tests):

name          value             mean value    mean gradient as a LOSS, on-policy
k1            -d                KL(p||ref)    0: the score function has mean zero, so k1 as a loss does nothing
abs           |d|               -             -
k2            d^2 / 2           biased        grad KL(p||ref): right
k3            e^d - d - 1       KL(p||ref)    grad KL(ref||p): the forward KL's gradient
k3+           value of k3       KL(p||ref)    grad KL(p||ref): gradient of k2, straight through (verl)
k3-corrected  r (e^d - d - 1)   KL(p||ref)    grad KL(p||ref), also off-policy: r = p / p_old carries a gradient
                                              (DeepSeek-V3.2, arXiv 2512.02556; trl's default)

So: as a loss use k2, k3+ or k3-corrected; inside the reward use k1. k1, k2, k3 are those of Schulman (2020).
The correction is exact for the token's own ratio; a sequence ratio broadcast over tokens is an approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pellucid.errors import BadInput, nearest

Estimator = Literal["k1", "abs", "k2", "k3", "k3+", "k3-corrected"]


def k1(logp: Tensor, ref: Tensor) -> Tensor:
    """log p - log p_ref. Unbiased, of either sign; its mean gradient as a loss is zero."""
    return logp - ref


def absolute(logp: Tensor, ref: Tensor) -> Tensor:
    """|log p - log p_ref|: a distance, not an estimator of the KL."""
    return (logp - ref).abs()


def k2(logp: Tensor, ref: Tensor) -> Tensor:
    """(log p - log p_ref)^2 / 2. Biased value, right gradient as a loss."""
    return (logp - ref).square() / 2


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    """e^d - d - 1 >= 0, d = log p_ref - log p. Unbiased value; its gradient is that of the forward KL."""
    d = ref - logp
    return torch.expm1(d) - d  # expm1: the value near d = 0 is d^2/2, which e^d - 1 would round away


def k3_straight_through(logp: Tensor, ref: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2 (verl's `k3+`)."""
    square = k2(logp, ref)
    return square - square.detach() + k3(logp, ref).detach()


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": k1, "abs": absolute, "k2": k2, "k3": k3, "k3+": k3_straight_through, "k3-corrected": k3,
}


def kl_penalty(
    logp: Tensor, ref: Tensor, estimator: Estimator, ratio: Tensor | None = None, bound: float | None = None
) -> Tensor:
    """The chosen estimator at every token; all tensors of one shape.

    ratio: p / p_old with its gradient, needed by "k3-corrected" and used by no other.
    bound: clamps log p_ref - log p to +-bound. Off by default: it zeroes the gradient where the policy drifted most.
    Errors: BadInput for an unknown estimator, or a missing ratio.
    """
    if estimator not in ESTIMATORS:
        raise BadInput(f"unknown KL estimator {estimator!r}{nearest(str(estimator), list(ESTIMATORS))}",
                       next=f"use one of {', '.join(ESTIMATORS)}")
    if bound is not None:
        logp = ref + (logp - ref).clamp(-bound, bound)
    value = ESTIMATORS[estimator](logp, ref)
    if estimator != "k3-corrected":
        return value
    if ratio is None:
        raise BadInput("the estimator k3-corrected needs the ratio policy / sampling policy", next="pass ratio=")
    return ratio * value
