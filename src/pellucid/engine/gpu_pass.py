"""All layers of a plain decoder over the rows of a step on a GPU, in as few kernels as there are (ops/triton/fused.py).

The readable twin is the model itself (`gpu_step.GpuStep._layers`); `choose_fused` says for which models this stands in, and why not for
others. A step of one row, which is nothing but reading the weights, has kernels of its own: the products are PyTorch's otherwise.
Legend: N rows, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.engine.decode import unusual
from pellucid.engine.paged_cache import Pages
from pellucid.nn import Decoder, Linear
from pellucid.nn.specs import Rope
from pellucid.ops.rope import rope_frequencies
from pellucid.ops.triton import fused, paged
from pellucid.runtime import Choice

TOKEN, ROW, POSITION, REAL, SOURCE = range(5)
"""What a step brings of each of its rows, as rows of one array: one transfer. ROW: of the table of slots. REAL: 0 fills up. SOURCE: the
row of the last step whose draw is the token, where the host does not know it yet; else -1."""


class FusedPass:
    """Parameters are read where they are: a model whose weights change in place needs no new one."""

    def __init__(self, model: Decoder, pages: Pages):
        self.model, self.pages = model, pages
        self.frequencies: dict[Rope, Tensor] = {}

    def hidden(self, numbers: Tensor, tiles: Sequence[paged.Tiles], drawn: Tensor) -> Tensor:
        """numbers (5, N) on the device -> the last hidden states (N, D)"""
        model: Any = self.model
        x = fused.embed(numbers[TOKEN], numbers[SOURCE], drawn, model.embed.weight)
        one = len(x) == 1
        delta: Tensor | None = None
        for i, layer in enumerate(model.layers):
            qkv, delta = self._normed(layer.norm1, layer.mixer.qkv, x, delta, one)
            attended = self._attend(i, layer.mixer, qkv, numbers, tiles)
            delta = self._added(layer.mixer.o, attended, x, one)
            gated, delta = self._normed(layer.norm2, layer.ffn.gate_up, x, delta, one, gated=True)
            delta = self._added(layer.ffn.down, gated, x, one)
        return fused.add_norm(x, delta, model.norm.weight, model.norm.eps, model.embed.weight.dtype)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden (N, D) -> (N, V), written to `out` (N, V)"""
        weight = self.model.head_weight
        return fused.row_product(hidden, weight, out) if len(hidden) == 1 else torch.mm(hidden, weight.t(), out=out)

    def _normed(self, norm: Any, product: Linear, x: Tensor, delta: Tensor | None, one: bool, gated: bool = False) -> tuple[Tensor, None]:
        """x += delta (in place), then the product of its norm, gated or not. Nothing is left to add."""
        weight, bias = product.weight, product.bias
        if one:
            width = weight.shape[0] // (2 if gated else 1)
            return fused.row_product(x, weight, weight.new_empty(1, width), norm.weight, norm.eps, bias, gated), None
        made = F.linear(fused.add_norm(x, delta, norm.weight, norm.eps, weight.dtype), weight, bias)
        return fused.gate(made) if gated else made, None

    def _added(self, product: Linear, h: Tensor, x: Tensor, one: bool) -> Tensor | None:
        """What is to be added to x; of one row it is done."""
        if not one:
            return F.linear(h, product.weight, product.bias)
        fused.row_product(h, product.weight, x, bias=product.bias, add=True)
        return None

    def _attend(self, index: int, mixer: Any, qkv: Tensor, numbers: Tensor, tiles: Sequence[paged.Tiles]) -> Tensor:
        """(N, (H + 2K) d) -> (N, H d), by way of the pages."""
        spec, (keys, values) = mixer.spec, self.pages.entries[index]
        slots = self.pages.table.slots[self.pages.group_of[index]]
        norms = (mixer.q_norm.weight, mixer.k_norm.weight) if spec.qk_norm else None
        eps = mixer.q_norm.eps if norms else 0.0
        frequencies, factor = self._frequencies(spec.rope), spec.rope.attention_factor
        where = slots, numbers[ROW], numbers[POSITION]
        if all(some.most == 1 for some in tiles):
            raw = paged.Raw(norms, eps, frequencies, factor)
            out = paged.attend(qkv.unflatten(1, (-1, spec.head_dim)), keys.codes, values.codes, *where, tiles, spec.window, spec.scale, raw=raw)
        else:
            q = fused.heads(qkv, spec.heads, norms, eps, frequencies, factor, numbers[POSITION], numbers[ROW], slots, keys.codes, values.codes)
            out = paged.attend(q, keys.codes, values.codes, *where, tiles, spec.window, spec.scale)
        return out.flatten(1)

    def _frequencies(self, rope: Rope) -> Tensor:
        if rope not in self.frequencies:
            self.frequencies[rope] = rope_frequencies(rope.dim, rope.theta, rope.scaling_dict).to(self.pages.device)
        return self.frequencies[rope]


def choose_fused(model: Decoder, pages: Pages) -> Choice:
    """A FusedPass, or None, and why."""
    why = unusual(model, pages.device.type)
    if why is None and any(type(m) is not Linear for layer in model.layers for m in _products(layer)):
        why = "quantized weights have no kernels on a GPU"
    if why is None and pages.codes.kept != model.embed.weight.dtype:
        why = f"a cache of {pages.codes.name} beside weights of {model.embed.weight.dtype}"
    if why:
        return Choice(None, f"layer by layer as the model is written ({why})")
    return Choice(FusedPass(model, pages), "what stands between the products is fused")


def _products(layer: Any) -> tuple[Any, ...]:
    return layer.mixer.qkv, layer.mixer.o, layer.ffn.gate_up, layer.ffn.down
