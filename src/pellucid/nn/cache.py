"""The contiguous cache: per layer the tensors that its mixer keeps, all sequences aligned at their right end.

Sequences of different lengths are padded on the LEFT, so that in every step all of them write the same column: one
slice copy a layer, no scatter. Legend: B sequences, K heads of an entry, R columns that there is room for, d its width.
What a mixer keeps is its own affair (`nn.count.cache_shapes`): keys and values for attention, one latent and one rotated
key for latent attention; a mixer of constant state (gated delta net) keeps named tensors in `states` instead.
The model only ever calls `extend`, `advance`, `key_mask`, `real` and `positions`: a paged cache can stand in its place.

Room grows with the sequences, and a decoding step reads all of it, columns that are still empty included (the mask
hides them): products over whole contiguous tensors are about twice as fast on a CPU as over slices of longer ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.nn.count import cache_shapes
from pellucid.nn.specs import DecoderSpec, EncoderDecoderSpec


class KVCache:
    """What `batch` sequences of at most `capacity` tokens leave behind, padding included.

    entries[layer]: tensors (B, K, R, d) that grow with the sequence.   states[layer]: tensors (B, ...) that do not.
    first (B,): the column of each sequence's first real token, None without padding.
    """

    def __init__(
        self, spec: DecoderSpec | EncoderDecoderSpec, batch: int, capacity: int, *, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", first: Tensor | None = None,
    ):
        self.capacity, self.batch, self.room = capacity, batch, 0
        self.length = 0  # columns written in every layer
        self.first = first
        self.began: Tensor | None = None  # (B or 1,) tokens of each sequence's first pass, if a rotation asked for them
        self.device = torch.device(device)
        self.entries = [[torch.empty(batch, heads, 0, width, dtype=dtype, device=device)
                         for heads, width in cache_shapes(layer.mixer)] for layer in spec.layers]
        self.states: list[dict[str, Tensor]] = [{} for _ in spec.layers]

    @property
    def keys(self) -> list[Tensor]:
        """The first entry of each layer: its keys, where it is attention."""
        return [entries[0] for entries in self.entries]

    @property
    def values(self) -> list[Tensor]:
        return [entries[1] for entries in self.entries]

    def extend(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Writes each of new (B, K, T, d) behind what is there; returns the whole (B, K, S, d) with S = `width(T)`.

        The length moves only when the whole model has run (`advance`), because every layer writes the same columns.
        """
        T = new[0].shape[2]
        self._make_room(self.length + T)
        S, entries = self.width(T), self.entries[layer]
        for kept, fresh in zip(entries, new, strict=True):
            kept[:, :, self.length : self.length + T] = fresh
        return tuple(kept[:, :, :S] for kept in entries)

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
        if not any(self.entries):  # every layer's states are of constant size: none has columns to hide
            return None
        self._make_room(end)
        width = self.width(upcoming)
        if self.first is None and width == end:
            return None
        columns = torch.arange(width, device=self.device)[None]
        real = columns < end if self.first is None else (columns < end) & (columns >= self.first[:, None])
        return real[:, None, None, :]

    def real(self, upcoming: int) -> Tensor | None:
        """(B, upcoming) False where a new token is padding; None when all are real."""
        if self.first is None:
            return None
        return torch.arange(self.length, self.length + upcoming, device=self.device)[None] >= self.first[:, None]

    def positions(self, upcoming: int) -> Tensor:
        """(B or 1, upcoming) positions of the next tokens, counted from each sequence's first real token."""
        columns = torch.arange(self.length, self.length + upcoming, device=self.device)[None]
        return columns if self.first is None else (columns - self.first[:, None]).clamp_min(0)

    def keep(self, rows: Tensor, states: bool = True) -> None:
        """Only these sequences go on (in this order; a row may be repeated: a prompt shared by its samples).

        states False: those in the rows' places stay as they are (beams of one source change places)."""
        self.entries = [[old.index_select(0, rows) for old in entries] for entries in self.entries]
        if states:
            self.states = [{name: old.index_select(0, rows) for name, old in state.items()} for state in self.states]
        self.batch = len(rows)
        if self.first is not None:
            self.first = self.first[rows]
        if self.began is not None and len(self.began) > 1:
            self.began = self.began[rows]

    def _make_room(self, end: int) -> None:
        """At least `end` columns: an eighth more, so that growing costs little, in steps of 16."""
        if end > self.capacity:
            raise ValueError(f"cache of {self.capacity} tokens cannot hold {end}")
        if end <= self.room:
            return
        self.room = min(self.capacity, -(-(end + end // 8) // 16) * 16)
        for entries in self.entries:
            for i, old in enumerate(entries):
                new = old.new_zeros((*old.shape[:2], self.room, old.shape[3]))  # zeros: hidden, but read
                new[:, :, : self.length] = old[:, :, : self.length]
                entries[i] = new
