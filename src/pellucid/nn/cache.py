"""The contiguous key/value cache: one tensor pair a layer, all sequences aligned at their right end.

Sequences of different lengths are padded on the LEFT, so that in every step all of them write the same column: one
slice copy a layer, no scatter. Legend: B sequences, K key/value heads, C capacity in tokens, d head dim.
The model only ever calls `extend`, `length` and `key_mask`: a paged cache can stand in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.nn.specs import DecoderSpec


class KVCache:
    """Keys and values of `batch` sequences. `first` (B,): the column of each sequence's first real token."""

    def __init__(
        self, spec: DecoderSpec, batch: int, capacity: int, *, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", first: Tensor | None = None,
    ):
        self.capacity = capacity
        self.length = 0  # columns written in every layer
        self.first = first
        shapes = [(batch, layer.mixer.kv_heads, capacity, layer.mixer.head_dim) for layer in spec.layers]
        self.keys = [torch.empty(s, dtype=dtype, device=device) for s in shapes]
        self.values = [torch.empty(s, dtype=dtype, device=device) for s in shapes]

    @property
    def batch(self) -> int:
        return self.keys[0].shape[0]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, K, T, d) behind what is there; returns all (B, K, length + T, d) as views.

        The length moves only when the whole model has run (`advance`), because every layer writes the same columns.
        """
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"cache of {self.capacity} tokens cannot hold {end}")
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def key_mask(self, upcoming: int) -> Tensor | None:
        """(B, 1, 1, length + upcoming) True where a key is real; None when there is no padding."""
        if self.first is None:
            return None
        columns = torch.arange(self.length + upcoming, device=self.first.device)
        return (columns >= self.first[:, None])[:, None, None, :]

    def positions(self, upcoming: int) -> Tensor:
        """(B or 1, upcoming) positions of the next tokens, counted from each sequence's first real token."""
        columns = torch.arange(self.length, self.length + upcoming, device=self.keys[0].device)[None]
        return columns if self.first is None else (columns - self.first[:, None]).clamp_min(0)

    def keep(self, rows: Tensor) -> None:
        """Only these sequences go on (in this order; a row may be repeated: a prompt shared by its samples)."""
        end, capacity = self.length, self.capacity
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                new = old.new_empty((len(rows), old.shape[1], capacity, old.shape[3]))
                torch.index_select(old[:, :, :end], 0, rows, out=new[:, :, :end]) if len(rows) else None
                tensors[i] = new
        if self.first is not None:
            self.first = self.first[rows]
