"""Prefix cache as a radix tree (SGLang's RadixAttention, arXiv 2312.07104).

Every path from a root spells the tokens of a known prefix; a node holds a run of them and the blocks where they lie. With
blocks of one token hits are exact to the token. Roots are namespaces. The tree holds a reference on its blocks; those that have no
other are idle and can be given away, a node's from its end, leaves before what is above them.

Which goes first is the policy: `lru`, or `cost`: the one whose loss is cheapest, (chance of reuse) x (work to compute
it again). The chance is estimated from hits and age, the work grows with the tokens before it, as attention does.

Layers with a window read the last tokens of a prefix only (engine/layer_groups.py). What fell behind the windows of a request is
given back to the tree, and the tree can lose it anywhere: GONE stands there, and a hit is the longest prefix of which every window has
what it reads. Most hits end where a node ends: at a fork, at the end of a prompt or of an answer. What no window reads there is
`stale`: it counts as unused for a half-life more, so that in a full cache hardly any of it is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from pellucid.engine.prefix_cache import first_needed
from pellucid.engine.request import GONE, Request

STRIDE = 16
"""Tokens that fall behind a window before a request gives them back: each time the tree follows it from its root."""


@dataclass(eq=False)
class Node:
    """key: the tokens of its first block, of a root its namespace.  tokens: n x block size of them, behind those of all nodes above.
    tables: n blocks for each group of layers."""

    key: Any
    tokens: list[int]
    tables: list[list[int]]
    parent: Node | None  # none: a root, or no longer in the tree
    depth: int  # tokens before it
    children: dict[Any, Node] = field(default_factory=dict)
    used: int = 0  # when it was last part of a hit or an insertion
    hits: int = 0  # of others than who computed it
    queued: list[float | None] = field(default_factory=lambda: [None, None])  # its rank in the queue: as a whole, what is stale

    @property
    def blocks(self) -> list[int]:
        return [b for table in self.tables for b in table if b != GONE]


class RadixTree:
    """A `PrefixCache`.  policy: 'lru' or 'cost'.  half_life: of the chance that a prefix is asked for again, in uses of the cache."""

    def __init__(self, blocks: int, size: int = 1, policy: str = "lru", half_life: float = 256.0, attention: float = 1e-3,
                 windows: tuple[int | None, ...] = (None,)):
        if policy not in ("lru", "cost"):
            raise ValueError(f"policy {policy!r}: lru or cost")
        self.blocks, self.size, self.policy, self.half_life, self.attention = blocks, size, policy, half_life, attention
        self.windows, self.stride = windows, max(1, STRIDE // size)
        self.sliding = [g for g, window in enumerate(windows) if window is not None]
        self.lasting = [g for g, window in enumerate(windows) if window is None] or self.sliding  # without them a place is of no use
        self.free = list(range(blocks - 1, -1, -1))
        self.references = [0] * blocks
        self.held = bytearray(blocks)  # 1: stands in the tree
        self.roots: dict[str, Node] = {}
        self.idle = 0  # blocks that only the tree refers to
        self.clock = 0
        self.queue: list[tuple[float, int, Node, bool]] = []  # rank, turn, node, whether only what is stale: the smallest goes first
        self.turns = 0
        self.aside: list[Node] = []  # found in use when their turn came

    # --- finding and keeping --------------------------------------------------------------------------------------------

    def match(self, request: Request, most: int | None = None) -> list[tuple[int, ...]]:
        tables: list[list[int]] = [[] for _ in self.windows]
        for node, count in self._walk(request.tokens, request.namespace):
            for table, more in zip(tables, node.tables, strict=True):
                table += more[:count]
        found = len(tables[0]) if most is None else min(len(tables[0]), most // self.size)
        first = self._first(found)
        while broken := [i for g in self.sliding if (i := last_gone(tables[g], first[g], found)) >= 0]:
            found = min(broken)  # what is longer reads there too
            first = self._first(found)
        return list(zip(*([GONE] * start + table[start:found] for table, start in zip(tables, first, strict=True)), strict=True))

    def publish(self, request: Request) -> None:
        self.clock += 1
        full, prompt = request.computed // self.size, len(request.prompt) // self.size
        while full and all(table[full - 1] == GONE for table in request.tables):
            full -= 1
        if not full:
            return
        tokens, path = request.tokens[: full * self.size], list[Node]()
        node, done = self.roots.setdefault(request.namespace, Node(request.namespace, [], [[] for _ in self.windows], None, 0)), 0
        for child, count in list(self._walk(tokens, request.namespace)):
            if count < len(child.tables[0]):
                self._split(child, count)
            self._share(request, child, done)
            child.hits += done >= request.published  # what it told of itself is no hit
            path.append(child)
            node, done = child, done + count
        for stop in (prompt, full):  # the next turn of a talk may go on from the end of the prompt: a node ends there
            if done < stop <= full:
                more = [table[done:stop] for table in request.tables]
                node = self._add(node, tokens[done * self.size : stop * self.size], more, done == request.published != prompt)
                path.append(node)
                done = stop
        for node in path:
            node.used = self.clock
            self._enqueue(node)
        self._look_again()
        request.published = full

    def withdraw(self, request: Request) -> None:
        """With all that was computed behind it."""
        path, done, known = list(self._walk(request.tokens, request.namespace)), 0, request.published > 0
        for node, count in path:
            known = known or any(b == own != GONE for table, mine in zip(node.tables, request.tables, strict=True)
                                 for b, own in zip(table[:count], mine[done:], strict=False))
            done += count
        if known and path:  # else it is an equal prefix, which somebody else computed
            self._remove(path[0][0])

    def _share(self, request: Request, node: Node, done: int) -> None:
        """The request reads blocks of the tree where it computed equal ones itself; the tree takes those that it had lost."""
        for table, mine in zip(node.tables, request.tables, strict=True):
            start = max(0, mine.count(GONE) - done)  # they stand in front
            if table[start:] == mine[done + start : done + len(table)]:
                continue
            for i in range(start, len(table)):
                known, own = table[i], mine[done + i]
                if known == GONE:
                    table[i] = own
                    self._hold(own)
                elif known != own:
                    self.claim([known])
                    mine[done + i] = known
                    request.moved = min(request.moved, done + i)
                    self.release([own])

    def _add(self, node: Node, tokens: list[int], tables: list[list[int]], joined: bool) -> Node:
        """The node that ends with these tokens: a leaf itself, made longer, or a new one below."""
        if joined and node.parent is not None and not node.children:
            node.tokens += tokens
            for table, more in zip(node.tables, tables, strict=True):
                table += more
        else:
            above, node = node, Node(tuple(tokens[: self.size]), tokens, tables, node, node.depth + len(node.tokens))
            above.children[node.key] = node
        for b in (b for table in tables for b in table if b != GONE):
            self._hold(b)
        return node

    def _walk(self, tokens: list[int], namespace: str) -> Iterator[tuple[Node, int]]:
        """(node, blocks of it that agree) along the tokens; the last may agree in part."""
        node, at = self.roots.get(namespace), 0
        while node is not None:
            child = node.children.get(tuple(tokens[at : at + self.size]))
            if child is None or at + self.size > len(tokens):
                return
            same = self._same(child.tokens, tokens, at)
            yield child, same
            if same < len(child.tables[0]):
                return
            node, at = child, at + len(child.tokens)

    def _same(self, run: list[int], tokens: list[int], at: int) -> int:
        """Whole blocks in which `run` agrees with tokens[at:]."""
        low, high = 0, min(len(run), len(tokens) - at)
        while low < high:  # they agree up to low
            middle = (low + high + 1) // 2
            low, high = (middle, high) if run[low:middle] == tokens[at + low : at + middle] else (low, middle - 1)
        return low // self.size

    def _split(self, node: Node, count: int) -> None:
        """The node keeps its first `count` blocks; the others go to a child of its own."""
        cut = count * self.size
        lower = Node(tuple(node.tokens[cut : cut + self.size]), node.tokens[cut:], [table[count:] for table in node.tables], node,
                     node.depth + cut, node.children, node.used, node.hits)
        for child in lower.children.values():
            child.parent = lower
        node.tokens, node.tables = node.tokens[:cut], [table[:count] for table in node.tables]
        node.children = {lower.key: lower}
        self._enqueue(lower)

    def _first(self, blocks: int) -> list[int]:
        """Of each group the first block that is read behind a prefix of so many."""
        return [first_needed(window, blocks * self.size) // self.size for window in self.windows]

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

    def _hold(self, block: int) -> None:
        """The tree's own reference."""
        self.references[block] += 1
        self.held[block] = 1

    def _leave(self, block: int) -> int:
        """The tree's reference goes; 1 where it was the last."""
        self.held[block] = 0
        self.idle -= self.references[block] == 1
        self.references[block] -= 1
        if self.references[block]:
            return 0
        self.free.append(block)
        return 1

    def nodes(self) -> Iterator[Node]:
        """All nodes with tokens, parents before children."""
        stack = list(self.roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())

    # --- what is given away -------------------------------------------------------------------------------------------------

    def _evict(self, wanted: int) -> None:
        """Frees so many blocks. A rank in the queue may be out of date: it is looked at again when its turn comes."""
        looked = False
        while wanted > 0:
            if not self.queue and not looked:
                looked = True
                self._look_again()
            rank, _, node, stale = heappop(self.queue)
            if node.parent is None or node.queued[stale] != rank:
                continue
            node.queued[stale] = None
            if self.rank(node, stale) > rank:
                self._enqueue(node)
                continue
            freed = 0 if stale else self._cut(node, wanted)
            freed += self._lose_windows(node, stale, wanted - freed)
            wanted -= freed
            self._settle(node)
            if freed:
                self._enqueue(node)
            else:
                self.aside.append(node)

    def _look_again(self) -> None:
        """At those that could not be given away: who stood on them may have left."""
        for node in self.aside:
            self._enqueue(node)
        self.aside.clear()

    def _cut(self, node: Node, wanted: int) -> int:
        """Blocks freed from a leaf's end, up to one that a request reads (it may stand on the first blocks of a node)."""
        freed = 0
        while freed < wanted and self._evictable(node):
            freed += sum(self._leave(b) for table in node.tables if (b := table.pop()) != GONE)
            del node.tokens[-self.size :]
        return freed

    def _evictable(self, node: Node) -> bool:
        """A leaf of whose last tokens nobody reads what makes them of use."""
        return bool(node.tables[0]) and not node.children and all(
            b == GONE or self.references[b] == 1 for b in (node.tables[g][-1] for g in self.lasting))

    def _lose_windows(self, node: Node, stale: bool, wanted: int) -> int:
        """Idle blocks of windows, freed from the end on: of what is stale, or of all."""
        freed = 0
        for g in self.sliding:
            table = node.tables[g]
            for i in range(self._stale(node, g) if stale else len(table))[::-1]:
                if freed >= wanted:
                    return freed
                if table[i] != GONE and self.references[table[i]] == 1:
                    freed += self._leave(table[i])
                    table[i] = GONE
        return freed

    def _stale(self, node: Node, group: int) -> int:
        """So many of the node's first blocks are not read behind its end."""
        return max(0, first_needed(self.windows[group], node.depth + len(node.tokens)) // self.size - node.depth // self.size)

    def _settle(self, node: Node) -> None:
        """A leaf ends where there is something; one that has nothing goes, and so on upwards."""
        while node.parent is not None and not node.children:
            while node.tables[0] and all(table[-1] == GONE for table in node.tables):
                del node.tokens[-self.size :]
                for table in node.tables:
                    del table[-1]
            if node.tables[0]:
                return
            node = self._remove(node)

    def _remove(self, node: Node) -> Node:
        """With all below it; the node above."""
        above, below = node.parent, [node]
        assert above is not None
        del above.children[node.key]
        while below:
            gone = below.pop()
            below += gone.children.values()
            gone.parent = None
            for b in gone.blocks:
                self._leave(b)
        if above.parent is not None:
            self._enqueue(above)
        elif not above.children:  # every request may have a salt of its own
            del self.roots[above.key]
        return above

    def _enqueue(self, node: Node) -> None:
        """With what of it could be given away, unless it stands there."""
        for stale in (False, True) if node.parent is not None else ():
            rank, known = self.rank(node, stale), node.queued[stale]
            if (known is None or rank < known) and (not (stale or node.children) or self._slides(node, stale)):
                node.queued[stale] = rank
                heappush(self.queue, (rank, self.turns, node, stale))
                self.turns += 1

    def _slides(self, node: Node, stale: bool) -> bool:
        """Whether a block of a window is there, among what is stale or among all."""
        parts = (node.tables[g][: self._stale(node, g) if stale else None] for g in self.sliding)
        return any(part.count(GONE) < len(part) for part in parts)

    def rank(self, node: Node, stale: bool = False) -> float:
        """What is lost with the node, in half-lives: by the policy, the smallest goes first. All chances fall alike as time passes, so
        that the order of two nodes changes only when one of them is used, or its shape changes."""
        age = node.used / self.half_life - stale
        if self.policy == "lru":
            return age
        cell = 1 + self.attention * (node.depth + len(node.tokens) / 2)  # for each token: cells are compared, not sums
        return age + math.log2((1 + node.hits) * cell)

    def check(self) -> None:
        held = [b for node in self.nodes() for b in node.blocks]
        assert len(set(held)) == len(held), "a block stands twice in the tree"
        assert {b for b in range(self.blocks) if self.held[b]} == set(held)
        assert len(set(self.free)) == len(self.free) and not set(self.free) & set(held)
        assert all((n == 0) == (b in set(self.free)) for b, n in enumerate(self.references))
        assert self.idle == sum(self.references[b] == 1 for b in held), "idle blocks are miscounted"
        assert all(root.children for root in self.roots.values()), "a root that leads nowhere"
        for node in self.nodes():
            assert node.tokens and all(len(node.tokens) == len(table) * self.size for table in node.tables)
            assert all(b != GONE for g in self.lasting if self.windows[g] is None for b in node.tables[g])
            assert node.children or any(table[-1] != GONE for table in node.tables), "a leaf that ends in nothing"
            assert all(key == child.key == tuple(child.tokens[: self.size]) and child.parent is node for key, child in node.children.items())


def last_gone(table: list[int], start: int, stop: int) -> int:
    """The last of these places where a block was given away, or -1."""
    return max(i for i in range(start, stop) if table[i] == GONE) if GONE in table[start:stop] else -1
