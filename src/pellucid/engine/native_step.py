"""A whole step of the engine in one call of the C++ kernels (ops/native): embedding to last hidden state, products included.

A model of 30 million parameters makes a token in about a millisecond; a call of an operator costs some microseconds and there
are a dozen in a layer, so that what runs between the products decides. Here threads stay and meet at barriers. Residual, norms,
rotations, attention and gates are float32; in bfloat16 models only what goes into a product or into the cache is rounded. The
readable twins: engine/paged_step.py (the same step by numba and PyTorch's products), and the flat pass of engine/runner.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.engine.decode import unusual
from pellucid.engine.paged_cache import Pages
from pellucid.engine.paged_step import PagedBatch
from pellucid.engine.scheduler import Part
from pellucid.nn import Decoder, Linear, Rope
from pellucid.ops import rope_angles
from pellucid.ops.cache_codes import CacheCodes
from pellucid.ops.native.library import Layer, Matrix, Step, choose_native, plain
from pellucid.ops.rope import rope_frequencies
from pellucid.quant import Int4Linear, Int8Linear
from pellucid.quant.int4 import NativeInt4
from pellucid.quant.kernels import Native
from pellucid.runtime import Choice


def native_unsuited(model: Decoder, codes: CacheCodes) -> str | None:
    """Why the C++ kernels cannot run this model's steps; None if they can."""
    if choose_native().value is None:
        return choose_native().reason
    if why := unusual(model):
        return why
    if codes.top is not None or codes.kept not in (torch.float32, torch.bfloat16):
        return f"the C++ kernels do not read a cache of {codes.name}"
    dtype = model.embed.weight.dtype
    for name, p in model.named_parameters():
        if p.dtype != dtype or not p.is_contiguous():
            return f"{name} is {p.dtype}, where the embedding is {dtype}" if p.dtype != dtype else f"{name} is not contiguous"
    for name, m in model.named_modules():
        if isinstance(m, Int8Linear) and (m.kernel != Native() or m.activations != "token"):
            return f"{name} was packed for {m.kernel.name} with one scale a {m.activations}"
        if isinstance(m, Int4Linear) and m.kernel != NativeInt4():
            return f"{name} was packed for {m.kernel.name}"
    return None


class NativeStep:
    """`hidden(tokens (N,), batch)` -> (N, D) float32; `logits` of the rows that are asked for.

    Parameters are read where they are: a model whose weights change in place, or move, needs no new step.
    """

    batch = 2**31  # rows that `logits` takes

    def __init__(self, model: Decoder, pages: Pages):
        self.model, self.pages, self.library = model, pages, choose_native().value
        self.tables: dict[Rope, tuple[Tensor, Tensor]] = {}
        self.rows = 0  # of the tables
        self.homes = [(m._parameters, name) for m in model.modules() for name, p in m._parameters.items() if p is not None]
        self.addresses: list[int] = []
        self.tail: Matrix = Matrix()
        self.followed = False  # by the pass that this step's logits come from

    @staticmethod
    def suits(parts: Sequence[Part]) -> bool:
        """All: many tokens of a request attend tile by tile, at the rate of products (one by one where over 16 query heads share a key head)."""
        return True

    def hidden(self, tokens: Tensor, batch: PagedBatch) -> Tensor:
        self._follow(batch.slots.shape[1])
        self.followed = True
        step, out = self.step, torch.empty(len(tokens), self.model.spec.dim, dtype=torch.float32, device="cpu")
        indices = (tokens, batch.positions, batch.request, *batch.every_into, *batch.every_slots)
        assert all(t.dtype == torch.int64 and t.is_contiguous() for t in indices)
        step.tokens, step.positions, step.request, *rest = (t.data_ptr() for t in indices)
        groups = len(batch.every_slots)
        step.into, step.slots = (c_void_p * groups)(*rest[:groups]), (c_void_p * groups)(*rest[groups:])
        step.M, step.groups, (step.requests, step.longest), step.hidden = len(tokens), groups, batch.slots.shape, out.data_ptr()
        self.library.step(step)
        return out

    def logits(self, h: Tensor) -> Tensor:
        """(n, D) -> (n, V) float32"""
        if not self.followed:  # the pass before was the flat one
            self._follow(1)
        self.followed = False
        return self.library.product(self.tail, h.float())  # type: ignore[no-any-return]

    def _follow(self, longest: int) -> None:
        """Rotations for so many positions; and where the parameters lie now."""
        addresses = [parameters[name].data_ptr() for parameters, name in self.homes]  # type: ignore[union-attr]
        if longest > self.rows:
            self.rows = min(max(2 * self.rows, longest, 1024), max(self.model.spec.context, longest))
            for rope in {layer.mixer.rope for layer in self.model.spec.layers}:
                cos, sin = rope_angles(torch.arange(self.rows), rope_frequencies(rope.dim, rope.theta, rope.scaling_dict))
                self.tables[rope] = cos[:, : rope.dim // 2].contiguous(), sin[:, : rope.dim // 2].contiguous()
        elif addresses == self.addresses:
            return
        self.addresses = addresses
        self._point()

    def _point(self) -> None:
        """Fills the structures."""
        model, spec, first = self.model, self.model.spec, self.pages.entries[0][0].codes
        self.layers = (Layer * len(spec.layers))(*(self._layer(layer, i) for i, layer in enumerate(model.layers)))
        self.step = Step(
            layers=self.layers, embedding=model.embed.weight.data_ptr(), norm=model.norm.weight.data_ptr(), count=len(spec.layers),
            dim=spec.dim, vocab=spec.vocab, half=model.embed.weight.dtype == torch.bfloat16, half_cache=first.dtype == torch.bfloat16,
            eps=model.norm.eps, places=len(first), table=self.rows)
        self.tail = plain(model.embed.weight.detach(), None) if model.head is None else matrix_of(model.head)

    def _layer(self, layer: Any, index: int) -> Layer:
        mixer, ffn, spec = layer.mixer, layer.ffn, layer.mixer.spec
        keys, values = (kept.codes for kept in self.pages.entries[index])
        cos, sin = self.tables[spec.rope]
        return Layer(
            matrix_of(mixer.qkv), matrix_of(mixer.o), matrix_of(ffn.gate_up), matrix_of(ffn.down), layer.norm1.weight.data_ptr(),
            layer.norm2.weight.data_ptr(), mixer.q_norm.weight.data_ptr() if spec.qk_norm else None,
            mixer.k_norm.weight.data_ptr() if spec.qk_norm else None, cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr(),
            spec.heads, spec.kv_heads, spec.head_dim, spec.rope.dim, spec.window or 0, ffn.spec.hidden, *keys.stride()[:2],
            self.pages.group_of[index], layer.norm1.eps, mixer.q_norm.eps if spec.qk_norm else 0.0)


def matrix_of(layer: nn.Module) -> Matrix:
    if isinstance(layer, Linear):
        return plain(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
    assert isinstance(layer, (Int8Linear, Int4Linear))
    return layer.packed.with_bias(layer.bias)  # type: ignore[no-any-return]


def choose_native_step(model: Decoder, pages: Pages) -> Choice:
    """A NativeStep, or None, and why."""
    why = native_unsuited(model, pages.codes)
    return Choice(None, why) if why else Choice(NativeStep(model, pages), choose_native().reason)
