"""Statistics inside groups of completions of one prompt, over the entries that count.

Shapes: N prompts, G completions each. Everything is in float64 with the unbiased standard deviation (n - 1).

A group teaches only if its rewards differ. That is decided by max == min, never by a small standard deviation: the
mean of G copies of 0.1 differs from 0.1 in the last bit, and a division by a tiny standard deviation turns such noise
into a full-size update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.errors import BadInput


def checked(rewards: Tensor, valid: Tensor | None, name: str = "reward") -> tuple[Tensor, Tensor]:
    """Rewards in float64 with NaN replaced by 0, and which entries are valid; both (N, G)."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise BadInput(f"{name}: shape {tuple(rewards.shape)} is not (prompts, completions >= 2)",
                       "an advantage compares completions of one prompt; with a single one there is nothing to compare",
                       "sample a group of at least 2 completions for every prompt")
    return graded(rewards, valid, name)


def graded(rewards: Tensor, valid: Tensor | None, name: str = "reward") -> tuple[Tensor, Tensor]:
    """Like `checked`, for any shape: NaN means that nobody graded it."""
    r = rewards.detach().double()
    if r.isinf().any():
        raise BadInput(f"{name}: an infinite reward", next="bound the reward, or give NaN for 'not graded'")
    present = ~r.isnan()
    if valid is not None:
        if valid.shape != rewards.shape:
            raise BadInput(f"valid has shape {tuple(valid.shape)}, the rewards {tuple(rewards.shape)}")
        present = present & valid.bool()
    return torch.where(present, r, 0.0), present


def group_mean(r: Tensor, present: Tensor) -> Tensor:
    """(N, G) -> (N, 1) mean of the valid entries; 0 where there is none."""
    return torch.where(present, r, 0.0).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)


def group_std(r: Tensor, present: Tensor) -> Tensor:
    """(N, G) -> (N, 1) unbiased standard deviation of the valid entries; 0 where there are fewer than two."""
    squares = torch.where(present, (r - group_mean(r, present)).square(), 0.0).sum(1, keepdim=True)
    return (squares / (present.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()


def varies(r: Tensor, present: Tensor) -> Tensor:
    """(N, G) -> (N,) whether the largest valid entry exceeds the smallest."""
    largest = torch.where(present, r, -torch.inf).amax(1)
    return largest > torch.where(present, r, torch.inf).amin(1)
