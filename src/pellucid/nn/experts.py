"""A mixture of experts in place of the feed-forward layer, built from a `MoE` spec.

Legend: B batch, T tokens, N = B T, D model width, E experts, I their width, k chosen for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.nn.context import Context, Routing
from pellucid.nn.feedforward import FeedForward
from pellucid.nn.linear import Linear
from pellucid.nn.site import Site
from pellucid.nn.specs import MLP, MoE
from pellucid.ops import balance
from pellucid.ops.dispatch import Pairs, capacity_of, pairs_by_expert, pairs_of_choice
from pellucid.ops.experts import ExpertLayers, ExpertWeights, experts
from pellucid.ops.router import expert_choice, route


class Router(nn.Module):
    """x (N, D) -> logits (N, E), in x's dtype, or in float32 where the spec says so.

    select_bias counts for choosing, not for weighing; no gradient reaches it, it follows the load (`update_biases`). It
    stays float32 whatever the model is cast to: rounded, it would choose other experts.
    """

    wide = ("select_bias",)

    def __init__(self, spec: MoE, dim: int):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.experts, dim))
        self.bias = nn.Parameter(torch.zeros(spec.experts)) if spec.router_bias else None
        self.select_bias = nn.Parameter(torch.zeros(spec.experts), requires_grad=False) if spec.select_bias else None
        self.load: Tensor | None = None  # tokens of each expert since the last `update_biases`

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32) if self.spec.wide_router else x.dtype
        return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts (N, k) of each token."""
        s = self.spec
        return route(logits, s.top_k, score=s.score, select_bias=self.select_bias, groups=s.groups, top_groups=s.top_groups,
                     group_score=s.group_score, renormalize=s.renormalize, scale=s.scale)

    def count(self, chosen: Tensor, real: Tensor | None) -> None:
        new = balance.load(chosen, self.spec.experts, real)
        self.load = new if self.load is None else self.load + new

    def draw_own(self, generator: torch.Generator) -> None:
        self.weight.normal_(0, self.weight.shape[1] ** -0.5, generator=generator)
        for bias in (self.bias, self.select_bias):
            if bias is not None:
                bias.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        before = None if self.select_bias is None else self.select_bias.data
        super()._apply(fn, recurse)
        if before is not None and self.select_bias is not None and self.select_bias.dtype != before.dtype:
            self.select_bias.data = before.to(self.select_bias.device)
        return self


class ExpertLinear(nn.Module):
    """The matrices (and biases) of all experts, stacked: weight (E, out, in), bias (E, out). Holds them; ops/experts.py
    works with them. parts: as in `Linear`, of each expert."""

    def __init__(self, experts: int, inputs: int, parts: tuple[int, ...], bias: bool):
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(experts, sum(parts), inputs))
        self.bias = nn.Parameter(torch.zeros(experts, sum(parts))) if bias else None

    @property
    def stacked(self) -> dict[str, tuple[int, ...]]:
        return {"weight": self.parts, "bias": self.parts}

    @property
    def whole(self) -> Tensor:
        """The matrices that the experts multiply with: the weight, and what is learned beside it (nn/lora.py)."""
        return self.weight

    def extra_repr(self) -> str:
        E, rows, inputs = self.weight.shape
        return f"{E} x ({inputs} -> {rows}){', bias' if self.bias is not None else ''}"


class Experts(nn.Module):
    """x (B, T, D) -> (B, T, D): the weighted sum of the experts that each token is given, and the shared expert's result."""

    def __init__(self, spec: MoE, site: Site):
        super().__init__()
        self.spec = spec
        first, last = spec.held or (0, spec.experts)
        E, I, D = last - first, spec.hidden, site.dim
        self.router = Router(spec, D)
        self.experts = nn.ModuleDict({
            "gate_up": ExpertLinear(E, D, (I, I), spec.expert_bias), "down": ExpertLinear(E, I, (D,), spec.expert_bias)})
        self.shared = FeedForward(MLP(spec.shared, spec.act), site) if spec.shared else None
        self.shared_gate = Linear(D, 1) if spec.shared_gate else None

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        logits, real = self.router(rows), None if ctx is None else _real(ctx)
        pairs, chosen = self.dispatch(logits, real)
        if ctx is not None and ctx.routing is not None:
            ctx.routing.real, ctx.routing.rows = real, x.shape[0]
            ctx.routing.add(self.spec, logits, chosen)
        y = experts(rows, pairs if self.spec.held is None else pairs.of(*self.spec.held), self.weights).view(x.shape)
        if self.shared is None:
            return y
        same = self.shared(x)
        return y + (same if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * same)

    @property
    def weights(self) -> ExpertWeights | ExpertLayers:
        gate_up, down = self.experts["gate_up"], self.experts["down"]
        if isinstance(gate_up, nn.ModuleList):  # of layers: quantized
            return ExpertLayers(gate_up, down, self.spec.act, self.spec.clamp)  # type: ignore[arg-type]
        return ExpertWeights(gate_up.whole, down.whole, gate_up.bias, down.bias, self.spec.act, self.spec.clamp)  # type: ignore[arg-type]

    def dispatch(self, logits: Tensor, real: Tensor | None) -> tuple[Pairs, Tensor]:
        """Which expert works on which token, and what each token chose (N, k)."""
        s, N = self.spec, len(logits) if real is None else int(real.sum())
        if s.expert_choice:
            weights, tokens = expert_choice(logits, min(N, capacity_of(N, s.experts, s.top_k, s.capacity or 1.0)), real)
            return pairs_of_choice(weights, tokens), tokens.new_empty(0, s.top_k)
        weights, chosen = self.router.choose(logits)
        learning = self.training and torch.is_grad_enabled()
        if learning and s.select_bias:
            self.router.count(chosen, real)
        capacity = capacity_of(N, s.experts, s.top_k, s.capacity) if s.capacity is not None and self.training else None
        return pairs_by_expert(weights, chosen, s.experts, real, capacity), chosen

    def extra_repr(self) -> str:
        s = self.spec
        return f"{s.experts} experts of width {s.hidden}, {s.top_k} for each token"


def _real(ctx: Context) -> Tensor | None:
    """(N,) bool: padding goes to no expert, and counts for no balance. None: there is none."""
    if ctx.real is not None:
        return ctx.real.flatten()
    return None if ctx.documents is None else (ctx.documents >= 0).flatten()


def balance_loss(routing: Routing) -> Tensor | None:
    """What the specs of the routed layers add to the training loss, weighted; None if nothing.

    The switch loss and the z-loss are means over the tokens of all layers, as in transformers; DeepSeek's loss within each
    sequence is added up over layers.
    """
    parts: list[Tensor] = []
    routed = [(s, x, c) for s, x, c in zip(routing.specs, routing.logits, routing.chosen, strict=True) if not s.expert_choice]
    switch = [(s, x, c) for s, x, c in routed if s.aux_loss and s.balance == "switch"]
    if switch:
        parts.append(switch[0][0].aux_loss * balance.switch_loss([x for _, x, _ in switch], [c for *_, c in switch], routing.real))
    parts += [s.aux_loss * balance.sequence_loss(x, c, routing.rows, s.score, routing.real)
              for s, x, c in routed if s.aux_loss and s.balance == "sequence"]
    z = [(s, x) for s, x in zip(routing.specs, routing.logits, strict=True) if s.z_loss]
    if z:
        parts.append(z[0][0].z_loss * balance.z_loss([x for _, x in z], routing.real))
    return torch.stack(parts).sum() if parts else None


def balanced(spec: Any) -> bool:
    """Whether a decoder's layers add anything to the training loss."""
    return any(isinstance(layer.ffn, MoE) and (layer.ffn.aux_loss or layer.ffn.z_loss) for layer in spec.layers)


@torch.no_grad()
def update_biases(model: nn.Module, move: bool = True) -> None:
    """After an optimizer step: every selection bias follows the load of the step's forward passes, which is forgotten then.
    move: False where the step was skipped."""
    for module in model.modules():
        if isinstance(module, Router) and module.load is not None:
            if move and module.select_bias is not None:
                module.select_bias.copy_(balance.updated_bias(module.select_bias, module.load, module.spec.bias_speed))
            module.load = None
