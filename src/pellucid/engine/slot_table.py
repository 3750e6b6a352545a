"""Where every token of every running request lies, kept from step to step: a step writes what is new and reads the rest in place.

A request has a row as long as it runs (its constant states have the same place). Its slots are a number for each token,
block x size + place in the block: kernels need one look-up, and no division, for each token that they read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pellucid.engine.request import UNMOVED, Request
from pellucid.engine.transfer import to_device


class SlotTable:
    """slots[group]: (rows, width) int64; at places that are not computed, or were given back, anything."""

    def __init__(self, groups: int, size: int, rows: int, device: torch.device):
        self.size, self.device = size, device
        self.row_of: dict[Request, int] = {}
        self.free = list(range(rows - 1, -1, -1))
        self.slots = [torch.zeros(rows, -(-1024 // size) * size, dtype=torch.int64, device=device) for _ in range(groups)]

    def row(self, request: Request) -> int:
        if request not in self.row_of:
            if not self.free:
                self._grow(2 * len(self.slots[0]), self.slots[0].shape[1])
            self.row_of[request] = self.free.pop()
        return self.row_of[request]

    def forget(self, request: Request) -> None:
        if request in self.row_of:
            self.free.append(self.row_of.pop(request))

    def follow(self, requests: Sequence[Request], starts: Sequence[int], stops: Sequence[int]) -> list[int]:
        """Notes the tokens start..stop of each request, which this step computes; of a request without a row, and of blocks that were
        replaced, all before. Returns the rows. Only blocks that begin here are new: the others stand."""
        rows, new_rows, new_places = [], list[int](), list[int]()
        blocks: list[list[int]] = [[] for _ in self.slots]
        for r, start, stop in zip(requests, starts, stops, strict=True):
            first = min(-(-start // self.size), r.moved) if r in self.row_of else 0
            row, last, r.moved = self.row(r), -(-stop // self.size), UNMOVED
            rows.append(row)
            if first < last:
                new_rows += [row] * (last - first)
                new_places += range(first, last)
                for mine, table in zip(blocks, r.tables, strict=True):
                    mine += table[first:last]
        if new_rows:
            self._write(new_rows, new_places, blocks)
        return rows

    def _write(self, rows: list[int], places: list[int], blocks: list[list[int]]) -> None:
        width = (max(places) + 1) * self.size
        if width > self.slots[0].shape[1]:
            self._grow(len(self.slots[0]), max(width, 2 * self.slots[0].shape[1]))
        at = to_device(torch.tensor([rows, places, *blocks]), self.device)
        inside = torch.arange(self.size, device=self.device)
        for slots, numbers in zip(self.slots, at[2:], strict=True):
            slots.view(len(slots), -1, self.size)[at[0], at[1]] = numbers.clamp_min(0)[:, None] * self.size + inside

    def _grow(self, rows: int, width: int) -> None:
        self.free += range(rows - 1, len(self.slots[0]) - 1, -1)
        for i, old in enumerate(self.slots):
            self.slots[i] = old.new_zeros(rows, width)
            self.slots[i][: old.shape[0], : old.shape[1]] = old

    def read(self, group: int, rows: Tensor, places: Tensor) -> Tensor:
        """rows, places: int64 of shapes that broadcast -> slots"""
        return self.slots[group][rows, places]
