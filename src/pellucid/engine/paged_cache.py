"""The paged cache (PagedAttention, arXiv 2309.06180): entries of all sequences in one set of blocks, and a view of some.

`Pages` holds the memory: for each layer the tensors that its mixer keeps for a token (`nn.count.cache_shapes`), block after
block; and for mixers of constant state (linear attention) one place a request. `Rows` shows some requests to the model as
if theirs were an ordinary cache (the interface of `nn.cache.KVCache`): new entries go into the requests' blocks, and what
they hold is gathered, aligned at the right end. Gathering copies; it is the readable twin of kernels that read in place.

Layers come in groups (engine/layer_groups.py): a block holds tokens of one group, whose i-th layer keeps them in the i-th of the
tensors that all groups share.

Legend: N slots = blocks x block size, K heads of an entry, d its width, B requests, T new tokens of each, S of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.engine.layer_groups import Group, one_group
from pellucid.engine.prefix_cache import first_needed
from pellucid.engine.request import Request
from pellucid.engine.slot_table import SlotTable
from pellucid.nn.count import cache_shapes
from pellucid.nn.specs import DecoderSpec
from pellucid.ops.cache_codes import CacheCodes


class Entries:
    """One tensor of those that a mixer keeps of each token.  codes (N, K, d) in `format`, scales (N, K) where that has them."""

    def __init__(self, form: CacheCodes, slots: int, heads: int, width: int, device: torch.device):
        self.format = form
        self.codes = torch.zeros(slots, heads, width, dtype=form.kept, device=device)
        self.scales = None if form.top is None else torch.zeros(slots, heads, dtype=torch.bfloat16, device=device)

    @property
    def scales_or_none(self) -> Tensor:
        """(N, K), or (0, 0)."""
        return self.codes.new_empty(0, 0, dtype=torch.bfloat16) if self.scales is None else self.scales

    @property
    def tensors(self) -> list[Tensor]:
        return [self.codes] if self.scales is None else [self.codes, self.scales]

    def write(self, where: Tensor, new: Tensor) -> None:
        """new (n, K, d) to the slots where (n,)"""
        self.codes[where], scales = self.format.encode(new)
        if self.scales is not None and scales is not None:
            self.scales[where] = scales

    def read(self, where: Tensor, dtype: torch.dtype) -> Tensor:
        """(*where.shape, K, d)"""
        return self.format.decode(self.codes[where], None if self.scales is None else self.scales[where], dtype)


class Pages:
    """entries[layer]: what its mixer keeps of tokens, in the format of `codes`; a layer of each group has the same ones.
    states[layer]: name -> (places, ...), made when a mixer first writes one, in its own dtype (ops/cache_codes.py says why not in codes)."""

    def __init__(
        self, spec: DecoderSpec, blocks: int, size: int, places: int, codes: CacheCodes, device: torch.device | str = "cpu",
        groups: Sequence[Group] | None = None,
    ):
        self.size, self.places, self.device, self.codes = size, places, torch.device(device), codes
        self.groups = groups or one_group(spec)
        self.group_of = {layer: i for i, group in enumerate(self.groups) for layer in group.layers}
        longest = max((group.layers for group in self.groups), key=len)
        self.stores = [[Entries(codes, blocks * size, heads, width, self.device) for heads, width in cache_shapes(spec.layers[layer].mixer)]
                       for layer in longest]
        at = {layer: i for group in self.groups for i, layer in enumerate(group.layers)}
        self.entries = [self.stores[at[layer]] if layer in at else [] for layer in range(len(spec.layers))]
        self.table = SlotTable(len(self.groups), size, places, self.device)
        self.states: list[dict[str, Tensor]] = [{} for _ in spec.layers]

    @property
    def bytes_per_block(self) -> int:
        return sum(t[0].nbytes * self.size for store in self.stores for kept in store for t in kept.tensors)

    def slots(self, blocks: Sequence[int], start: int, stop: int) -> Tensor:
        """(stop - start,) where the tokens start..stop of a request lie."""
        places = torch.arange(start, stop, device=self.device)
        return torch.tensor(blocks, device=self.device)[places // self.size] * self.size + places % self.size

    def needed(self, tables: Sequence[Sequence[int]], tokens: int) -> list[Tensor]:
        """For each group the slots of those of a request's first `tokens` that its layers still read, in whole blocks."""
        starts = (first_needed(group.window, tokens) // self.size * self.size for group in self.groups)
        return [self.slots(table, start, tokens) for table, start in zip(tables, starts, strict=True)]

    def copy_out(self, tables: Sequence[Sequence[int]], tokens: int, place: int | None) -> Saved:
        """What a request's first `tokens` left, in memory of its own on the host: for swapping."""
        where = self.needed(tables, tokens)
        entries = [[t[where[self.group_of[i]]].to("cpu", copy=True) for kept in layer for t in kept.tensors]
                   for i, layer in enumerate(self.entries)]
        states = [{} if place is None else {name: t[place].to("cpu", copy=True) for name, t in layer.items()} for layer in self.states]
        return Saved(tokens, entries, states)

    def copy_in(self, tables: Sequence[Sequence[int]], place: int, saved: Saved) -> None:
        where = self.needed(tables, saved.tokens)
        for i, (layer, old) in enumerate(zip(self.entries, saved.entries, strict=True)):
            for t, part in zip((t for kept in layer for t in kept.tensors), old, strict=True):
                t[where[self.group_of[i]]] = part.to(self.device)
        for held, state in zip(self.states, saved.states, strict=True):
            for name, part in state.items():
                held[name][place] = part.to(self.device)


@dataclass
class Saved:
    """A request's cache outside of the blocks, as it was kept: codes and scales."""

    tokens: int
    entries: list[list[Tensor]]
    states: list[dict[str, Tensor]]


class Rows:
    """B requests with `count` new tokens each, as a cache."""

    def __init__(self, pages: Pages, requests: Sequence[Request], count: int):
        self.pages, self.device = pages, pages.device
        lengths = [r.computed for r in requests]
        self.longest = max(lengths) + count
        self.length = self.longest - count  # columns before the new tokens
        self.batch = len(requests)
        self.began = torch.tensor([len(r.prompt) for r in requests], device=self.device)
        ends = torch.tensor(lengths, device=self.device) + count
        self.first = self.longest - ends if min(lengths) != max(lengths) else None
        self.places = torch.tensor(pages.table.follow(requests, lengths, [n + count for n in lengths]), device=self.device)
        self.read = [self._read(i, group.window, ends, count) for i, group in enumerate(pages.groups)]
        self.fresh = [length == 0 for length in lengths]
        self.states = [self._states(layer) for layer in range(len(pages.states))]

    def _read(self, group: int, window: int | None, ends: Tensor, count: int) -> Tensor:
        """(B, S) slots of the last tokens of each request, as many as a layer of the group reads; anything where there are none."""
        S = self.longest if window is None else min(self.longest, window - 1 + count)
        places = (ends[:, None] - S + torch.arange(S, device=self.device)).clamp_min(0)
        return self.pages.table.read(group, self.places[:, None], places)

    def _states(self, layer: int) -> dict[str, Tensor]:
        """The rows' constant states, zeros where a request begins; empty before anything was written."""
        fresh = torch.tensor(self.fresh, device=self.device)
        found = {}
        for name, t in self.pages.states[layer].items() if not all(self.fresh) else ():
            rows = t[self.places]
            found[name] = rows.masked_fill(fresh.view(-1, *[1] * (rows.dim() - 1)), 0)
        return found

    def extend(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """new (B, K, T, d) written behind what is there -> all of it (B, K, S, d), right-aligned; see `key_mask`. In the dtype of the
        new ones; also they come back as they are kept, so that it makes no difference how a prompt is cut. Of a layer with a window
        only the columns that any new token reads."""
        gathered, read = [], self.read[self.pages.group_of[layer]]
        write = read[:, read.shape[1] - new[0].shape[2] :].flatten()
        for kept, fresh in zip(self.pages.entries[layer], new, strict=True):
            kept.write(write, fresh.transpose(1, 2).flatten(0, 1))
            gathered.append(kept.read(read, fresh.dtype).transpose(1, 2))
        return tuple(gathered)

    def advance(self, tokens: int) -> None:
        """After the last layer: constant states go back to their places."""
        for layer, state in enumerate(self.states):
            for name, rows in state.items():
                held = self.pages.states[layer]
                if name not in held:
                    held[name] = rows.new_zeros(self.pages.places, *rows.shape[1:])
                held[name][self.places] = rows

    def key_mask(self, upcoming: int) -> Tensor | None:
        """(B, 1, 1, S) True where a key is real; None when all are."""
        if self.first is None:
            return None
        return (torch.arange(self.longest, device=self.device)[None] >= self.first[:, None])[:, None, None, :]

    def real(self, upcoming: int) -> Tensor | None:
        """New tokens are never padding here."""
        return None

    def positions(self, upcoming: int) -> Tensor:
        """(B or 1, T)"""
        columns = torch.arange(self.length, self.longest, device=self.device)[None]
        return columns if self.first is None else columns - self.first[:, None]
