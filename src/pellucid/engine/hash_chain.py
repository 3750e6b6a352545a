"""Prefix cache as a chain of block hashes (vLLM's, arXiv 2309.06180 and its v1 design): the free list IS the LRU.

A full block's key is sha256(key of the block before, its tokens): equal keys mean equal prefixes, so one dictionary finds
a prefix block by block. A block that loses its last reference goes to the tail of the free list and stays findable; a
request gives its blocks back deepest first, so that a chain is eaten from its leaf. Taking a block pops the head and
drops its key. There is no code for eviction.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable

from pellucid.engine.request import Request


class HashChain:
    """A `PrefixCache` whose hits are whole blocks.  salt: secret, so that timing tells nobody what others asked."""

    def __init__(self, blocks: int, size: int, salt: str = ""):
        self.blocks, self.size, self.salt = blocks, size, salt
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))  # a doubly linked list: O(1) in the middle
        self.references = [0] * blocks
        self.key_of: list[bytes | None] = [None] * blocks
        self.block_of: dict[bytes, int] = {}

    def match(self, request: Request) -> list[int]:
        found = []
        for key in self._keys(request, len(request.tokens)):
            block = self.block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

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
            key, self.key_of[b] = self.key_of[b], None
            if key is not None:
                del self.block_of[key]
            self.references[b] = 1
        return taken

    def publish(self, request: Request) -> None:
        for key, b in zip(self._keys(request, request.computed), request.blocks, strict=False):
            if self.key_of[b] is None and key not in self.block_of:  # else two computed the same: the first is found
                self.key_of[b], self.block_of[key] = key, b

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
        assert all(self.key_of[b] == key for key, b in self.block_of.items())
        assert sum(key is not None for key in self.key_of) == len(self.block_of)
