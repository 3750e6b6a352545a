"""`AsyncLLM`: the engine in a thread of its own, for programs of many tasks. The server stands on it.

    async with AsyncLLM("runs/grow/model") as llm:
        async for chunk in llm.stream("Once upon a time", SamplingParams(max_tokens=64)):
            print(chunk.text, end="")

All requests run together (continuous batching). A job is a few samples (choices), each a request of the engine; what a
reader makes of their tokens arrives in an asyncio queue as it is generated. Leaving the loop, or cancelling the task, ends
the job's requests after the step under way, and their cache is free at once.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from pellucid import events
from pellucid.engine.adapters import Adapter
from pellucid.engine.batch import check_length
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.fleet import Fleet
from pellucid.engine.job import Choice, Job, Reader, TextReader, best_first
from pellucid.engine.latency import Latencies
from pellucid.engine.llm import LLM, Prompt
from pellucid.engine.outputs import Chunk, Completion, RequestOutput
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request, State
from pellucid.errors import PellucidError
from pellucid.nn import Decoder
from pellucid.parallel import RankDied
from pellucid.tokenizers import Tokenizer

T = TypeVar("T")


class QueueFull(PellucidError):
    """As many requests run and wait as may."""


class Closed(PellucidError):
    """The engine takes no more requests."""


@dataclass
class Served(events.Event):
    """A request was answered, or given up by its client ("cancelled").  first_token: seconds until it, None without one."""

    kind = "served"
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    finish_reason: str
    cached_tokens: int = 0
    first_token: float | None = None
    model: str = ""
    request_id: str = ""


class AsyncLLM:
    """`model`: what `LLM` takes, or an `LLM`.  config: how many run at a time, the cache, and so on.  waiting: requests that may wait
    beside as many as can run; more are refused with `QueueFull`. None: no limit."""

    def __init__(
        self, model: str | os.PathLike[str] | Decoder | LLM, tokenizer: Tokenizer | None = None, *, config: EngineConfig | None = None,
        waiting: int | None = None, name: str = "", **options: Any,
    ):
        self.llm = model if isinstance(model, LLM) else LLM(model, tokenizer, **options)
        self.config, self.waiting, self.name = config or EngineConfig(), waiting, name
        self.latencies = Latencies(self.llm.context)
        self.reasons: dict[str, int] = {}  # how many samples ended for which reason
        self.llm.model.eval()
        self.dead: RankDied | None = None  # the process that died, where several work
        self.when_dead: Callable[[], None] | None = None
        self.engine = self._new_engine()
        self._past: dict[str, int] = {}  # totals of engines that failed
        self._open: set[Job] = set()
        self._new: list[Job] = []
        self._dropped: list[Job] = []
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._of: dict[Request, tuple[Job, int]] = {}
        self._queued: list[Request] = []
        self._closing = False
        self._checking = threading.Lock()
        self._wake = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    # --- the face -----------------------------------------------------------------------------------------------------

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, *, namespace: str = "",
                       priority: int = 0) -> AsyncIterator[RequestOutput]:
        """The output after every step that brought text: the same object, which grows. Cancelling ends the work."""
        p = params or SamplingParams()
        ids = self.llm._ids(prompt)
        check_length(len(ids), p.max_tokens, self.llm.context)
        output = RequestOutput(ids, [Completion(i, "", [], None if p.top is None else [], "") for i in range(p.samples)])
        told = p if p.samples == p.n or p.top is not None else replace(p, logprobs=0)  # the best are chosen by them
        job = await self.submit([ids], [told], lambda q, _: TextReader(self.llm.tokenizer, q), namespace=namespace, priority=priority)
        try:
            async for number, chunk in job:
                completion, request = output.outputs[number], job.choices[number].request
                completion.text += chunk.text
                completion.token_ids += chunk.token_ids
                completion.finish_reason = chunk.finish_reason or ""
                if completion.logprobs is not None:
                    completion.logprobs = request.logprobs[: len(completion.token_ids)]
                if p.samples == p.n:
                    yield output
            if p.samples > p.n:
                order = sorted(range(p.samples), key=lambda i: best_first(job.choices[i].request))[: p.n]
                output.outputs = [replace(output.outputs[i], index=rank) for rank, i in enumerate(order)]
                yield output
        finally:
            job.cancel()

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> AsyncIterator[Chunk]:
        """One sample's answer piece by piece, whole characters only; the last piece carries `finish_reason`."""
        p = replace(params or SamplingParams(), n=1)
        ids = self.llm._ids(prompt)
        check_length(len(ids), p.max_tokens, self.llm.context)
        job = await self.submit([ids], [p], lambda q, _: TextReader(self.llm.tokenizer, q), **options)
        try:
            async for _, chunk in job:
                yield chunk
        finally:
            job.cancel()

    def chat(self, messages: list[dict[str, Any]], params: SamplingParams | None = None, *, tools: list[dict[str, Any]] | None = None,
             thinking: bool | None = None) -> AsyncIterator[RequestOutput]:
        """`generate` for a conversation, through the tokenizer's chat template."""
        return self.generate(self.llm.chat_ids(messages, tools, thinking), params)

    async def embed(self, texts: Sequence[str]) -> Tensor:
        """(N, D), between two steps of the engine."""
        return await self.call(lambda: self.llm.embed(texts))

    async def score(self, first: Prompt | Sequence[Prompt], second: Sequence[Prompt], *, how: str = "yes-no") -> list[float]:
        """How well each of `second` fits its `first`; see `LLM.score`. Between two steps of the engine."""
        return await self.call(lambda: self.llm.score(first, second, how=how))

    async def call(self, function: Callable[[], T]) -> T:
        """function() in the engine's thread, between two steps: it may read or change what the engine holds."""
        return await asyncio.wrap_future(self.call_soon(function))

    def call_soon(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._wake:
            if self._closing or self.dead is not None:
                raise self.dead or Closed("the engine is shutting down")
            self._calls.append((function, future))
            self._wake.notify()
        return future

    @property
    def pending(self) -> int:
        """Jobs that run or wait."""
        return len(self._open)

    @property
    def longest(self) -> int:
        """Tokens of the longest request that can run, alone."""
        return self.engine.scheduler.longest

    @property
    def totals(self) -> dict[str, int]:
        """The engine's, since the start."""
        return {name: value + self._past.get(name, 0) for name, value in self.engine.totals.items()}

    async def submit(
        self, prompts: list[list[int]], params: list[SamplingParams], reader: Callable[[SamplingParams, int], Reader], *,
        namespace: str = "", priority: int = 0, adapter: Adapter | None = None, request_id: str = "",
    ) -> Job:
        """A job of n samples for each prompt, each read by what `reader(params, number)` makes. Raises QueueFull or Closed, and BadInput
        for what can never run."""
        job = Job([], asyncio.get_running_loop(), self._drop, request_id)
        for prompt, p in zip(prompts, params, strict=True):
            seed = secrets.randbits(62) if p.seed is None else p.seed
            for j in range(p.samples):
                request = Request(prompt, p, seed + j, namespace, priority, adapter)
                job.choices.append(Choice(request, reader(p, len(job.choices))))
        requests = [choice.request for choice in job.choices]
        if any(p.structured for p in params):  # a form may take a while to compile
            await asyncio.to_thread(self._check, requests)
        else:
            self._check(requests)
        with self._wake:
            if self.dead is not None:
                raise self.dead
            if self._closing:
                raise Closed("the engine is shutting down")
            if self.waiting is not None and len(self._open) >= self.config.running * len(self.llm.layout.entries) + self.waiting:
                raise QueueFull(f"{len(self._open)} requests run or wait here", next="try again soon")
            self._open.add(job)
            self._new.append(job)
            self._wake.notify()
        return job

    def close(self) -> None:
        """Ends what runs, drops what waits, and returns when the thread is done."""
        with self._wake:
            self._closing = True
            self._dropped += self._open
            self._wake.notify()
        self._thread.join()
        self.llm.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await asyncio.to_thread(self.close)

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _new_engine(self) -> Engine:
        engine = self.llm.engine(config=self.config)
        if isinstance(engine, Fleet):
            engine.on_death = self._die
        return engine

    def _check(self, requests: list[Request]) -> None:
        with self._checking:
            for request in requests:
                self.engine.check(request)

    def _drop(self, job: Job) -> None:
        with self._wake:
            if job in self._open:
                self._dropped.append(job)
                self._wake.notify()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._new or self._dropped or self._calls or self.engine.busy or self._closing or self.dead):
                    self._wake.wait()
                new, self._new = self._new, []
                dropped, self._dropped = self._dropped, []
                calls, self._calls = self._calls, []
            if self.dead is not None:
                self._fail(self.dead)
                for _, future in calls + self._calls:
                    if future.set_running_or_notify_cancel():
                        future.set_exception(self.dead)
                return
            try:
                for job in new:
                    self._start(job)
                for job in dropped:
                    self._end(job, Closed("the engine is shutting down") if self._closing else None)
                while calls:
                    answer(*calls.pop(0))
                if self.engine.busy:
                    self._step()
            except RankDied as error:
                self._die(error)
            except Exception as error:  # whatever it is, the clients must hear of it, and the next ones must be served
                self._fail(error)
            with self._wake:
                self._calls = calls + self._calls  # that a failure has kept from their answers
                if self._closing and not (self._open or self._calls):
                    return

    def _start(self, job: Job) -> None:
        """Samples of one prompt: the first at once, the others when the prompt is in the cache."""
        first: dict[int, Request] = {}
        for number, choice in enumerate(job.choices):
            self._of[choice.request] = job, number
            leader = first.setdefault(id(choice.request.prompt), choice.request)
            self.engine.add(choice.request, behind=None if leader is choice.request else leader)
            self._queued.append(choice.request)

    def _step(self) -> None:
        began, before = time.perf_counter(), self.engine.totals["computed_tokens"]
        given = self.engine.step()
        now = time.perf_counter()
        if computed := self.engine.totals["computed_tokens"] - before:
            self.latencies.step.observe(computed)
        if self._queued:
            for request in self._queued:
                if request.state is not State.WAITING and request in self._of:
                    job, number = self._of[request]
                    job.choices[number].taken = began
                    self.latencies.queued.observe(began - job.arrived)
            self._queued = [r for r in self._queued if r.state is State.WAITING]
        for request, tokens in given:
            self._read(request, tokens, now)

    def _read(self, request: Request, tokens: list[int], now: float) -> None:
        job, number = self._of[request]
        choice = job.choices[number]
        self._time(job, choice, len(tokens), now)
        item = choice.reader.read(request, tokens)
        if item is not None:
            job.put((number, item))
        if reason := choice.reader.finish_reason:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            self.latencies.ended(len(request.prompt), request.generated, request.params.max_tokens, choice.taken, choice.first, choice.last)
            self.engine.cancel(request)  # where a stop text ended it; nothing where the engine did
            if all(c.reader.finish_reason for c in job.choices):
                self._end(job, None)

    def _time(self, job: Job, choice: Choice, tokens: int, now: float) -> None:
        if not tokens:  # another process has refused it
            return
        if job.first is None:
            job.first = now
            self.latencies.first.observe(now - job.arrived)
        if choice.last is None:
            choice.first = now
        else:
            self.latencies.between.observe((now - choice.last) / tokens, tokens)
        choice.last = now

    def _end(self, job: Job, error: Exception | None) -> None:
        """The job's requests leave the engine; its reader hears the end."""
        if job not in self._open:
            return
        for choice in job.choices:
            self._of.pop(choice.request, None)
            self.engine.cancel(choice.request)
        with self._wake:
            self._open.discard(job)
        seconds = time.perf_counter() - job.arrived
        reasons = {c.reader.finish_reason or "cancelled" for c in job.choices}
        if "cancelled" not in reasons:
            self.latencies.whole.observe(seconds)
            for first in job.prompts:
                self.latencies.samples.observe(first.params.samples)
                self.latencies.longest.observe(max(c.request.generated for c in job.choices if c.request.prompt is first.prompt))
        else:
            self.reasons["abort"] = self.reasons.get("abort", 0) + sum(c.reader.finish_reason is None for c in job.choices)
        reason = "error" if error and not isinstance(error, Closed) else "/".join(sorted(reasons))
        events.emit(Served(job.prompt_tokens, job.completion_tokens, seconds, reason, job.cached_tokens,
                           None if job.first is None else job.first - job.arrived, self.name, job.request_id))
        job.put(error)  # last: who has the answer finds its record

    def _fail(self, error: Exception) -> None:
        """Everybody in the engine hears of it; a new engine serves those who come."""
        with self._wake:
            jobs = [job for job in self._open if job not in self._new or self.dead]
        if self.dead is None:
            self._past = self.totals
            self.engine, self._queued = self._new_engine(), []
        for job in jobs:
            self._end(job, error)

    def _die(self, error: RankDied) -> None:
        """Of several processes one has died: nobody can be served any more. From any thread."""
        with self._wake:
            self.dead = self.dead or error
            self._wake.notify()
            tell, self.when_dead = self.when_dead, None  # once: the others end with it
        if tell is not None:
            tell()


def answer(function: Callable[[], Any], future: Future[Any]) -> None:
    """The future gets what the function gives or raises."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
