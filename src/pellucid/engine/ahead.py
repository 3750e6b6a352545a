"""Steps on a GPU that begin before the last one's tokens are known on the host: its Python and the GPU work side by side.

A request's next token is where the step that draws it leaves it, on the GPU: the next step reads it there (`gpu_pass.SOURCE`). So while
one step runs, the next is planned and launched as if nobody ended with it; then its tokens are read. Who has ended got a row too many,
which is thrown away. What a request is given does not change: a draw is a function of its seed and how many tokens it has.

Only while all requests are plain: what follows a token on the host (penalties, forms of answers, drafts, prompt scores, adapters) makes
steps wait for it. Mini-sglang and vLLM call the idea overlap or asynchronous scheduling.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pellucid.engine.request import Request, State
from pellucid.engine.runner import Runner
from pellucid.engine.scheduler import Plan
from pellucid.engine.transfer import Coming, to_device

if TYPE_CHECKING:
    from pellucid.engine.core import Engine

UNKNOWN = -1
"""Stands among a request's tokens while the host does not know it yet."""


@dataclass
class Flight:
    """A step that was launched. requests: to whom it gives a token each; coming: these tokens.  planning: seconds of the scheduler."""

    plan: Plan
    requests: Sequence[Request]
    coming: Coming | None
    logprobs: Coming | None
    planning: float


class Ahead:
    """Takes an engine's steps, as long as it can (`able`)."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.flight: Flight | None = None
        self.special: set[Request] = set()  # those in the engine that steps must wait for
        runner = engine.runner
        self.possible = type(runner).step is Runner.step and runner.gpu is not None and engine.proposer is None and engine.scheduler.pace is None

    def note(self, r: Request) -> None:
        """A request has come."""
        p = r.params
        if (p.penalised or p.logit_bias or r.constraint is not None or p.min_tokens or p.top or r.adapter is not None
                or p.prompt_logprobs is not None):
            self.special.add(r)

    @property
    def able(self) -> bool:
        """Whether the next step is for `step`: one is on its way, or the requests allow it."""
        return self.flight is not None or (self.possible and self._plain)

    @property
    def _plain(self) -> bool:
        return not self.special and self.engine.runner.observer is None and self.engine.runner.gpu is not None

    def step(self) -> tuple[Plan, list[tuple[Request, list[int]]], float]:
        """The plan of the step that is due, what it gave, and how long planning took."""
        engine, flight = self.engine, self.flight or self._launch({}, ())
        asked = [(i, r) for i, r in enumerate(flight.requests) if r.state is State.RUNNING]
        for _, r in asked:
            r.tokens.append(UNKNOWN)
        engine.scheduler.done(flight.plan)
        self.flight = self._follow(dict((r, i) for i, r in asked))
        return flight.plan, self._land(flight, asked), flight.planning

    def _follow(self, sources: dict[Request, int]) -> Flight | None:
        """The next step, if it may begin now. It takes nobody's blocks away: who ends meanwhile gives some back."""
        scheduler = self.engine.scheduler
        room = len(scheduler.running) * len(scheduler.cache.windows)
        if not self._plain or scheduler.cache.available() < room:
            return None
        ending = {r for r in sources if r.generated >= r.params.max_tokens}
        if len(ending) == len(scheduler.running) and not scheduler.waiting:
            return None
        return self._launch({r: i for r, i in sources.items() if r not in ending}, ending)

    def _launch(self, sources: dict[Request, int], ending: set[Request] | tuple[()]) -> Flight:
        engine, began = self.engine, time.perf_counter()
        plan = engine.scheduler.plan(ending)
        planning = time.perf_counter() - began
        logits = engine.runner.step(plan, sources)
        requests, gpu = logits.requests, engine.runner.gpu
        if not requests or gpu is None:
            return Flight(plan, (), None, None, planning)
        whole = logits.whole
        if engine.known is not None:
            whole[:, engine.known :] = -torch.inf
        sampler = engine._sampler(list(requests), whole.device)
        tokens, logprobs = sampler(whole, to_device(torch.tensor([r.generated for r in requests]), whole.device), check=False)
        gpu.drawn[: len(tokens)].copy_(tokens)
        return Flight(plan, requests, Coming(tokens), None if logprobs is None else Coming(logprobs), planning)

    def _land(self, flight: Flight, asked: list[tuple[int, Request]]) -> list[tuple[Request, list[int]]]:
        """The tokens take their places."""
        if flight.coming is None:
            return []
        engine = self.engine
        given: list[tuple[Request, list[int]]] = []
        tokens = flight.coming.read().tolist()
        logprobs = None if flight.logprobs is None else flight.logprobs.read().tolist()
        for i, r in asked:
            token = tokens[i]
            if token < 0:
                r.tokens.pop()
                engine.fail(r)
                given.append((r, []))
                continue
            r.tokens[-1] = token
            if reason := engine._ended(r, token):
                engine.ended[r] = reason
            if r.params.top is not None and logprobs is not None:
                r.logprobs.append(logprobs[i])
                r.tops.append([])
            given.append((r, [token]))
        return given

    def forget(self, r: Request) -> None:
        self.special.discard(r)

    def rest(self) -> None:
        """Nobody is left: what is on its way is for nobody."""
        self.flight = None
