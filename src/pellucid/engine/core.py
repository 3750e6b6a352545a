"""The engine: scheduler, runner and sampler in one step. Token ids in, token ids out; text is the business of `LLM`.

    engine = Engine(model, eos=[2])
    engine.add(Request(prompt, SamplingParams(max_tokens=20)))
    while engine.busy:
        for request, token in engine.step(): ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pellucid import events
from pellucid.engine.hash_chain import HashChain
from pellucid.engine.prefix_cache import NoReuse, PrefixCache
from pellucid.engine.radix_tree import RadixTree
from pellucid.engine.request import Request, State
from pellucid.engine.runner import Runner
from pellucid.engine.sampler import Sampler
from pellucid.engine.scheduler import Fair, Order, Plan, Scheduler, first_come, longest_hit
from pellucid.errors import BadInput
from pellucid.nn import Decoder
from pellucid.nn.count import cache_entries, count
from pellucid.runtime import Choice, available_memory_bytes

ORDERS: dict[str, Callable[[], Order]] = {"first-come": lambda: first_come, "longest-hit": lambda: longest_hit, "fair": Fair}


@dataclass
class EngineStep(events.Event):
    """One step of the engine.  planning, seconds: of the scheduler, and of the whole step."""

    kind = "engine_step"
    step: int
    tokens: int
    generated: int
    running: int
    waiting: int
    admitted: int
    preempted: int
    available: int
    blocks: int
    planning: float
    seconds: float


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs. Every field is an option of `pellucid serve`."""

    cache_tokens: int | None = None
    """Tokens that the cache has room for; by default what memory allows, at most 64 full contexts."""
    block: int = 16
    """Tokens of a block of the cache."""
    prefix: str = "chain"
    """Prefix cache: chain (hashes of blocks), radix (a tree, exact to the token), radix-cost (evicts what is cheapest to lose), none."""
    budget: int = 512
    """Tokens computed in a step."""
    chunk: int | None = None
    """Most prompt tokens of one request in a step; by default the budget."""
    running: int = 64
    """Requests that run at a time."""
    order: str = "first-come"
    """Who is admitted first: first-come, longest-hit (in the prefix cache), fair (the namespace served least)."""
    swap: bool = False
    """Preempted requests keep their cache in host memory instead of computing it again."""


class Engine:
    """Continuous batching over a paged cache. Not thread-safe: one thread calls it."""

    def __init__(self, model: Decoder, eos: Sequence[int] = (), config: EngineConfig | None = None,
                 stop: Callable[[Request], bool] | None = None):
        c = config = config or EngineConfig()
        if c.order not in ORDERS:
            raise BadInput(f"order {c.order!r} is not known", next=f"use one of {', '.join(ORDERS)}")
        self.model, self.eos, self.stop, self.config = model, set(eos), stop, config
        self.room = choose_room(model, c)
        size = 1 if c.prefix.startswith("radix") else c.block
        self.cache = make_cache(c.prefix, model, -(-self.room.value // size), size)
        self.runner = Runner(model, self.cache.blocks, size, c.running)
        self.scheduler = Scheduler(self.cache, budget=c.budget, places=c.running, chunk=c.chunk, context=model.spec.context,
                                   order=ORDERS[c.order](), swap=c.swap)
        self.steps = 0
        self.totals = {"prompt_tokens": 0, "hit_tokens": 0, "generated_tokens": 0, "computed_tokens": 0, "preemptions": 0}

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def add(self, request: Request) -> None:
        """BadInput where it could never run."""
        self.scheduler.add(request)
        self.totals["prompt_tokens"] += len(request.prompt)

    def cancel(self, request: Request) -> None:
        """In whatever state it is; its blocks are free at once."""
        self.scheduler.finish(request, "cancelled")
        self.runner.forget(request)

    def step(self) -> list[tuple[Request, int]]:
        """Computes one step; the requests that received a token, with it. `finish_reason` says which of them are done."""
        start = time.perf_counter()
        plan = self.scheduler.plan()
        planned = time.perf_counter()
        logits = self.runner.step(plan)
        self.scheduler.done(plan)
        given = self._sample(list(logits), list(logits.values()))
        self._tell(plan, given, planned - start, time.perf_counter() - start)
        return given

    def _sample(self, requests: list[Request], logits: list[torch.Tensor]) -> list[tuple[Request, int]]:
        if not requests:
            return []
        by_place: dict[int, list[int]] = {}  # requests that draw their t-th token together
        for i, r in enumerate(requests):
            by_place.setdefault(len(r.output) if r.params.temperature else 0, []).append(i)
        tokens, logprobs = [0] * len(requests), [0.0] * len(requests)
        for place, rows in by_place.items():
            sampler = Sampler([requests[i].params for i in rows], [requests[i].seed for i in rows], logits[0].device)
            drawn, logs = sampler(torch.stack([logits[i] for i in rows]), place)
            for k, i in enumerate(rows):
                tokens[i] = int(drawn[k])
                logprobs[i] = 0.0 if logs is None else float(logs[k])
        given = []
        for r, token, logprob in zip(requests, tokens, logprobs, strict=True):
            r.tokens.append(token)
            if r.params.logprobs:
                r.logprobs.append(logprob)
            if reason := self._ended(r, token):
                self.scheduler.finish(r, reason)
                self.runner.forget(r)
            given.append((r, token))
        return given

    def _ended(self, r: Request, token: int) -> str | None:
        if token in self.eos and not r.params.ignore_eos:
            return "stop"
        if self.stop and r.params.stop and self.stop(r):
            return "stop"
        return "length" if len(r.output) >= r.params.max_tokens else None

    # --- what is shown ------------------------------------------------------------------------------------------------

    def _tell(self, plan: Plan, given: list[tuple[Request, int]], planning: float, seconds: float) -> None:
        self.steps += 1
        t = self.totals
        t["generated_tokens"] += len(given)
        t["computed_tokens"] += plan.tokens
        t["preemptions"] += len(plan.preempted)
        t["hit_tokens"] += sum(r.hit for r in plan.admitted if r.preemptions == 0)
        events.emit(EngineStep(
            self.steps, plan.tokens, len(given), len(self.scheduler.running), len(self.scheduler.waiting),
            len(plan.admitted), len(plan.preempted), self.cache.available(), self.cache.blocks, planning, seconds))

    def snapshot(self) -> dict[str, Any]:
        """The engine's real state, as plain data: queue, running requests with their block tables, totals."""
        def row(r: Request) -> dict[str, Any]:
            return {"number": r.number, "state": r.state.value, "prompt": len(r.prompt), "computed": r.computed, "known": len(r.tokens),
                    "hit": r.hit, "preemptions": r.preemptions, "priority": r.priority, "namespace": r.namespace, "blocks": list(r.blocks)}
        return {"running": [row(r) for r in self.scheduler.running], "waiting": [row(r) for r in self.scheduler.waiting],
                "available": self.cache.available(), "blocks": self.cache.blocks, "block": self.cache.size, "totals": dict(self.totals)}


def make_cache(kind: str, model: Decoder, blocks: int, size: int) -> PrefixCache:
    """What a model of constant states (linear attention) leaves cannot be found block by block: it gets no reuse."""
    stateful = any(count(layer.mixer, model.spec.dim).state for layer in model.spec.layers)
    if stateful or kind == "none":
        return NoReuse(blocks, size)
    if kind == "chain":
        return HashChain(blocks, size)
    if kind in ("radix", "radix-cost"):
        return RadixTree(blocks, size, "cost" if kind == "radix-cost" else "lru")
    raise BadInput(f"prefix cache {kind!r} is not known", next="use one of chain, radix, radix-cost, none")


def choose_room(model: Decoder, config: EngineConfig) -> Choice:
    """Tokens of cache, with the reason: what was asked, or half of the free memory, or 64 full contexts."""
    if config.cache_tokens is not None:
        if config.cache_tokens < 1:
            raise BadInput(f"a cache of {config.cache_tokens} tokens is not possible", next="give --cache-tokens 4096 or so")
        return Choice(config.cache_tokens, "as asked")
    dtype = model.compute_dtype or model.embed.weight.dtype
    token = max(1, sum(cache_entries(layer.mixer) for layer in model.spec.layers) * dtype.itemsize)
    most = config.running * model.spec.context
    free = torch.cuda.mem_get_info()[0] if model.embed.weight.is_cuda else available_memory_bytes()
    if free is None or free // 2 // token >= most:
        return Choice(most, f"{config.running} full contexts of {model.spec.context} tokens, {most * token / 2**20:.0f} MiB")
    return Choice(max(config.block, free // 2 // token), f"half of the free memory, {free / 2**31:.1f} GiB, at {token} bytes a token")


__all__ = ["Engine", "EngineConfig", "State"]
