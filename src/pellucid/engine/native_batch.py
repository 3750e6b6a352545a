"""The C++ step for the static batch: its cache is read as pages of which every sequence has one run.

A layer's cache (B, K, R, d) holds the entry of sequence b, head h and column r at number ((b K + h) R + r) d: with slots b K R + r of d
numbers, a head lies R slots behind the one before. The readable twin is the model itself (`plain_step` in engine/decode.py); where
there is no C++ compiler, the step by numba runs (`CompiledStep` there).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.engine import decode
from pellucid.engine.native_step import NativeStep, native_unsuited
from pellucid.nn import Decoder, KVCache
from pellucid.ops.cache_codes import CacheCodes
from pellucid.ops.native.library import Layer, choose_native
from pellucid.runtime import Choice


def choose_step(model: Decoder) -> Choice:
    """A function (tokens (B,), cache) -> logits (B, V): by the C++ kernels where they serve this model, else what `decode` chooses."""
    why = native_unsuited(model, CacheCodes("the model's own dtype", model.embed.weight.dtype))
    return decode.choose_step(model) if why else Choice(BatchStep(model), choose_native().reason)


@dataclass
class Entry:
    codes: Tensor


class Runs:
    """A `KVCache` in place of `Pages`. group_of: of each layer, which of the tables of slots is its own."""

    def __init__(self, model: Decoder):
        heads = [layer.mixer.kv_heads for layer in model.spec.layers]
        self.kv_heads = sorted(set(heads))
        self.group_of = [self.kv_heads.index(K) for K in heads]
        self.cache: KVCache | None = None  # during a step

    @property
    def entries(self) -> list[tuple[Entry, ...]]:
        assert self.cache is not None
        return [tuple(map(Entry, entries)) for entries in self.cache.entries]


@dataclass
class Columns:
    """A step's tokens, one of each sequence, and where their entries lie: what `PagedBatch` is for pages."""

    first: Tensor  # (B,)
    column: list[Tensor]  # of each group, the slot of each sequence's column 0, (B,)
    every_slots: list[Tensor]  # (B, R), of each sequence from its first token on
    every_into: list[Tensor]  # (B,)
    positions: Tensor  # (B,)
    request: Tensor  # (B,)

    @classmethod
    def of(cls, cache: KVCache, kv_heads: list[int]) -> Columns:
        rows, R = torch.arange(cache.batch), cache.room
        first = torch.zeros_like(rows) if cache.first is None else cache.first
        columns = (torch.arange(R) + first[:, None]).clamp_max(R - 1)  # what lies behind the last is never read
        starts = [rows * K * R for K in kv_heads]
        return cls(first, starts, [s[:, None] + columns for s in starts], [s.clone() for s in starts], first.clone(), rows)

    @property
    def slots(self) -> Tensor:
        return self.every_slots[0]

    def move_to(self, length: int) -> None:
        """The new tokens stand in this column."""
        torch.neg(self.first, out=self.positions).add_(length)
        for into, start in zip(self.every_into, self.column, strict=True):
            torch.add(start, length, out=into)


class BatchStep(NativeStep):
    """Call it with tokens (B,) and the cache: it extends the cache by one column and returns logits (B, V) float32."""

    def __init__(self, model: Decoder):
        self.runs = Runs(model)
        super().__init__(model, self.runs)  # type: ignore[arg-type]
        self.places: tuple[Any, ...] = ()  # where the cache lay
        self.first: Tensor | None = None  # its `first`, kept so that another one is told from it

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        cache.reserve(1)
        self.runs.cache = cache
        places = (cache.batch, cache.room, *(t.data_ptr() for entries in cache.entries for t in entries))
        if places != self.places or cache.first is not self.first:
            self.places, self.first, self.columns = places, cache.first, Columns.of(cache, self.runs.kv_heads)
            self.addresses = []  # the structures are filled anew
        self.columns.move_to(cache.length)
        logits = self.logits(self.hidden(tokens, self.columns))  # type: ignore[arg-type]
        cache.advance(1)
        self.runs.cache = None
        return logits

    def _point(self) -> None:
        super()._point()
        assert self.runs.cache is not None
        self.step.places = self.runs.cache.batch * self.runs.cache.room * max(self.runs.kv_heads)

    def _layer(self, layer: Any, index: int) -> Layer:
        made = super()._layer(layer, index)
        d = layer.mixer.spec.head_dim
        made.slot_stride, made.head_stride = d, self.places[1] * d
        return made
