"""From one loss per token to one loss per optimizer step: which token weighs how much.

Every aggregation of the literature is a weight per token, so a loss is `sum(weight * token_loss)`. The weights are
made from the counts of the WHOLE optimizer step (all micro-batches, all ranks), known before the first backward pass.
So the loss of a micro-batch is its share of the step's loss: shares are added, never averaged, and the gradient does
not depend on how the step was cut.

Shapes: M trained tokens of this micro-batch, laid end to end; S sequences (completions). `sequence` (M,) int64 names
the completion of each token. A completion must lie whole in one micro-batch. A fully masked completion has no token
here; whether it counts in the sequence mean is decided once, in `count`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pellucid.errors import BadInput, nearest

Aggregation = Literal["sequence-mean", "token-mean", "token-mean-local", "constant", "sequence-sum", "token-sum"]
Empty = Literal["exclude", "count"]
AGGREGATIONS: tuple[str, ...] = Aggregation.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Counts:
    """Trained tokens and completions of a whole optimizer step. Counts of ranks are added: `a + b`."""

    tokens: int
    sequences: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens + other.tokens, self.sequences + other.sequences)


def count(lengths: Tensor, empty: Empty = "exclude") -> Counts:
    """Counts from the number of trained tokens of every completion of the step, (S,); 0 means fully masked.

    empty: "exclude" leaves fully masked completions out of the sequence count (verl); "count" keeps them there as
    zeros (trl's `grpo`), which shrinks the step of everybody else.
    """
    if empty not in ("exclude", "count"):
        raise BadInput(f"unknown choice for fully masked completions: {empty!r}", next="use 'exclude' or 'count'")
    sequences = lengths.numel() if empty == "count" else int((lengths > 0).sum())
    return Counts(tokens=int(lengths.sum()), sequences=sequences)


def sequence_lengths(sequence: Tensor) -> Tensor:
    """(M,) completion of each token -> (S,) number of tokens of each completion, S = largest id + 1."""
    return torch.bincount(sequence)


def sequence_sums(values: Tensor, sequence: Tensor) -> Tensor:
    """(M,) values -> (S,) their sums by completion; differentiable."""
    size = sequence_lengths(sequence).numel()
    return values.new_zeros(size).index_add(0, sequence, values)


def sequence_means(values: Tensor, sequence: Tensor) -> Tensor:
    """(M,) values -> (S,) their means by completion; a completion without tokens has mean 0."""
    return sequence_sums(values, sequence) / sequence_lengths(sequence).clamp(min=1)


def token_weights(sequence: Tensor, mode: Aggregation, counts: Counts, max_tokens: int | None = None) -> Tensor:
    """The weight of every token in the step's loss, (M,) float32.

    With N_tok, N_seq the step's counts, S of the N_seq completions in this micro-batch, and |o| the length of the
    token's completion:

    mode              weight              also known as
    sequence-mean     1 / (N_seq |o|)     trl `grpo`; verl `seq-mean-token-mean`; DeepSeekMath eq. 3
    token-mean        1 / N_tok           trl `dapo`; DAPO eq. 12 (over the batch, as implementations do, not per group)
    token-mean-local  S / (N_seq M)       trl `bnpo`: mean over this micro-batch, so the cut of the step changes it
    constant          1 / (N_seq max)     trl `dr_grpo`; Dr. GRPO (arXiv 2503.20783), max = longest completion allowed
    sequence-sum      1 / N_seq           trl `luspo`; verl `seq-mean-token-sum`
    token-sum         1                   verl `token-sum`

    Errors: BadInput for an unknown mode, or "constant" without `max_tokens`.
    """
    tokens, sequences = max(counts.tokens, 1), max(counts.sequences, 1)  # an empty step weighs nothing, not NaN
    ones = torch.ones(sequence.shape, dtype=torch.float32, device=sequence.device)
    if mode == "sequence-mean":
        return ones / sequence_lengths(sequence)[sequence] / sequences
    if mode == "token-mean":
        return ones / tokens
    if mode == "token-mean-local":
        return ones * (sequence_lengths(sequence) > 0).sum() / (sequences * max(sequence.numel(), 1))
    if mode == "constant":
        if not max_tokens:
            raise BadInput("the constant normaliser needs its constant", "max_tokens is not set",
                           "give max_tokens, the longest completion that sampling allows")
        return ones / (sequences * max_tokens)
    if mode == "sequence-sum":
        return ones / sequences
    if mode == "token-sum":
        return ones
    raise BadInput(f"unknown aggregation {mode!r}{nearest(str(mode), list(AGGREGATIONS))}",
                   next=f"use one of {', '.join(AGGREGATIONS)}")


def aggregate(
    token_loss: Tensor, sequence: Tensor, mode: Aggregation, counts: Counts, max_tokens: int | None = None
) -> Tensor:
    """This micro-batch's share of the step's loss: sum of weight * loss over its tokens, a scalar.

    Add the shares of micro-batches and of ranks (a data-parallel wrapper that averages gradients needs the share
    times the number of ranks). No token gives 0, with a gradient of 0.
    """
    return (token_loss * token_weights(sequence, mode, counts, max_tokens)).sum()
