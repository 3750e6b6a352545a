"""The feed-forward layer, with a gate and without, built from an `MLP` spec."""

from __future__ import annotations

from torch import Tensor, nn

from pellucid.nn.context import Context
from pellucid.nn.linear import Linear
from pellucid.nn.site import Site
from pellucid.nn.specs import MLP
from pellucid.ops import ACTIVATIONS, swiglu


class FeedForward(nn.Module):
    """x (B, T, D) -> (B, T, D): down(act(gate x) * up x), with gate and up in one product."""

    def __init__(self, spec: MLP, site: Site):
        super().__init__()
        self.spec = spec
        self.gate_up = Linear(site.dim, (spec.hidden, spec.hidden), spec.bias)
        self.down = Linear(spec.hidden, site.dim, spec.bias)

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        gate_up = self.gate_up(x)
        if self.spec.act == "silu":
            return self.down(swiglu(gate_up))
        gate, up = gate_up.chunk(2, -1)
        return self.down(ACTIVATIONS[self.spec.act](gate) * up)


class PlainFeedForward(nn.Module):
    """x (B, T, D) -> (B, T, D): down(act(up x)), as in the original Transformer and in GPT-2."""

    def __init__(self, spec: MLP, site: Site):
        super().__init__()
        self.spec = spec
        self.up = Linear(site.dim, spec.hidden, spec.bias)
        self.down = Linear(spec.hidden, site.dim, spec.bias)

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        return self.down(ACTIVATIONS[self.spec.act](self.up(x)))
