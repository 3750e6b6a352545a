"""INT8 and INT4 parts: what one process holds of the quantized model, so that all together compute what it computes.

Every matrix is rounded as a part of the whole's. Where it is cut by rows, by experts or by vocabulary nothing is to be done: a row's
codes and scales are its own. Where it is cut by columns (what mixers and feed-forwards end with), with x = [x_1 x_2 ...]:

    INT8    a row has one scale, and so have a token's activations: their largest values are those over all processes, for which a
            few numbers go round (a float a row of W when it is loaded, a float a token in each product). The integers
            are then the whole's, and so are their sums: W x = sum_i (a_i codes_i) scale / factor
    INT4    32 columns have a scale, and 32 activations: nothing goes round, if the cut is between two groups
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pellucid.errors import BadInput
from pellucid.nn import Decoder, Linear
from pellucid.nn.experts import ExpertLinear
from pellucid.parallel.group import Group
from pellucid.parallel.split import COLUMNS, Slice, fitting
from pellucid.quant import Int8Linear, largest_of, quantize_rows, rounded_layer
from pellucid.quant.int4 import GROUP


class SharedInt8Linear(Int8Linear):
    """Some columns of a matrix whose others are in other processes: x (..., K of this process) -> a partial sum."""

    def __init__(self, weight: Tensor, bias: Tensor | None, parts: tuple[int, ...], group: Group):
        codes, scale = quantize_rows(weight, group.max(largest_of(weight.float())))
        super().__init__(codes, scale, bias, parts)
        self.group = group

    def _by_token(self, rows: Tensor) -> Tensor:
        return self._scaled(rows, self.group.max(largest_of(rows)))


class Rounding:
    """Takes the modules of a part as they are filled, and puts quantized ones in their places.  bits: 8 or 4."""

    def __init__(self, part: Any, share: Slice, bits: int):
        self.part, self.share, self.bits = part, share, bits

    @torch.no_grad()
    def __call__(self, name: str) -> None:
        module: Any = self.part.get_submodule(name)
        if isinstance(module, Linear):
            self._put(name, self._layer(name, module, 8 if name == "head" else self.bits))
        elif isinstance(module, ExpertLinear):
            self._put(name, nn.ModuleList(rounded_layer(w, None if module.bias is None else module.bias[e], module.parts, self.bits)
                                          for e, w in enumerate(module.weight)))
        elif name == "embed":
            codes, scale = quantize_rows(module.weight)
            self.part.embed = nn.Embedding.from_pretrained(codes.float() * scale)
            if self.part.head is None:
                self.part.head = Int8Linear(codes, scale)

    def _layer(self, name: str, m: Linear, bits: int) -> nn.Module:
        how, among = self.share.cut(name)
        if how == COLUMNS and (bits == 8 or m.weight.shape[1] % GROUP):
            return SharedInt8Linear(m.weight, m.bias, m.parts, self.part.group if among == self.share else self.part.mixing)
        return rounded_layer(m.weight, m.bias, m.parts, bits)

    def _put(self, name: str, module: nn.Module) -> None:
        owner, _, leaf = name.rpartition(".")
        self.part.get_submodule(owner)._modules[leaf] = module  # the floats go with what it was


def check_groups(whole: Decoder, share: Slice) -> None:
    """BadInput where a cut by columns would go through a group of INT4 weights.  whole: may be on the meta device."""
    for name, module in whole.named_modules():
        how, among = share.cut(name)
        if not isinstance(module, Linear) or how != COLUMNS:
            continue
        columns = module.weight.shape[1]
        if columns % GROUP == 0 and columns // among.size % GROUP:
            numbers = fitting(columns // GROUP)
            raise BadInput(
                f"INT4 weights cannot be cut over {among.size} processes", f"{name} has {columns} columns in groups of {GROUP}, and a cut would "
                "go through a group", f"use {numbers} process{'es' * (numbers != '1')}, or INT8")
