"""Activations by the names that `config.json` uses, and SwiGLU (arXiv 2002.05202, equation 6)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up with both halves in one tensor: (..., 2I) -> (..., I). One matrix product feeds both."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
