"""Who of those that wait is admitted first: the oldest, who finds most in the cache, or whose namespace was served least.

An order is asked in every step that has places left. Two others look further: planning.py (depth first through the prompts' tree) and
ordering.py (the next few, by dynamic programming).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from pellucid.engine.prefix_cache import PrefixCache
from pellucid.engine.request import Request

if TYPE_CHECKING:
    from pellucid.engine.scheduler import Plan

Order = Callable[[list[Request], PrefixCache], Iterable[Request]]


def first_come(waiting: list[Request], cache: PrefixCache) -> Iterable[Request]:
    """By priority, then arrival; who was preempted keeps its place."""
    return sorted(waiting, key=lambda r: (r.priority, r.number))


def longest_hit(waiting: list[Request], cache: PrefixCache) -> Iterable[Request]:
    """By priority, then by how much of the prompt the cache holds now (SGLang's longest prefix match)."""
    return sorted(waiting, key=lambda r: (r.priority, -len(cache.match(r)), r.number))


REMEMBERED = 10_000
"""Namespaces whose service is known; of more, those that are not here are forgotten."""


class Fair:
    """By priority, then the namespace that was served the fewest tokens so far, then arrival.

    Who comes back, or comes first, starts level with the one served least of those who are here: otherwise it could keep all
    others waiting until it had caught up with their whole past (virtual token counters, arXiv 2401.00588). Between two
    namespaces that always have somebody waiting, what they were served differs by at most what all places hold.
    """

    def __init__(self) -> None:
        self.served: dict[str, int] = {}
        self.waiting: set[str] = set()  # namespaces, at the last look
        self.running: set[str] = set()

    def __call__(self, waiting: list[Request], cache: PrefixCache) -> Iterable[Request]:
        before, here = self.waiting | self.running, {r.namespace for r in waiting}
        level = min((self.served.get(name, 0) for name in before), default=0)
        for name in here - before:
            self.served[name] = max(self.served.get(name, 0), level)
        if len(self.served) > REMEMBERED:  # every request may have a salt of its own
            self.served = {name: self.served[name] for name in before | here if name in self.served}
        self.waiting = here
        return sorted(waiting, key=lambda r: (r.priority, self.served.get(r.namespace, 0), r.number))

    def count(self, plan: Plan) -> None:
        self.running = {part.request.namespace for part in plan.parts}
        for part in plan.parts:
            self.served[part.request.namespace] = self.served.get(part.request.namespace, 0) + part.count
