"""All layers of a plain decoder over the rows of a step on a GPU, in as few kernels as there are (ops/triton/fused.py).

The readable twin is the model itself (`gpu_step.GpuStep._layers`); `choose_fused` says for which models this stands in, and why not for
others. A step of one row, which is nothing but reading the weights, has kernels of its own: all layers in one where `choose_whole` says
so (ops/cuda/whole.cu), else a chain of products with what stands before and behind them. With more rows the products are PyTorch's.
Legend: N rows, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.engine.decode import unusual
from pellucid.engine.paged_cache import Pages
from pellucid.nn import Decoder, Linear
from pellucid.nn.specs import Rope
from pellucid.ops.cuda import whole
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
        chosen = choose_whole(model, pages)
        self.whole: WholePass | None = chosen.value
        self.reason = chosen.reason

    def hidden(self, numbers: Tensor, tiles: Sequence[paged.Tiles], drawn: Tensor) -> Tensor:
        """numbers (5, N) on the device -> the last hidden states (N, D)"""
        model: Any = self.model
        if numbers.shape[1] == 1 and self.whole is not None:
            return self.whole.hidden(numbers, drawn)
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
            self.frequencies[rope] = frequencies_of(rope, self.pages.device)
        return self.frequencies[rope]


def frequencies_of(rope: Rope, device: torch.device) -> Tensor:
    return rope_frequencies(rope.dim, rope.theta, rope.scaling_dict).to(device)


class WholePass:
    """A step of one row: all layers in one kernel."""

    def __init__(self, model: Decoder, pages: Pages, plan: whole.Plan):
        self.model, self.pages, self.plan = model, pages, plan
        spec: Any = model.spec.layers[0].mixer
        self.frequencies, self.factor = frequencies_of(spec.rope, pages.device), spec.rope.attention_factor
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        self.words = torch.zeros(2 * plan.words, dtype=torch.int64, device=pages.device)
        self.launches = torch.zeros(plan.counts, dtype=torch.int64, device=pages.device)
        self.found: list[list[int]] = []  # where the layers lay when `layers` was made
        self.layers = self.launches

    def hidden(self, numbers: Tensor, drawn: Tensor) -> Tensor:
        """numbers (5, 1) on the device -> the last hidden state (1, D)"""
        model: Any = self.model
        found = self._layers()
        if found != self.found:
            self.found, self.layers = found, torch.tensor(found, device=self.pages.device)
        mixer = model.layers[0].mixer
        return whole.run(
            self.plan, numbers, drawn, model.embed.weight, self.layers, self.frequencies, model.norm.weight, model.head_weight, self.words,
            self.launches, model.norm.eps, mixer.q_norm.eps if mixer.spec.qk_norm else 0.0, self.factor, self.scale)

    def _layers(self) -> list[list[int]]:
        """`struct Layer` of whole.cu, for each layer: where its tensors lie, what a row of its table of slots is apart, and its window."""
        model: Any = self.model
        found = []
        for i, layer in enumerate(model.layers):
            mixer, (keys, values) = layer.mixer, self.pages.entries[i]
            slots = self.pages.table.slots[self.pages.group_of[i]]
            norms = (mixer.q_norm, mixer.k_norm) if mixer.spec.qk_norm else (layer.norm1, layer.norm1)
            weights = (m.weight for m in (*_products(layer), layer.norm1, layer.norm2, *norms))
            found.append([*(t.data_ptr() for t in (*weights, keys.codes, values.codes, slots)), slots.stride(0), mixer.spec.window or 0])
        return found


def choose_fused(model: Decoder, pages: Pages) -> Choice:
    """A FusedPass, or None, and why."""
    why = unusual(model, pages.device.type)
    if why is None and any(type(m) is not Linear for layer in model.layers for m in _products(layer)):
        why = "quantized weights have no kernels on a GPU"
    if why is None and pages.codes.kept != model.embed.weight.dtype:
        why = f"a cache of {pages.codes.name} beside weights of {model.embed.weight.dtype}"
    if why:
        return Choice(None, f"layer by layer as the model is written ({why})")
    made = FusedPass(model, pages)
    return Choice(made, f"what stands between the products is fused; {made.reason}")


def choose_whole(model: Decoder, pages: Pages) -> Choice:
    """A WholePass, or None, and why."""
    layers, parameters = list(model.spec.layers), list(model.parameters())
    mixer: Any = layers[0].mixer
    ffn: Any = layers[0].ffn
    sizes = whole.Sizes(model.spec.dim, ffn.hidden, mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.rope.dim, mixer.qk_norm)
    alike = all(replace(layer, mixer=replace(layer.mixer, window=mixer.window)) == layers[0] for layer in layers)  # type: ignore[arg-type]
    why, plan = None, whole.choose_plan(sizes, pages.device)
    if plan.value is None:
        why = plan.reason
    elif not alike or len(layers) > whole.MOST_LAYERS:
        why = "all layers in one kernel: they are of several kinds, or too many"
    elif sum(p.weight.numel() for p in _products(model.layers[0])) * 2 > whole.LARGEST:
        why = "its products are long enough to hide what stands between them"
    elif mixer.qkv_bias or mixer.out_bias or ffn.bias:
        why = "all layers in one kernel: it knows no biases"
    elif any(p.dtype != torch.bfloat16 or p.data_ptr() % 16 for p in parameters):
        why = "all layers in one kernel: for bfloat16 weights that begin at multiples of 16 bytes"
    elif model.head_weight.numel() * 2 < plan.value.programs * whole.AHEAD:
        why = "all layers in one kernel: for models whose head is larger"
    if why:
        return Choice(None, f"one row by a chain of kernels ({why})")
    return Choice(WholePass(model, pages, plan.value), f"one row by {plan.reason}")


def _products(layer: Any) -> tuple[Any, ...]:
    return layer.mixer.qkv, layer.mixer.o, layer.ffn.gate_up, layer.ffn.down
