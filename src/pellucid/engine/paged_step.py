"""A whole step of the engine by compiled kernels on a CPU: all tokens of all requests as rows of one batch.

Between the products everything is the decoding step's (engine/decode.py); attention reads the pages where they lie
(ops/jit/paged.py). The readable twin is the flat pass of engine/runner.py, which gathers. Prompts use the same kernels: a
chunk of a few hundred tokens spends its time in products; long prompts are better off with the twin, whose attention is
products too (`suits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.engine.decode import CompiledStep
from pellucid.engine.paged_cache import Pages
from pellucid.engine.scheduler import Part
from pellucid.nn import Attn, Decoder

READABLE = (torch.float32, torch.bfloat16, torch.uint8, torch.int8)
"""What a cache may hold for the kernels to read it (uint8: e4m3)."""
MOST_PAIRS = 2**17
"""Pairs of a token and one before it, in a step: more of them are faster as products (about 2 ns a pair and head entry of 32)."""


class PagedBatch:
    """The step's tokens, and where their entries lie. Speaks as a cache to `CompiledStep`.

    slots, into: of the first group of layers; every_slots, every_into: of all groups.  request: rows of `slots`.
    """

    first = None

    def __init__(self, pages: Pages, parts: Sequence[Part], capacity: int):
        self.pages, self.capacity = pages, capacity
        ends = [p.start + p.count for p in parts]
        rows = pages.table.follow([p.request for p in parts], [p.start for p in parts], ends)
        counts = [p.count for p in parts]  # numpy: a third of PyTorch's time for such short arrays
        if max(counts) == 1:
            request, positions = np.array(rows), np.array(ends) - 1
        else:
            request, positions = np.repeat(rows, counts), np.concatenate([np.arange(p.start, e) for p, e in zip(parts, ends, strict=True)])
        self.request, self.positions = torch.from_numpy(request), torch.from_numpy(positions)
        self.every_slots = pages.table.slots
        self.every_into = [torch.from_numpy(slots.numpy()[request, positions]) for slots in self.every_slots]
        self.slots, self.into = self.every_slots[0], self.every_into[0]

    def reserve(self, tokens: int) -> None:
        """The scheduler has given the blocks."""

    def advance(self, tokens: int) -> None:
        """Counters are the requests' own."""


class PagedStep(CompiledStep):
    """`hidden(tokens (N,), batch)` -> (N, D); `logits` of the rows that are asked for."""

    def __init__(self, model: Decoder):
        super().__init__(model)
        from pellucid.ops.jit import paged

        self.paged = paged

    @staticmethod
    def suits(parts: Sequence[Part]) -> bool:
        return sum(p.count * (p.start + (p.count + 1) // 2) for p in parts) <= MOST_PAIRS

    def _attend(self, mixer: Any, spec: Attn, h: Tensor, index: int, first: Any, cache: PagedBatch) -> None:
        array = self.array
        qkv = array(self._product(mixer.qkv, h))
        self.attended = self._buffer("attended", spec.heads * spec.head_dim)
        q_weight, k_weight = map(array, (mixer.q_norm.weight, mixer.k_norm.weight)) if spec.qk_norm else (self.nothing, self.nothing)
        eps, positions = mixer.q_norm.eps if spec.qk_norm else 0.0, array(cache.positions)
        group = cache.pages.group_of[index]
        keys, values = cache.pages.entries[index]
        kept = array(keys.codes), array(values.codes), array(keys.scales_or_none), array(values.scales_or_none)
        write, attend = self.paged.attend_kernels(spec.head_dim, spec.heads // spec.kv_heads)
        write(qkv, k_weight, eps, *self.tables[spec.rope], positions, array(cache.every_into[group]), *kept, keys.format.top or 0.0)
        attend(qkv, q_weight, eps, *self.tables[spec.rope], positions, array(cache.request), array(cache.every_slots[group]), spec.window or 0,
               spec.head_dim**-0.5, *kept, array(self.attended))
