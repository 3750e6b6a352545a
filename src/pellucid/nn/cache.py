"""The contiguous key/value cache: one tensor pair a layer, all sequences aligned at their right end.

Sequences of different lengths are padded on the LEFT, so that in every step all of them write the same column: one
slice copy a layer, no scatter. Legend: B sequences, K key/value heads, R columns that there is room for, d head dim.
The model only ever calls `extend`, `advance`, `key_mask` and `positions`: a paged cache can stand in its place.

Room grows with the sequences, and a decoding step reads all of it, columns that are still empty included (the mask
hides them): products over whole contiguous tensors are about twice as fast on a CPU as over slices of longer ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.nn.specs import DecoderSpec


class KVCache:
    """Keys and values of `batch` sequences of at most `capacity` tokens, padding included.

    first (B,): the column of each sequence's first real token, None without padding.
    """

    def __init__(
        self, spec: DecoderSpec, batch: int, capacity: int, *, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", first: Tensor | None = None,
    ):
        self.capacity = capacity
        self.length = 0  # columns written in every layer
        self.first = first
        shapes = [(batch, layer.mixer.kv_heads, 0, layer.mixer.head_dim) for layer in spec.layers]
        self.keys = [torch.empty(s, dtype=dtype, device=device) for s in shapes]
        self.values = [torch.empty(s, dtype=dtype, device=device) for s in shapes]

    @property
    def batch(self) -> int:
        return self.keys[0].shape[0]

    @property
    def room(self) -> int:
        return self.keys[0].shape[2]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, K, T, d) behind what is there; returns (B, K, S, d) with S = `width(T)`.

        The length moves only when the whole model has run (`advance`), because every layer writes the same columns.
        """
        T = k.shape[2]
        self._make_room(self.length + T)
        keys, values, S = self.keys[layer], self.values[layer], self.width(T)
        keys[:, :, self.length : self.length + T] = k
        values[:, :, self.length : self.length + T] = v
        return keys[:, :, :S], values[:, :, :S]

    def reserve(self, tokens: int) -> None:
        """Room for so many more columns, for those who write them themselves."""
        self._make_room(self.length + tokens)

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def width(self, upcoming: int) -> int:
        """Columns that `extend` returns: up to the last token, or all there are for a single token."""
        return self.room if upcoming == 1 else self.length + upcoming

    def key_mask(self, upcoming: int) -> Tensor | None:
        """(B or 1, 1, 1, width) True where a key is real; None when all are."""
        end = self.length + upcoming
        self._make_room(end)
        width = self.width(upcoming)
        if self.first is None and width == end:
            return None
        columns = torch.arange(width, device=self.keys[0].device)[None]
        real = columns < end if self.first is None else (columns < end) & (columns >= self.first[:, None])
        return real[:, None, None, :]

    def positions(self, upcoming: int) -> Tensor:
        """(B or 1, upcoming) positions of the next tokens, counted from each sequence's first real token."""
        columns = torch.arange(self.length, self.length + upcoming, device=self.keys[0].device)[None]
        return columns if self.first is None else (columns - self.first[:, None]).clamp_min(0)

    def keep(self, rows: Tensor) -> None:
        """Only these sequences go on (in this order; a row may be repeated: a prompt shared by its samples)."""
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                tensors[i] = old.index_select(0, rows)
        if self.first is not None:
            self.first = self.first[rows]

    def _make_room(self, end: int) -> None:
        """At least `end` columns: an eighth more, so that growing costs little, in steps of 16."""
        if end > self.capacity:
            raise ValueError(f"cache of {self.capacity} tokens cannot hold {end}")
        if end <= self.room:
            return
        room = min(self.capacity, -(-(end + end // 8) // 16) * 16)
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                new = old.new_zeros((*old.shape[:2], room, old.shape[3]))  # zeros: hidden, but read
                new[:, :, : self.length] = old[:, :, : self.length]
                tensors[i] = new
