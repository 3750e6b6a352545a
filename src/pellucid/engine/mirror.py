"""What other processes know of requests: a number for each, and its tables of blocks. They are told what is new since the last time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from pellucid.engine.request import GONE, Request

Changes = list[list[Any]]
"""For each group of layers [how many of the blocks that are known stand, those behind them]."""


class Mirror:
    """The side that tells."""

    def __init__(self) -> None:
        self.numbers: dict[Request, int] = {}
        self.known: dict[Request, list[list[int]]] = {}  # tables
        self.left: list[int] = []  # since the last message
        self._count = itertools.count()

    def number(self, r: Request) -> tuple[int, bool]:
        """The request's number, and whether it is new to the others."""
        new = r not in self.numbers
        if new:
            self.numbers[r] = next(self._count)
        return self.numbers[r], new

    def changes(self, r: Request) -> Changes:
        """Mostly nothing, or one block more; a prefix cache may also put equal blocks in the place of a request's own. What a window has
        left behind is read no more: whether it is still there makes no difference to the others."""
        known = self.known.setdefault(r, [[] for _ in r.tables])
        changes = []
        for old, table in zip(known, r.tables, strict=True):
            same = min(len(old), len(table))
            if old[:same] != table[:same]:
                same = next((i for i in range(same) if old[i] != table[i] and table[i] != GONE), same)
            changes.append([same, table[same:]])
            if same != len(old) or old != table:
                old[:] = table
        return changes

    def forget(self, r: Request) -> None:
        if r in self.numbers:
            self.left.append(self.numbers.pop(r))
            self.known.pop(r, None)

    def take_left(self) -> list[int]:
        left, self.left = self.left, []
        return left


class Mirrored:
    """The side that is told: requests by their numbers."""

    def __init__(self) -> None:
        self.requests: dict[int, Request] = {}

    def __getitem__(self, number: int) -> Request:
        return self.requests[number]

    def change(self, number: int, changes: Changes) -> Request:
        r = self.requests[number]
        r.tables += [[] for _ in changes[len(r.tables) :]]
        for table, (same, more) in zip(r.tables, changes, strict=True):
            table[same:], r.moved = more, min(r.moved, same)
        return r

    def leave(self, numbers: Iterable[int]) -> list[Request]:
        return [self.requests.pop(number) for number in numbers]
