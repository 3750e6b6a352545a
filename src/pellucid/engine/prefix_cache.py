"""Blocks of the cache, and which of them hold a prefix that somebody may ask for again.

One interface, three implementations: `NoReuse` here, the chain of block hashes (hash_chain.py), the radix tree
(radix_tree.py). A block holds `size` tokens of every layer. Its references are counted: every request that reads it holds
one. A block that no request refers to can be given away; until then what it holds may be found again.

    always:  available + referred to by requests == all,  and nobody writes into a block that two may read
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from pellucid.engine.request import Request


class PrefixCache(Protocol):
    """What the scheduler asks of a pool of blocks. Blocks are numbers from 0."""

    size: int
    """Tokens of a block."""
    blocks: int
    """How many there are."""

    def match(self, request: Request) -> list[int]:
        """Blocks that hold the longest known prefix of the request's tokens. No reference is taken, nothing is touched."""

    def claim(self, blocks: Iterable[int]) -> None:
        """A reference on each: they cannot be given away now."""

    def available(self) -> int:
        """How many blocks `allocate` can give."""

    def allocate(self, count: int) -> list[int]:
        """New blocks, one reference on each; what they held is forgotten. MemoryError if there are not so many."""

    def publish(self, request: Request) -> None:
        """The request's full, computed blocks may be found by others from now on. May replace blocks of the request by equal
        ones that were there before."""

    def release(self, blocks: list[int]) -> None:
        """One reference of each, of a whole request, comes back; the deepest is given away first."""

    def check(self) -> None:
        """AssertionError if the books do not balance."""


class NoReuse:
    """Blocks and nothing else: for models whose state is not in blocks (linear attention), and as the twin to compare with."""

    def __init__(self, blocks: int, size: int):
        self.blocks, self.size = blocks, size
        self.free = list(range(blocks - 1, -1, -1))
        self.references = [0] * blocks

    def match(self, request: Request) -> list[int]:
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

    def release(self, blocks: list[int]) -> None:
        for b in reversed(blocks):
            self.references[b] -= 1
            if self.references[b] == 0:
                self.free.append(b)

    def check(self) -> None:
        assert len(set(self.free)) == len(self.free)
        assert all((self.references[b] == 0) == (b in set(self.free)) for b in range(self.blocks))
