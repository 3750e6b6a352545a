"""What all layers of one forward pass share: rotations, the mask, the cache. Made once, read by every block."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from pellucid.nn.cache import KVCache
from pellucid.nn.specs import Rope
from pellucid.ops import bias_of, rope_angles, rope_frequencies


@dataclass
class Routing:
    """What the routers of one forward pass decided, layer by layer, for balance losses and for what is shown.

    logits: (N, E) each, before scores are made; chosen: (N, k) expert ids each; real (N,): False for padding, None if all are.
    """

    logits: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    real: Tensor | None = None


@dataclass
class Context:
    """mask: (B or 1, 1, T or 1, S) bool, True = visible; None when nothing is hidden but the future. causal: False when
    the mask holds causality already (attention applies it in any case: it changes nothing then, and lets whole tiles
    be skipped). real: (B, T) bool, False for new tokens that are padding; None when all are real. documents: (B, T) ids of
    packed documents. memory: (B, S, D), an encoder's output for cross-attention, and which of it is real (B, S)."""

    positions: Tensor  # (B or 1, T)
    dtype: torch.dtype
    mask: Tensor | None = None
    cache: KVCache | None = None
    causal: bool = True
    real: Tensor | None = None
    documents: Tensor | None = None
    memory: Tensor | None = None
    memory_real: Tensor | None = None
    routing: Routing | None = None
    _angles: dict[Rope, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _bias: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def rotation(self, rope: Rope) -> tuple[Tensor | None, Tensor | None]:
        """cos, sin (B or 1, T, r) of this pass's positions; None where nothing is turned."""
        if rope.dim == 0:
            return None, None
        if rope not in self._angles:
            # the longest sequence of the batch decides, and only where it matters (on a GPU, asking is a wait)
            length = int(self.positions.max()) + 1 if rope.by_length else 0
            frequencies = _frequencies(rope, self.positions.device, length)
            self._angles[rope] = rope_angles(self.positions, frequencies, self.dtype, rope.attention_factor)
        return self._angles[rope]

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The mask as 0 and -inf, to be added to scores: made once, not in every layer."""
        if self.mask is None:
            return None
        if dtype not in self._bias:
            self._bias[dtype] = bias_of(self.mask, dtype)
        return self._bias[dtype]


@lru_cache(maxsize=16)
def _frequencies(rope: Rope, device: torch.device, length: int) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used for training later
        return rope_frequencies(rope.dim, rope.theta, rope.scaling_dict, length).to(device)


def document_mask(documents: Tensor) -> Tensor:
    """documents (B, T) -> (B, 1, T, T): tokens see only their own document. Padding (-1) sees padding only."""
    return (documents[:, None, :, None] == documents[:, None, None, :])


def padding_positions(mask: Tensor) -> Tensor:
    """mask (B, T), 1 = real -> positions counted over real tokens only, 0 on left padding."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)
