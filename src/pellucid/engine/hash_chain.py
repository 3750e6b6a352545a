"""Prefix cache as a chain of block hashes (vLLM's, arXiv 2309.06180 and its v1 design): the free list IS the LRU.

A full block's key is sha256(key of the block before, its tokens): equal keys mean equal prefixes, so one dictionary finds
a prefix block by block. A block that loses its last reference goes to the tail of the free list and stays findable; a
request gives its blocks back deepest first, so that a chain is eaten from its leaf. Taking a block pops the head and
drops its key. There is no code for eviction.

Groups of layers have each their own dictionary, with the same keys. Behind a window blocks go to the free list early, and stay
findable like all others: a hit is the longest prefix of which every group still has what its layers read.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable

from pellucid.engine.prefix_cache import first_needed, held
from pellucid.engine.request import GONE, Request


class HashChain:
    """A `PrefixCache` whose hits are whole blocks.  salt: secret, so that timing tells nobody what others asked."""

    stride = 1

    def __init__(self, blocks: int, size: int, salt: str = "", windows: tuple[int | None, ...] = (None,)):
        self.blocks, self.size, self.salt, self.windows = blocks, size, salt, windows
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))  # a doubly linked list: O(1) in the middle
        self.references = [0] * blocks
        self.key_of: list[tuple[int, bytes] | None] = [None] * blocks  # group, key
        self.block_of: list[dict[bytes, int]] = [{} for _ in windows]

    def match(self, request: Request, most: int | None = None) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        unbroken, best = [0] * len(self.windows), 0  # blocks of each group that stand in a row up to here
        for key in self._keys(request, len(request.tokens) if most is None else most):
            found.append(tuple(known.get(key, GONE) for known in self.block_of))
            unbroken = [0 if block == GONE else n + 1 for block, n in zip(found[-1], unbroken, strict=True)]
            if any(window is None and not n for window, n in zip(self.windows, unbroken, strict=True)):
                break
            if all(n >= len(found) - self._needed(window, len(found)) for window, n in zip(self.windows, unbroken, strict=True)):
                best = len(found)
        first = [self._needed(window, best) for window in self.windows]
        return [tuple(block if i >= start else GONE for block, start in zip(row, first, strict=True)) for i, row in enumerate(found[:best])]

    def _needed(self, window: int | None, blocks: int) -> int:
        """The first block that layers with this window read behind a prefix of so many."""
        return first_needed(window, blocks * self.size) // self.size

    def claim(self, blocks: Iterable[int]) -> None:
        for b in blocks:
            if self.references[b] == 0:
                del self.free[b]
            self.references[b] += 1

    def available(self) -> int:
        return len(self.free)

    def allocate(self, count: int) -> list[int]:
        if count > len(self.free):
            raise MemoryError(f"{count} blocks wanted, {len(self.free)} free")
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for b in taken:
            self._forget(b)
            self.references[b] = 1
        return taken

    def _forget(self, block: int) -> None:
        """Its key."""
        found, self.key_of[block] = self.key_of[block], None
        if found is not None:
            group, key = found
            del self.block_of[group][key]

    def publish(self, request: Request) -> None:
        keys = self._keys(request, request.computed)
        for i in range(request.published, len(keys)):
            for group, table in enumerate(request.tables):
                b, known = table[i], self.block_of[group]
                if b != GONE and self.key_of[b] is None and keys[i] not in known:  # else two computed the same: the first is found
                    self.key_of[b], known[keys[i]] = (group, keys[i]), b
        request.published = len(keys)

    def withdraw(self, request: Request) -> None:
        for b in held(request.tables):
            self._forget(b)

    def release(self, blocks: list[int]) -> None:
        for b in reversed(blocks):
            self.references[b] -= 1
            if self.references[b] == 0:
                self.free[b] = None
                if self.key_of[b] is None:  # holds nothing that could be asked for
                    self.free.move_to_end(b, last=False)

    def _keys(self, request: Request, tokens: int) -> list[bytes]:
        """Keys of the full blocks among the first `tokens`; kept with the request, whose known tokens never change."""
        full = tokens // self.size
        while len(request.keys) < full:
            start = len(request.keys) * self.size
            parent = request.keys[-1] if request.keys else f"{self.salt}\0{request.namespace}".encode()
            block = array("q", request.tokens[start : start + self.size]).tobytes()
            request.keys.append(hashlib.sha256(hashlib.sha256(parent).digest() + block).digest())
        return request.keys[:full]

    def check(self) -> None:
        assert all((n == 0) == (b in self.free) for b, n in enumerate(self.references)), "a block is free and referenced, or neither"
        assert all(self.key_of[b] == (group, key) for group, known in enumerate(self.block_of) for key, b in known.items())
        assert sum(key is not None for key in self.key_of) == sum(map(len, self.block_of))
