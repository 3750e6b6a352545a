"""Corrections for samples that the trainer's policy did not draw: another engine, another precision, older weights.

    w = p_trainer(token) / p_sampler(token),  both at the weights of the rollout (or later ones, in asynchronous training)

multiplies the policy term, never the KL term. Truncating w (TIS) keeps every token and biases a few; masking (MIS,
IcePop) drops what lies outside the band. Shapes: M tokens laid end to end, `sequence` (M,) their completion.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pellucid.align.aggregation import sequence_means, sequence_sums
from pellucid.align.choices import check_name
from pellucid.errors import BadInput

CorrectionLevel = Literal["token", "sequence", "sequence-mean", "sequence-max"]
Correction = Literal["none", "truncate", "mask"]


def log_weights(trainer: Tensor, sampler: Tensor, sequence: Tensor, level: CorrectionLevel = "token") -> Tensor:
    """log w at every token, (M,), detached. A token whose sampler log-probability is NaN (not reported) has log w = 0.

    level  "token":          its own: little variance, ignores how the prefix was drawn
           "sequence":       the sum over the completion: unbiased; its spread grows with the length (trl, verl default)
           "sequence-mean":  the mean: comparable between lengths
           "sequence-max":   the token that differs most: one bad token condemns its completion
    """
    check_name("correction level", level, CorrectionLevel)
    difference = (trainer.detach() - sampler.detach()).nan_to_num(nan=0.0)
    if level == "token":
        return difference
    if level == "sequence-max":
        size = int(sequence.max()) + 1 if sequence.numel() else 0
        high = difference.new_full((size,), -torch.inf).scatter_reduce(0, sequence, difference, "amax")
        low = difference.new_full((size,), torch.inf).scatter_reduce(0, sequence, difference, "amin")
        return torch.where(high >= -low, high, low)[sequence]
    return (sequence_sums if level == "sequence" else sequence_means)(difference, sequence)[sequence]


def importance_weights(
    trainer: Tensor, sampler: Tensor, sequence: Tensor, *, level: CorrectionLevel = "token",
    mode: Literal["truncate", "mask"] = "truncate", low: float | None = None, high: float | None = 2.0,
    log_bound: float = 20.0,
) -> Tensor:
    """The factor of every token's policy term, (M,), detached.

    mode  "truncate":  clamp(w, low, high): truncated importance sampling (TIS; Yao et al. 2025; trl `*_truncate`)
          "mask":      w inside [low, high], 0 outside: masked importance sampling (trl `*_mask`; IcePop is 0.5 to 5)
    log_bound: |log w| is held below it, so that a long completion cannot overflow (verl: 20).
    """
    check_name("correction", mode, ("truncate", "mask"))
    w = log_weights(trainer, sampler, sequence, level).clamp(-log_bound, log_bound).exp()
    floor, cap = 0.0 if low is None else low, torch.inf if high is None else high
    if not 0 <= floor <= cap:
        raise BadInput(f"no weight lies between {floor:g} and {cap:g}", next="choose 0 <= low <= high")
    return w.clamp(floor, cap) if mode == "truncate" else torch.where((w >= floor) & (w <= cap), w, 0.0)


def normalised(weights: Tensor, sequence: Tensor, level: CorrectionLevel) -> Tensor:
    """Weights divided by their mean over the step (over tokens, or over completions at the sequence levels): verl's
    `rollout_is_batch_normalize`. Give the WHOLE step, before it is cut into micro-batches."""
    mean = weights.mean() if level == "token" else sequence_means(weights, sequence)[sequence.unique()].mean()
    return weights / mean if bool(mean > 1e-8) else weights


def off_policy_mask(logp: Tensor, sampler: Tensor, advantages: Tensor, sequence: Tensor, threshold: float) -> Tensor:
    """Which tokens stay, (M,) bool: all with A >= 0, and those of completions whose mean of log p_sampler - log p is at
    most the threshold (DeepSeek-V3.2, arXiv 2512.02556, eq. 9; trl `off_policy_mask_threshold`).

    A bad answer that the policy has already left teaches noise. Tokens that the sampler did not score count as 0.
    """
    drift = sequence_means((sampler.detach() - logp.detach()).nan_to_num(nan=0.0), sequence)[sequence]
    return (advantages >= 0) | (drift <= threshold)
