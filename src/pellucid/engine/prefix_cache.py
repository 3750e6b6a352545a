"""Blocks of the cache, and which of them hold a prefix that somebody may ask for again.

One interface, three implementations: `NoReuse` here, the chain of block hashes (hash_chain.py), the radix tree
(radix_tree.py). A block holds `size` tokens of every layer. Its references are counted: every request that reads it holds
one. A block that no request refers to can be given away; until then what it holds may be found again.

    always:  available + referred to by requests == all,  and nobody writes into a block that two may read

Where layers come in groups (engine/layer_groups.py), a block holds tokens of one group; a prefix can be used if there are the
blocks of each group that its layers will read: all, or those of the last `window` tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from pellucid.engine.request import GONE, Request


def first_needed(window: int | None, computed: int) -> int:
    """The first token that layers with this window still read when `computed` are there, for the next ones."""
    return 0 if window is None else max(0, computed - window + 1)


def held(tables: Iterable[list[int]]) -> list[int]:
    """The blocks of a request's tables, by depth."""
    return [block for row in zip(*tables, strict=True) for block in row if block != GONE]


class PrefixCache(Protocol):
    """What the scheduler asks of a pool of blocks. Blocks are numbers from 0."""

    size: int
    """Tokens of a block."""
    blocks: int
    """How many there are."""
    windows: tuple[int | None, ...]
    """Of the groups of layers: how far back each reads."""
    stride: int
    """Blocks that fall behind a window before a request gives them back."""

    def match(self, request: Request, most: int | None = None) -> list[tuple[int, ...]]:
        """Blocks, one a group, that hold the longest known prefix of the request's first `most` tokens; GONE where a group does not need
        one. No reference is taken, nothing is touched."""

    def claim(self, blocks: Iterable[int]) -> None:
        """A reference on each: they cannot be given away now."""

    def available(self) -> int:
        """How many blocks `allocate` can give."""

    def allocate(self, count: int) -> list[int]:
        """New blocks, one reference on each; what they held is forgotten. MemoryError if there are not so many."""

    def publish(self, request: Request) -> None:
        """The request's full, computed blocks may be found by others from now on. May replace blocks of the request by equal
        ones that were there before, and notes it in `moved`."""

    def withdraw(self, request: Request) -> None:
        """What the request's blocks hold is found by nobody any more."""

    def release(self, blocks: list[int]) -> None:
        """One reference of each, of a whole request, comes back; the deepest is given away first."""

    def check(self) -> None:
        """AssertionError if the books do not balance."""


class NoReuse:
    """Blocks and nothing else: for models whose state is not in blocks (linear attention), and as the twin to compare with."""

    def __init__(self, blocks: int, size: int, windows: tuple[int | None, ...] = (None,), stride: int = 1):
        self.blocks, self.size, self.windows, self.stride = blocks, size, windows, stride
        self.free = list(range(blocks - 1, -1, -1))
        self.references = [0] * blocks

    def match(self, request: Request, most: int | None = None) -> list[tuple[int, ...]]:
        return []

    def claim(self, blocks: Iterable[int]) -> None:
        for b in blocks:
            self.references[b] += 1

    def available(self) -> int:
        return len(self.free)

    def allocate(self, count: int) -> list[int]:
        if count > len(self.free):
            raise MemoryError(f"{count} blocks wanted, {len(self.free)} free")
        taken = [self.free.pop() for _ in range(count)]
        self.claim(taken)
        return taken

    def publish(self, request: Request) -> None:
        pass

    def withdraw(self, request: Request) -> None:
        pass

    def release(self, blocks: list[int]) -> None:
        for b in reversed(blocks):
            self.references[b] -= 1
            if self.references[b] == 0:
                self.free.append(b)

    def check(self) -> None:
        assert len(set(self.free)) == len(self.free)
        assert all((self.references[b] == 0) == (b in set(self.free)) for b in range(self.blocks))
