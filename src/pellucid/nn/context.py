"""What all layers of one forward pass share: rotations, the mask, the cache. Made once, read by every block."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pellucid.nn.cache import KVCache
from pellucid.nn.specs import Rope
from pellucid.ops import rope_angles, rope_frequencies


@dataclass
class Context:
    """mask: (B or 1, 1, T or 1, S) bool, True = visible; None when nothing is hidden. causal: whether causality is to
    be applied on top (False when the mask already holds it)."""

    positions: Tensor  # (B or 1, T)
    dtype: torch.dtype
    mask: Tensor | None = None
    cache: KVCache | None = None
    causal: bool = True
    _angles: dict[Rope, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def rotation(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """cos, sin (B or 1, T, r) of this pass's positions."""
        if rope not in self._angles:
            frequencies = rope_frequencies(rope.dim, rope.theta, rope.scaling_dict).to(self.positions.device)
            self._angles[rope] = rope_angles(self.positions, frequencies, self.dtype)
        return self._angles[rope]


def document_mask(documents: Tensor) -> Tensor:
    """documents (B, T) -> (B, 1, T, T): tokens see only their own document. Padding (-1) sees padding only."""
    return (documents[:, None, :, None] == documents[:, None, None, :])


def padding_positions(mask: Tensor) -> Tensor:
    """mask (B, T), 1 = real -> positions counted over real tokens only, 0 on left padding."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)
