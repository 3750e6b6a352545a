"""The gated feed-forward layer, built from an `MLP` spec."""

from __future__ import annotations

from torch import Tensor, nn

from pellucid.nn.linear import Linear
from pellucid.nn.specs import MLP
from pellucid.ops import ACTIVATIONS, swiglu


class FeedForward(nn.Module):
    """x (B, T, D) -> (B, T, D): down(act(gate x) * up x), with gate and up in one product."""

    def __init__(self, spec: MLP, dim: int):
        super().__init__()
        self.spec = spec
        self.gate_up = Linear(dim, (spec.hidden, spec.hidden), spec.bias)
        self.down = Linear(spec.hidden, dim, spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if self.spec.act == "silu":
            return self.down(swiglu(gate_up))
        gate, up = gate_up.chunk(2, -1)
        return self.down(ACTIVATIONS[self.spec.act](gate) * up)
