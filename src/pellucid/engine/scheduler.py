"""Who computes which tokens in the next step: continuous batching without a prefill or a decode phase.

A step has a budget of tokens. Running requests come first, each with as many tokens as it is behind: those that are writing
(one token each, so that nobody waits for another's prompt), then those whose prompts are not read yet, by priority and
arrival; then waiting ones are admitted while budget, places and blocks last. `pace` can bound a step's time as well. A request is admitted only if the blocks of
its first part are there, and starts behind what the prefix cache holds of it. When blocks run out, the last of the running
ones gives way: its blocks go back, it waits at the head of the queue and is computed again (or its blocks' content is kept
in host memory: `swap`).

Pure Python: no tensor, no model. (vLLM's idea; see engine/request.py for what the two counters express.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pellucid.engine.pace import Pace
from pellucid.engine.prefix_cache import PrefixCache
from pellucid.engine.request import Request, State
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
    """swapped_out: (request, blocks that it had); swapped_in: (request, blocks that it has now)."""

    parts: list[Part] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    swapped_out: list[tuple[Request, list[int]]] = field(default_factory=list)
    swapped_in: list[tuple[Request, list[int]]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(part.count for part in self.parts)


Order = Callable[[list[Request], PrefixCache], Iterable[Request]]


def first_come(waiting: list[Request], cache: PrefixCache) -> Iterable[Request]:
    """By priority, then arrival; who was preempted keeps its place."""
    return sorted(waiting, key=lambda r: (r.priority, r.number))


def longest_hit(waiting: list[Request], cache: PrefixCache) -> Iterable[Request]:
    """By priority, then by how much of the prompt the cache holds now (SGLang's longest prefix match)."""
    return sorted(waiting, key=lambda r: (r.priority, -len(cache.match(r)), r.number))


class Fair:
    """By priority, then the namespace that was served the fewest tokens so far, then arrival."""

    def __init__(self) -> None:
        self.served: dict[str, int] = {}

    def __call__(self, waiting: list[Request], cache: PrefixCache) -> Iterable[Request]:
        return sorted(waiting, key=lambda r: (r.priority, self.served.get(r.namespace, 0), r.number))

    def count(self, plan: Plan) -> None:
        for part in plan.parts:
            self.served[part.request.namespace] = self.served.get(part.request.namespace, 0) + part.count


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
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.arrivals = 0

    # --- coming and going -----------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """BadInput where the request could never run, even alone."""
        self.check(request)
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
        if self._blocks(most) > self.cache.blocks:
            raise BadInput(f"a request of up to {most} tokens needs {self._blocks(most)} blocks of {self.cache.size} tokens",
                           f"the cache has {self.cache.blocks}", "ask for fewer tokens, or start with a larger cache")

    def finish(self, request: Request, reason: str) -> None:
        """Out of the engine in whatever state it is; its blocks are free at once."""
        if request.state is State.FINISHED:
            return
        if request in self.running:
            self.running.remove(request)
            self._drop_drafts(request)
            self.cache.publish(request)
            self._give_back(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.state, request.finish_reason = State.FINISHED, reason

    # --- a step -----------------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        plan, left = Plan(), self.budget
        if self.pace:
            self.pace.begin((r.computed, r.behind) for r in self.running if r.writing)
        for request in sorted(self.running, key=lambda r: (not r.writing, r.priority, r.number)):
            if left and request.state is State.RUNNING and (count := min(left, request.behind) if request.writing
                                                            else self._chunk(request.computed, request.behind, left)):
                if request.drafts and count < request.behind:  # no budget for guesses
                    self._drop_drafts(request)
                    count = min(request.behind, left)
                if self._make_room(request, count, plan):
                    plan.parts.append(Part(request, request.computed, count))
                    left -= count
                    self._take(plan.parts[-1])
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
            extra = len(r.blocks) - self._blocks(r.computed + 1)
            if extra > 0:
                self.cache.release(r.blocks[-extra:])
                del r.blocks[-extra:]
            if part.count > 1 or (part.start < len(r.prompt) and r.computed % self.cache.size == 0):
                self.cache.publish(r)  # blocks that generation fills are told of when it ends
        if isinstance(self.order, Fair):
            self.order.count(plan)

    def _chunk(self, start: int, behind: int, left: int) -> int:
        """Tokens of a prompt that this step has time for."""
        most = min(behind, left, self.chunk)
        return self.pace.largest(start, most) if self.pace and most else most

    def _take(self, part: Part) -> None:
        if self.pace and not part.request.writing:
            self.pace.take(part.start, part.count)

    def _make_room(self, request: Request, count: int, plan: Plan) -> bool:
        """Blocks for `count` more tokens; others, of lower priority or later, give way. False if the request itself had to."""
        wanted = self._blocks(request.computed + count) - len(request.blocks)
        while wanted > self.cache.available():
            last = max(self.running, key=lambda r: (r.priority, r.number))
            self._preempt(last, plan)
            if last is request:
                return False
        request.blocks += self.cache.allocate(max(wanted, 0))
        return True

    def _preempt(self, request: Request, plan: Plan) -> None:
        plan.parts = [part for part in plan.parts if part.request is not request]
        plan.preempted.append(request)
        self.running.remove(request)
        self._drop_drafts(request)
        request.preemptions += 1
        if self.swap and request.computed:
            plan.swapped_out.append((request, list(request.blocks)))
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
        found = self.cache.match(request)
        hit = min(len(found) * self.cache.size, len(request.tokens) - 1, request.reusable)
        found = found[: hit // self.cache.size]  # a block that is written again must be its own
        hit = len(found) * self.cache.size
        count = self._chunk(hit, len(request.tokens) - hit, left)
        if not count:
            return left
        self.cache.claim(found)
        wanted = self._blocks(hit + count) - len(found)
        if wanted > self.cache.available():
            self.cache.release(found)
            return left
        request.blocks, request.computed = found + self.cache.allocate(wanted), hit
        if request.preemptions == 0:
            request.hit = hit
        self._run(request, plan)
        plan.parts.append(Part(request, hit, count))
        self._take(plan.parts[-1])
        return left - count

    def _swap_in(self, request: Request, plan: Plan, left: int) -> int:
        count = self._chunk(request.computed, request.behind, left)
        wanted = self._blocks(request.computed + count)
        if wanted > self.cache.available():
            return left
        request.blocks = self.cache.allocate(wanted)
        plan.swapped_in.append((request, list(request.blocks)))
        self._run(request, plan)
        if count:
            plan.parts.append(Part(request, request.computed, count))
            self._take(plan.parts[-1])
        return left - count

    def _run(self, request: Request, plan: Plan) -> None:
        request.state = State.RUNNING
        self.waiting.remove(request)
        self.running.append(request)
        plan.admitted.append(request)

    def _give_back(self, request: Request) -> None:
        self.cache.release(request.blocks)
        request.blocks = []

    @staticmethod
    def _drop_drafts(request: Request) -> None:
        if request.drafts:
            del request.tokens[len(request.tokens) - request.drafts :]
            request.drafts = 0
            request.computed = min(request.computed, len(request.tokens))

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.cache.size)
