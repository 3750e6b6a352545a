"""Who computes which tokens in the next step: continuous batching without a prefill or a decode phase.

A step has a budget of tokens. Running requests come first, each with as many tokens as it is behind: those that are writing
(one token each, so that nobody waits for another's prompt), then those whose prompts are not read yet, by priority and
arrival; then waiting ones are admitted, in the order that orders.py gives, while budget, places and blocks last. `pace` can
bound a step's time as well. A request is admitted only if the blocks of its first part are there, and starts behind what the
prefix cache holds of it. When blocks run out, the last of the running ones gives way: its blocks go back, it waits at the
head of the queue and is computed again (or its blocks' content is kept in host memory: `swap`).

Pure Python: no tensor, no model. (vLLM's idea; see engine/request.py for what the two counters express.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container
from dataclasses import dataclass, field

from pellucid.engine.orders import Fair, Order, first_come
from pellucid.engine.pace import Pace
from pellucid.engine.prefix_cache import PrefixCache, first_needed, held
from pellucid.engine.request import GONE, Request, State
from pellucid.errors import BadInput


@dataclass(frozen=True)
class Part:
    """Tokens start..start + count of a request are computed in this step."""

    request: Request
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the request's next token follows from this part."""
        return self.start + self.count == len(self.request.tokens)


@dataclass
class Plan:
    """swapped_out: (request, tables of blocks that it had); swapped_in: (request, those that it has now)."""

    parts: list[Part] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    swapped_out: list[tuple[Request, list[list[int]]]] = field(default_factory=list)
    swapped_in: list[tuple[Request, list[list[int]]]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(part.count for part in self.parts)


class Scheduler:
    """budget: tokens of a step.  places: requests that run at a time.  chunk: most prompt tokens of one request in a step.
    swap: preempted requests keep their computed blocks outside instead of computing them again.  pace: a bound on a step's time."""

    def __init__(
        self, cache: PrefixCache, *, budget: int = 512, places: int = 64, chunk: int | None = None, context: int = 2**31,
        order: Order = first_come, swap: bool = False, pace: Pace | None = None,
    ):
        if budget < 1 or places < 1 or (chunk is not None and chunk < 1):
            raise BadInput("budget, places and chunk of a scheduler are at least 1")
        self.cache, self.budget, self.places, self.chunk, self.context = cache, budget, places, chunk or budget, context
        self.order, self.swap, self.pace = order, swap, pace
        self.windows = any(cache.windows)  # whether blocks can fall behind one
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.arrivals = 0

    # --- coming and going -----------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """BadInput where the request could never run, even alone."""
        self.check(request)
        request.tables = self._no_blocks()
        request.number = self.arrivals = self.arrivals + 1
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """BadInput where the request could never run, even alone."""
        most = min(request.limit, self.context)
        if len(request.prompt) == 0:
            raise BadInput("the prompt is empty", "there is nothing to continue", "give at least one token of text")
        if request.limit > self.context:
            raise BadInput(f"{len(request.prompt)} prompt tokens and max_tokens = {request.params.max_tokens} exceed the context of {self.context}",
                           next="shorten the prompt or ask for fewer tokens")
        if (wanted := self._most_blocks(most)) > self.cache.blocks:
            raise BadInput(f"a request of up to {most} tokens needs {wanted} blocks of {self.cache.size} tokens",
                           f"the cache has {self.cache.blocks}", "ask for fewer tokens, or start with a larger cache")

    def finish(self, request: Request, reason: str) -> None:
        """Out of the engine in whatever state it is; its blocks are free at once."""
        if request.state is State.FINISHED:
            return
        if request in self.running:
            self.running.remove(request)
            self._drop_drafts(request)
            if request.fault == "not_numbers":  # nor may its entries be
                self.cache.withdraw(request)
            else:
                self.cache.publish(request)
            self._give_back(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.state, request.finish_reason = State.FINISHED, reason

    # --- a step -----------------------------------------------------------------------------------------------------------

    def plan(self, without: Container[Request] = ()) -> Plan:
        """without: running requests that get no tokens in this step."""
        plan, left = Plan(), self.budget
        if self.pace:
            self.pace.begin((r.computed, r.behind) for r in self.running if r.writing)
        owed = sum(r.writing for r in self.running)  # a token each
        for request in sorted(self.running, key=lambda r: (not r.writing, r.priority, r.number)):
            owed -= request.writing
            gave_way = request.state is not State.RUNNING
            if gave_way or request in without:
                continue
            if request.drafts and not self._spare(request, left, owed):
                self._drop_drafts(request)
            count = self._share(request, left)
            if count and self._make_room(request, count, plan):
                self._compute(request, request.computed, count, plan)
                left -= count
        if not plan.preempted:
            self._admit(plan, left)
        return plan

    def done(self, plan: Plan) -> None:
        """The step was computed and tokens were drawn: counters move, full blocks can be found. Proposals that were refused
        are no longer among the tokens: what was computed for them will be written over."""
        for part in plan.parts:
            r = part.request
            if r.state is not State.RUNNING:  # cancelled meanwhile
                continue
            r.computed = min(part.start + part.count, len(r.tokens) - 1)
            self._shorten(r, self._blocks(r.computed + 1))
            if part.count > 1 or (part.start < len(r.prompt) and r.computed % self.cache.size == 0):
                self.cache.publish(r)  # blocks that generation fills are told of when it ends
            if self.windows:
                self._let_go(r)
        if isinstance(self.order, Fair):
            self.order.count(plan)

    def _spare(self, request: Request, left: int, owed: int) -> bool:
        """Whether its guesses take neither tokens nor blocks from those behind it who write, of whom there are `owed`."""
        blocks = self._wanted(request, request.computed + request.behind) + owed * len(request.tables)
        return request.behind <= left - owed and blocks <= self.cache.available()

    def _share(self, request: Request, left: int) -> int:
        """Tokens of a running request that are computed in this step, of a budget that has so many left."""
        return min(left, request.behind) if request.writing else self._chunk(request.computed, request.behind, left)

    def _chunk(self, start: int, behind: int, left: int) -> int:
        """Tokens of a prompt that this step has time for."""
        most = min(behind, left, self.chunk)
        return self.pace.largest(start, most) if self.pace and most else most

    def _compute(self, request: Request, start: int, count: int, plan: Plan) -> None:
        """These tokens are part of the step, and of its time."""
        plan.parts.append(Part(request, start, count))
        if self.pace and not request.writing:
            self.pace.take(start, count)

    def _make_room(self, request: Request, count: int, plan: Plan) -> bool:
        """Blocks for `count` more tokens; others, of lower priority or later, give way. False if the request itself had to."""
        while self._wanted(request, request.computed + count) > self.cache.available():
            last = max(self.running, key=lambda r: (r.priority, r.number))
            self._preempt(last, plan)
            if last is request:
                return False
        self._extend(request, request.computed + count)
        return True

    def _preempt(self, request: Request, plan: Plan) -> None:
        plan.parts = [part for part in plan.parts if part.request is not request]
        plan.preempted.append(request)
        self.running.remove(request)
        self._drop_drafts(request)
        request.preemptions += 1
        if self.swap and request.computed:
            plan.swapped_out.append((request, [list(table) for table in request.tables]))
            self._give_back(request)
            request.state = State.SWAPPED
        else:
            self.cache.publish(request)
            self._give_back(request)
            request.computed, request.state = 0, State.WAITING
        self.waiting.append(request)

    def _admit(self, plan: Plan, left: int) -> None:
        for request in list(self.order(self.waiting, self.cache)):
            if not left or len(self.running) >= self.places:
                return
            if request.state is State.SWAPPED:
                left = self._swap_in(request, plan, left)
            else:
                left = self._start(request, plan, left)
            if request.state is not State.RUNNING:  # no room: nobody behind it overtakes, or it might never come in
                return

    def _start(self, request: Request, plan: Plan, left: int) -> int:
        """Behind what the prefix cache holds, but at least the last token is computed: its logits are needed."""
        found = self.cache.match(request, min(len(request.tokens) - 1, request.reusable))
        hit = len(found) * self.cache.size  # a block that is written again must be its own
        count = self._chunk(hit, len(request.tokens) - hit, left)
        if not count:
            return left
        request.tables = [list(table) for table in zip(*found, strict=True)] or request.tables
        self.cache.claim(held(request.tables))
        if self._wanted(request, hit + count) > self.cache.available():
            self._give_back(request)
            return left
        self._extend(request, hit + count)
        request.computed = hit
        if request.preemptions == 0:
            request.hit = hit
        self._run(request, plan)
        self._compute(request, hit, count, plan)
        return left - count

    def _swap_in(self, request: Request, plan: Plan, left: int) -> int:
        count = self._chunk(request.computed, request.behind, left)
        whole = self._blocks(request.computed + count)
        behind = [first_needed(window, request.computed) // self.cache.size for window in self.cache.windows]
        if sum(whole - n for n in behind) > self.cache.available():
            return left
        request.tables = [[GONE] * n + self.cache.allocate(whole - n) for n in behind]
        plan.swapped_in.append((request, [list(table) for table in request.tables]))
        self._run(request, plan)
        if count:
            self._compute(request, request.computed, count, plan)
        return left - count

    def _run(self, request: Request, plan: Plan) -> None:
        request.state = State.RUNNING
        self.waiting.remove(request)
        self.running.append(request)
        plan.admitted.append(request)

    # --- blocks -----------------------------------------------------------------------------------------------------------

    def _wanted(self, request: Request, tokens: int) -> int:
        """Blocks that are missing for so many tokens; all tables are equally long."""
        return len(request.tables) * max(0, self._blocks(tokens) - len(request.tables[0]))

    def _extend(self, request: Request, tokens: int) -> None:
        missing = self._blocks(tokens) - len(request.tables[0])
        for table in request.tables if missing > 0 else ():
            table += self.cache.allocate(missing)

    def _shorten(self, request: Request, blocks: int) -> None:
        """Blocks behind so many go back: they hold nothing that stands."""
        if len(request.tables[0]) > blocks:
            self.cache.release(held(table[blocks:] for table in request.tables))
            for table in request.tables:
                del table[blocks:]

    def _let_go(self, request: Request) -> None:
        """Blocks that fell behind their group's window go back, some at a time where the cache wants it so (`stride`), the oldest to be
        given away first; until then what they hold can be found."""
        behind: list[tuple[list[int], int]] = []
        for window, table in zip(self.cache.windows, request.tables, strict=True):
            last = first_needed(window, request.computed) // self.cache.size
            while last and table[last - 1] != GONE:
                behind.append((table, last := last - 1))
        if len(behind) >= self.cache.stride:
            self.cache.publish(request)
            self.cache.release([table[i] for table, i in behind])
            for table, i in behind:
                table[i] = GONE

    def _give_back(self, request: Request) -> None:
        self.cache.release(held(request.tables))
        request.tables, request.published = self._no_blocks(), 0

    def _no_blocks(self) -> list[list[int]]:
        return [[] for _ in self.cache.windows]

    @property
    def longest(self) -> int:
        """Tokens of the longest request that can run, alone: as many as the context has, or the cache holds."""
        return bisect_right(range(1, self.context + 1), self.cache.blocks, key=self._most_blocks)

    def _most_blocks(self, tokens: int) -> int:
        """That a request of so many tokens holds at a time: of a window's group, what it reads and what a step adds."""
        whole = self._blocks(tokens)
        return sum(whole if window is None else min(whole, self._blocks(window - 1 + self.budget) + self.cache.stride) for window in self.cache.windows)

    @staticmethod
    def _drop_drafts(request: Request) -> None:
        if request.drafts:
            del request.tokens[len(request.tokens) - request.drafts :]
            request.drafts = 0
            request.computed = min(request.computed, len(request.tokens))

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.cache.size)
