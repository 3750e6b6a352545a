"""Activations by the names that `config.json` uses, and SwiGLU (arXiv 2002.05202, equation 6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pellucid.ops.compiled import jit_serves

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's word for the next one
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP
    "swish": F.silu,  # Marian's word for silu
}


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up with both halves in one tensor: (..., 2I) -> (..., I). One matrix product feeds both."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def swiglu(gate_up: Tensor) -> Tensor:
    """The same; on a CPU in one pass over memory each way, rounded once."""
    if not jit_serves(gate_up):
        return swiglu_reference(gate_up)
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _SwiGLU.apply(gate_up)  # type: ignore[no-any-return]
    return _kernel(gate_up.contiguous())


def _kernel(gate_up: Tensor) -> Tensor:
    from pellucid.ops.jit import train
    from pellucid.ops.jit.lanes import array

    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    train.gate(array(gate_up.view(-1, 2 * width)), array(out.view(-1, width)))
    return out


class _SwiGLU(torch.autograd.Function):
    """With s = sigmoid(gate):  d gate = g up s (1 + gate (1 - s)),  d up = g gate s."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return _kernel(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        from pellucid.ops.jit import train
        from pellucid.ops.jit.lanes import array

        (gate_up,), g = ctx.saved_tensors, grads[0].contiguous()
        d_gate_up, width = torch.empty_like(gate_up), g.shape[-1]
        train.gate_backward(*(array(t) for t in (g.view(-1, width), gate_up.view(-1, 2 * width), d_gate_up.view(-1, 2 * width))))
        return d_gate_up
