"""Which of several engines gets a request: one that has its prefix, if it is not much fuller than the others; else the emptiest.

Load is counted in tokens that are still to be computed or generated at most. Pure Python: no tensor, no model.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

from pellucid.engine.request import Request

STRIDE = 64
"""Prefixes are remembered at every so many tokens."""
REMEMBERED = 1 << 16
SPILL = 2.0
"""A prefix draws its requests until an engine has so many times the load of the emptiest."""


class Router:
    """places: of engines.  slack: tokens that an engine may be ahead of the emptiest in any case."""

    def __init__(self, places: int, stride: int = STRIDE, spill: float = SPILL, slack: int = 1024):
        self.loads, self.stride, self.spill, self.slack = [0] * places, stride, spill, slack
        self.counts = [0] * places  # requests
        self.seen: OrderedDict[bytes, int] = OrderedDict()  # prefix -> who computed it last

    def choose(self, request: Request) -> int:
        """The engine's number; its load grows by the request's tokens until `leave`."""
        least = min(range(len(self.loads)), key=lambda i: (self.loads[i], self.counts[i], i))
        place, keys = least, list(self._keys(request))
        for key in reversed(keys):  # the longest first
            if (known := self.seen.get(key)) is not None:
                if self.loads[known] <= max(self.spill * self.loads[least], self.loads[least] + self.slack):
                    place = known
                break
        for key in keys:
            self.seen[key] = place
            self.seen.move_to_end(key)
        while len(self.seen) > REMEMBERED:
            self.seen.popitem(last=False)
        self.loads[place] += request.limit
        self.counts[place] += 1
        return place

    def leave(self, request: Request, place: int) -> None:
        self.loads[place] -= request.limit
        self.counts[place] -= 1

    def _keys(self, request: Request) -> Iterator[bytes]:
        key = request.namespace.encode()
        for start in range(0, len(request.prompt) // self.stride * self.stride, self.stride):
            chunk = ",".join(map(str, request.prompt[start : start + self.stride]))
            key = hashlib.sha256(key + b"|" + chunk.encode()).digest()
            yield key
