"""Which keys a query may see, as bool masks and as biases of 0 and -inf."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(T: int, S: int, *, causal: bool = True, window: int | None = None, device: torch.device | None = None) -> Tensor:
    """(T, S) bool: which key each query may see. Query t stands at key position S - T + t.

    window: the number of keys a query sees, itself included (Mistral's convention: i - window < j <= i).
    """
    i = torch.arange(S - T, S, device=device)[:, None]
    j = torch.arange(S, device=device)[None, :]
    seen = (j <= i) if causal else torch.ones(T, S, dtype=torch.bool, device=device)
    return seen & (j > i - window) if window is not None else seen


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """bool mask, True = visible -> 0 where visible and -inf elsewhere. A row that sees nothing becomes all 0: finite
    numbers that nobody may use, instead of NaN."""
    blind = ~mask.any(-1, keepdim=True)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~(mask | blind), -torch.inf)
