"""Prefix cache as a radix tree (SGLang's RadixAttention, arXiv 2312.07104).

Every path from a root spells the tokens of a known prefix; a node holds a run of them and the blocks where they lie. With
blocks of one token hits are exact to the token. Roots are namespaces. The tree holds a reference on its blocks: a node
whose blocks have no other and that has no children is a leaf that can be evicted.

Which leaf goes first is the policy: `lru`, or `cost`: the one whose loss is cheapest, (chance of reuse) x (work to compute
it again). The chance is estimated from hits and age, the work grows with the tokens before it, as attention does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pellucid.engine.request import Request


@dataclass(eq=False)
class Node:
    """tokens: len(blocks) x block size of them, behind those of all nodes above."""

    tokens: list[int]
    blocks: list[int]
    parent: Node | None
    depth: int  # tokens before it
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)  # by the tokens of their first block
    used: int = 0  # when it was last part of a hit or an insertion
    hits: int = 0


class RadixTree:
    """A `PrefixCache`.  policy: 'lru' or 'cost'.  half_life: of the chance that a prefix is asked for again, in uses of the cache."""

    def __init__(self, blocks: int, size: int = 1, policy: str = "lru", half_life: float = 256.0, attention: float = 1e-3):
        if policy not in ("lru", "cost"):
            raise ValueError(f"policy {policy!r}: lru or cost")
        self.blocks, self.size, self.policy, self.half_life, self.attention = blocks, size, policy, half_life, attention
        self.windows: tuple[int | None, ...] = (None,)  # a path is whole or not there: layers with a window keep all tokens here
        self.free = list(range(blocks - 1, -1, -1))
        self.references = [0] * blocks
        self.held = bytearray(blocks)  # 1: stands in the tree
        self.roots: dict[str, Node] = {}
        self.idle = 0  # blocks that only the tree refers to
        self.clock = 0

    # --- finding and keeping --------------------------------------------------------------------------------------------

    def match(self, request: Request, most: int | None = None) -> list[tuple[int, ...]]:
        found: list[int] = []
        for node, count in self._walk(request.tokens, request.namespace):
            found += node.blocks[:count]
        return [(block,) for block in (found if most is None else found[: most // self.size])]

    def publish(self, request: Request) -> None:
        full = request.computed // self.size
        tokens, blocks = request.tokens[: full * self.size], request.blocks
        self.clock += 1
        if not full:
            return
        node, done = self.roots.setdefault(request.namespace, Node([], [], None, 0)), 0
        for child, count in list(self._walk(tokens, request.namespace)):
            if count < len(child.blocks):
                self._split(child, count)
            for b, own in enumerate(child.blocks):
                self._adopt(request, done + b, own)
            child.used, child.hits = self.clock, child.hits + 1
            node, done = child, done + count
        if done < full:
            rest = tokens[done * self.size :]
            new = Node(rest, blocks[done:full], node, done * self.size, used=self.clock)
            node.children[tuple(rest[: self.size])] = new
            for b in new.blocks:
                self.references[b] += 1  # the tree's own
                self.held[b] = 1

    def withdraw(self, request: Request) -> None:
        """With all that was computed behind it."""
        node = next((child for child, _ in self._walk(request.tokens, request.namespace)), None)
        if node is None or node.blocks[0] not in request.blocks[:1]:  # an equal prefix, which somebody else computed
            return
        parent = node.parent
        assert parent is not None
        parent.children = {key: child for key, child in parent.children.items() if child is not node}
        below = [node]
        while below:
            node = below.pop()
            below += node.children.values()
            for b in node.blocks:
                self.held[b] = 0
                self.idle -= self.references[b] == 1
            self.release(node.blocks)

    def _adopt(self, request: Request, place: int, known: int) -> None:
        """The request reads a block of the tree where it computed an equal one itself."""
        mine = request.blocks[place]
        if mine != known:
            self.claim([known])
            request.blocks[place] = known
            request.moved = min(request.moved, place)
            self.release([mine])

    def _walk(self, tokens: list[int], namespace: str) -> Iterator[tuple[Node, int]]:
        """(node, blocks of it that agree) along the tokens; the last may agree in part."""
        node, at = self.roots.get(namespace), 0
        while node is not None:
            child = node.children.get(tuple(tokens[at : at + self.size]))
            if child is None or at + self.size > len(tokens):
                return
            same = self._same(child.tokens, tokens, at)
            yield child, same
            if same < len(child.blocks):
                return
            node, at = child, at + len(child.tokens)

    def _same(self, run: list[int], tokens: list[int], at: int) -> int:
        """Whole blocks in which `run` agrees with tokens[at:]."""
        length = min(len(run), len(tokens) - at)
        same = next((i for i in range(length) if run[i] != tokens[at + i]), length)
        return same // self.size

    def _split(self, node: Node, count: int) -> None:
        """The node keeps its first `count` blocks; the others go to a child of its own."""
        cut = count * self.size
        lower = Node(node.tokens[cut:], node.blocks[count:], node, node.depth + cut, node.children, node.used, node.hits)
        for child in lower.children.values():
            child.parent = lower
        node.tokens, node.blocks = node.tokens[:cut], node.blocks[:count]
        node.children = {tuple(lower.tokens[: self.size]): lower}

    # --- blocks -----------------------------------------------------------------------------------------------------------

    def claim(self, blocks: Iterable[int]) -> None:
        for b in blocks:
            self.idle -= self.references[b] == 1 and self.held[b]
            self.references[b] += 1

    def available(self) -> int:
        return len(self.free) + self.idle

    def allocate(self, count: int) -> list[int]:
        if count > self.available():
            raise MemoryError(f"{count} blocks wanted, {self.available()} available")
        if count > len(self.free):
            self._evict(count - len(self.free))
        taken = [self.free.pop() for _ in range(count)]
        for b in taken:
            self.references[b] = 1
        return taken

    def release(self, blocks: list[int]) -> None:
        for b in reversed(blocks):
            self.references[b] -= 1
            if self.references[b] == 0:
                self.free.append(b)
            elif self.references[b] == 1 and self.held[b]:
                self.idle += 1

    def nodes(self) -> Iterator[Node]:
        """All nodes with tokens, parents before children."""
        stack = list(self.roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())

    def _evict(self, wanted: int) -> None:
        """Frees so many blocks, leaf by leaf and from a leaf's end, until there are enough."""
        import heapq

        number = 0
        heap: list[tuple[float, int, Node]] = []
        for node in self.nodes():
            if self._evictable(node):
                heapq.heappush(heap, (self.worth(node), number := number + 1, node))
        while wanted > 0:
            _, _, node = heapq.heappop(heap)
            idle = next((i for i, b in enumerate(reversed(node.blocks)) if self.references[b] > 1), len(node.blocks))
            gone = node.blocks[-min(idle, wanted) :]
            node.blocks = node.blocks[: len(node.blocks) - len(gone)]
            node.tokens = node.tokens[: len(node.blocks) * self.size]
            for b in gone:
                self.references[b], self.held[b] = 0, 0
                self.idle -= 1
                self.free.append(b)
            wanted -= len(gone)
            if not node.blocks:
                parent = node.parent
                assert parent is not None
                parent.children = {key: child for key, child in parent.children.items() if child is not node}
                if parent.parent is not None and self._evictable(parent):
                    heapq.heappush(heap, (self.worth(parent), number := number + 1, parent))
        self.roots = {namespace: root for namespace, root in self.roots.items() if root.children}  # every request may have a salt of its own

    def _evictable(self, node: Node) -> bool:
        """A leaf, of which nobody reads at least the end (a request may stand on the first blocks of a node)."""
        return not node.children and self.references[node.blocks[-1]] == 1

    def worth(self, node: Node) -> float:
        """What is lost with the node: by the policy, the smallest goes first."""
        if self.policy == "lru":
            return float(node.used)
        chance = (1 + node.hits) * math.pow(0.5, (self.clock - node.used) / self.half_life)
        n = len(node.tokens)
        return chance * (1 + self.attention * (node.depth + n / 2))  # for each token: cells are compared, not sums

    def check(self) -> None:
        held = [b for node in self.nodes() for b in node.blocks]
        assert len(set(held)) == len(held), "a block stands twice in the tree"
        assert {b for b in range(self.blocks) if self.held[b]} == set(held)
        assert len(set(self.free)) == len(self.free) and not set(self.free) & set(held)
        assert all((n == 0) == (b in set(self.free)) for b, n in enumerate(self.references))
        assert self.idle == sum(self.references[b] == 1 for b in held), "idle blocks are miscounted"
        for node in self.nodes():
            assert len(node.tokens) == len(node.blocks) * self.size and node.blocks
            assert all(key == tuple(child.tokens[: self.size]) and child.parent is node for key, child in node.children.items())
