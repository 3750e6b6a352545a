"""Advantages of single tokens: generalised advantage estimation with a critic, and plain returns (REINFORCE++).

Shapes: B rows, T tokens, `mask` True at tokens that the MODEL wrote. In multi-turn episodes tool and user tokens stand
between them: they are no actions, so values and advantages are carried over them, and an episode gives the same with
and without its observation tokens. A reward that stands on such a token would be lost: it is refused.
Flat form: M model tokens laid end to end, `sequence` (M,) their completion; `Layout` goes there and back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.align.aggregation import sequence_lengths
from pellucid.errors import BadInput


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438): advantages and returns, both (B, T), 0 where masked.

        delta_t = r_t + gamma V_{t+1} - V_t;    A_t = delta_t + gamma lam A_{t+1};    return_t = A_t + V_t

    V_{t+1} and A_{t+1} are those of the next MODEL token; after the last one both are 0. Returns come from the
    advantages as they are: whiten the advantages afterwards, never before.
    """
    keep = _checked(rewards, mask, values)
    advantages = torch.zeros_like(values)
    next_value, next_advantage = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        here = keep[:, t]
        next_advantage = torch.where(here, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, next_advantage, 0.0)
    return advantages, torch.where(keep, advantages + values, 0.0)


def returns_to_go(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + gamma G_{t+1} over the model tokens, (B, T), 0 where masked (REINFORCE++, arXiv 2501.03262)."""
    keep = _checked(rewards, mask)
    returns, ahead = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        ahead = torch.where(keep[:, t], rewards[:, t] + gamma * ahead, ahead)
        returns[:, t] = torch.where(keep[:, t], ahead, 0.0)
    return returns


def token_rewards(score: Tensor, sequence: Tensor, kl: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """r_t = -beta kl_t + [t is the last model token of its completion] score, (M,) (arXiv 1909.08593, eq. 2).

    score (S,) by completion; kl (M,) the estimator at every token, k1 for the right gradient (see `kl`).
    A score belongs to the token that ended the answer, never to a tool's token behind it.
    """
    layout = Layout(sequence)
    rewards = torch.zeros(sequence.shape, dtype=torch.float64, device=sequence.device)
    if kl is not None:
        rewards = rewards - beta * kl.detach().double()
    return rewards + torch.where(layout.is_last, score.double()[sequence], 0.0)


class Layout:
    """(M,) tokens laid end to end <-> (S, T) rows. Tokens of one completion keep their order; others may stand between."""

    def __init__(self, sequence: Tensor):
        lengths = sequence_lengths(sequence)
        order = sequence.argsort(stable=True)
        starts = lengths.cumsum(0) - lengths
        column = torch.empty_like(sequence)
        column[order] = torch.arange(sequence.numel(), device=sequence.device) - starts[sequence[order]]
        self.row, self.column = sequence, column
        self.shape = (lengths.numel(), int(lengths.max()) if lengths.numel() else 0)
        self.mask = self.rows(torch.ones_like(sequence)).bool()
        self.is_last = column == (lengths[sequence] - 1)

    def rows(self, values: Tensor) -> Tensor:
        """(M,) -> (S, T), 0 behind the end of a completion."""
        return values.new_zeros(self.shape).index_put((self.row, self.column), values)

    def flat(self, rows: Tensor) -> Tensor:
        """(S, T) -> (M,)"""
        return rows[self.row, self.column]


def _checked(rewards: Tensor, mask: Tensor, values: Tensor | None = None) -> Tensor:
    keep = mask.bool()
    if rewards.ndim != 2 or rewards.shape != keep.shape or (values is not None and values.shape != keep.shape):
        raise BadInput("rewards, values and mask must share one shape (rows, tokens)")
    if bool((rewards.masked_fill(keep, 0.0) != 0).any()):
        raise BadInput("a reward stands on a token that the model did not write",
                       "such a token is skipped, and its reward would be lost",
                       "put the reward on the last model token before it")
    return keep
