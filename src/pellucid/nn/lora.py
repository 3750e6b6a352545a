"""Low-rank adapters (LoRA, arXiv 2106.09685): W stays as it is, and B A is learned beside it.

    y = W x + (alpha / r) B A x,      A (r, in) small and random, B (out, r) zero: at first nothing changes

Our matrices may be several of the Hub's stacked by rows (q, k, v). Each of those has an adapter of its own, as PEFT has it:
it acts on its rows of the stack. The stacked matrices of experts have one adapter an expert, over all rows of its matrix, as PEFT's
`target_parameters`. Where the adapters belong and how they are stored: models/lora.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.nn.experts import ExpertLinear
from pellucid.nn.linear import Linear


class Adapter(nn.Module):
    """B A on the rows [start, stop) of a stacked matrix. source: the Hub's name of the matrix."""

    def __init__(self, source: str, start: int, stop: int, inputs: int, rank: int, weight: Tensor, generator: torch.Generator):
        super().__init__()
        self.source, self.start, self.stop = source, start, stop
        bound = 1 / math.sqrt(inputs)  # PEFT's: Kaiming with a = sqrt(5)
        first = (2 * torch.rand(rank, inputs, generator=generator) - 1) * bound
        self.a = nn.Parameter(first.to(weight.device, weight.dtype))
        self.b = nn.Parameter(torch.zeros(stop - start, rank, device=weight.device, dtype=weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., stop - start)"""
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


class LoraLinear(Linear):
    """A `Linear` with adapters; it holds the same weight, which is trained no more."""

    def __init__(self, base: Linear, adapters: list[Adapter], scale: float):
        nn.Module.__init__(self)
        self.parts, self.groups = base.parts, base.groups
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        self.adapters = nn.ModuleList(adapters)

    @property
    def all(self) -> list[Adapter]:
        return list(self.adapters)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for adapter in self.all:
            y[..., adapter.start : adapter.stop] += self.scale * adapter(x)
        return y

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + (alpha / r) B A, added in float32 or wider."""
        wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)
        for adapter in self.all:
            wide[adapter.start : adapter.stop] += self.scale * (adapter.b.to(wide.dtype) @ adapter.a.to(wide.dtype))
        return wide.to(self.weight.dtype)


class ExpertAdapter(nn.Module):
    """B A of every expert: a (E, r, in), b (E, out, r). source: the name of the stack in transformers' memory."""

    def __init__(self, source: str, rank: int, weight: Tensor, generator: torch.Generator):
        super().__init__()
        E, rows, inputs = weight.shape
        self.source = source
        first = (2 * torch.rand(E, rank, inputs, generator=generator) - 1) / math.sqrt(inputs)
        self.a = nn.Parameter(first.to(weight.device, weight.dtype))
        self.b = nn.Parameter(torch.zeros(E, rows, rank, device=weight.device, dtype=weight.dtype))


class LoraExperts(ExpertLinear):
    """The stacked matrices of experts with an adapter each; W + (alpha / r) B A is made anew in every pass, one layer at a time."""

    def __init__(self, base: ExpertLinear, adapter: ExpertAdapter, scale: float):
        nn.Module.__init__(self)
        self.parts, self.weight, self.bias, self.scale = base.parts, base.weight, base.bias, scale
        self.adapters = nn.ModuleList([adapter])

    @property
    def all(self) -> list[ExpertAdapter]:
        return list(self.adapters)  # type: ignore[arg-type]

    @property
    def whole(self) -> Tensor:
        (adapter,) = self.all
        return torch.baddbmm(self.weight, adapter.b, adapter.a, alpha=self.scale)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + (alpha / r) B A, added in float32 or wider."""
        (adapter,), dtype = self.all, torch.promote_types(self.weight.dtype, torch.float32)
        return torch.baddbmm(self.weight.to(dtype), adapter.b.to(dtype), adapter.a.to(dtype), alpha=self.scale).to(self.weight.dtype)


def adapted(model: nn.Module) -> dict[str, LoraLinear | LoraExperts]:
    """The matrices with adapters, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (LoraLinear, LoraExperts))}
