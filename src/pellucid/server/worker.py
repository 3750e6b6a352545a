"""The engine in a thread of its own: the event loop stays free, all requests run together, the queue stays short.

A job is a few samples (choices); each is a request of the engine. Pieces of text arrive in an asyncio queue as they are
generated; cancelling a job ends its requests after the step under way, and their cache is free at once.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from pellucid import events
from pellucid.engine import LLM, SamplingParams
from pellucid.engine.core import Engine, EngineConfig
from pellucid.engine.request import Request
from pellucid.server.errors import Refused
from pellucid.server.parser import AnswerParser, Piece


@dataclass
class Served(events.Event):
    """A request was answered, or given up by its client ("cancelled")."""

    kind = "served"
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    finish_reason: str


@dataclass
class Choice:
    """One sample and what has been read of its text."""

    request: Request
    decoder: Any
    parser: AnswerParser
    finish_reason: str | None = None

    def read(self, token: int, reason: str | None, eos: set[int]) -> list[Piece]:
        """The pieces that a token completes; reason: why it is the last one. Sets `finish_reason` at the end."""
        text = "" if reason == "stop" and token in eos else self.decoder.add(token)
        if reason:
            text += self.decoder.finish()
        pieces = self.parser.feed(text)
        if self.parser.stopped:
            reason = "stop"
        if reason:
            pieces += self.parser.finish()
            self.finish_reason = reason
        return pieces


@dataclass
class Job:
    """`async for index, piece in job` gives (choice's number, Piece), and (number, None) when that choice is finished."""

    choices: list[Choice]
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def put(self, item: tuple[int, Piece | None] | Exception | None) -> None:
        """From the worker's thread; None is the end. A loop that has ended has no listener left."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:
            self.cancelled.set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | None]]:
        while (item := await self.queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    @property
    def prompt_tokens(self) -> int:
        return sum(len(p) for p in {id(c.request.prompt): c.request.prompt for c in self.choices}.values())

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, those that the prefix cache held (of each prompt for its first sample)."""
        return sum(first.hit for first in {id(c.request.prompt): c.request for c in reversed(self.choices)}.values())

    @property
    def completion_tokens(self) -> int:
        return sum(len(c.request.output) for c in self.choices)


class Worker:
    """Runs jobs together, as many requests at a time as the engine has places; when more than `waiting` jobs wait beside as many as
    can run, the next is refused with 429."""

    def __init__(self, llm: LLM, waiting: int = 16, config: EngineConfig | None = None):
        self.llm, self.waiting, self.config = llm, waiting, config or EngineConfig()
        llm.model.eval()
        self.engine = Engine(llm.model, llm.tokenizer.eos_ids, self.config)
        self._open: dict[int, tuple[Job, float]] = {}  # with the time when they came
        self._new: list[Job] = []
        self._held: dict[Request, list[Choice]] = {}  # further samples of a prompt, until its first has left it in the cache
        self._of: dict[Request, tuple[Job, int]] = {}
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Jobs that run or wait."""
        return len(self._open)

    def submit(self, prompts: list[list[int]], params: list[SamplingParams], parsers: list[dict[str, Any]]) -> Job:
        """A job of n samples for each prompt. Raises Refused (429) when the queue is full, BadInput for what can never run."""
        job = Job([], asyncio.get_running_loop())
        for prompt, p, options in zip(prompts, params, parsers):
            seed = secrets.randbits(62) if p.seed is None else p.seed
            job.choices += [Choice(Request(prompt, p, seed + j), self.llm.tokenizer.stream(), AnswerParser(**options))
                            for j in range(p.n)]
        for choice in job.choices:
            self.engine.scheduler.check(choice.request)
        with self._wake:
            if self._closing:
                raise Refused(503, "the server is shutting down")
            if len(self._open) >= self.config.running + self.waiting:
                raise Refused(429, f"{len(self._open)} requests run or wait here; try again soon", code="queue_full",
                              headers={"Retry-After": "1"})
            self._open[id(job)] = job, time.perf_counter()
            self._new.append(job)
            self._wake.notify()
        return job

    # --- the engine's thread --------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._new or self.engine.busy or self._closing):
                    self._wake.wait()
                new, self._new = self._new, []
                if self._closing and not self._open:
                    return
            try:
                for job in new:
                    self._start(job)
                self._drop_cancelled()
                if self.engine.busy:
                    for request, tokens in self.engine.step():
                        self._read(request, tokens)
            except Exception as error:  # whatever it is, the clients must hear of it, and the next ones must be served
                self._fail(error)

    def _start(self, job: Job) -> None:
        """Samples of one prompt: the first at once, the others when the prompt is in the cache."""
        first: dict[int, Request] = {}
        for number, choice in enumerate(job.choices):
            self._of[choice.request] = job, number
            leader = first.setdefault(id(choice.request.prompt), choice.request)
            if leader is choice.request:
                self.engine.add(choice.request)
            else:
                self._held.setdefault(leader, []).append(choice)

    def _read(self, request: Request, tokens: list[int]) -> None:
        job, number = self._of[request]
        choice, eos = job.choices[number], self.engine.eos
        for follower in self._held.pop(request, []):
            self.engine.add(follower.request)
        for i, token in enumerate(tokens):
            reason = request.finish_reason if i == len(tokens) - 1 else None
            for piece in choice.read(token, reason, eos):
                job.put((number, piece))
            if choice.finish_reason:
                break
        if choice.finish_reason:
            self.engine.cancel(request)  # where a stop text ended it; nothing where the engine did
            job.put((number, None))
            if all(c.finish_reason for c in job.choices):
                self._end(job, None)

    def _drop_cancelled(self) -> None:
        for job, _ in list(self._open.values()):
            if job.cancelled.is_set() and id(job) in self._open and job not in self._new:
                self._end(job, Refused(503, "the server is shutting down"))

    def _end(self, job: Job, error: Exception | None) -> None:
        """The job's requests leave the engine; its reader hears the end."""
        for choice in job.choices:
            self._of.pop(choice.request, None)
            self._held.pop(choice.request, None)
            self.engine.cancel(choice.request)
        with self._wake:
            _, began = self._open.pop(id(job))
        reasons = "/".join(sorted({c.finish_reason or "cancelled" for c in job.choices}))
        reason = "error" if error and not isinstance(error, Refused) else reasons
        events.emit(Served(job.prompt_tokens, job.completion_tokens, time.perf_counter() - began, reason))
        job.put(error)  # last: who has the answer finds its record

    def _fail(self, error: Exception) -> None:
        """Everybody in the engine hears of it; a new engine serves those who come."""
        with self._wake:
            jobs = [job for job, _ in self._open.values() if job not in self._new]
        self.engine = Engine(self.llm.model, self.llm.tokenizer.eos_ids, self.config)
        for job in jobs:
            self._end(job, error)

    def close(self) -> None:
        """Ends what runs, drops what waits, and returns when the thread is done."""
        with self._wake:
            self._closing = True
            for job, _ in self._open.values():
                job.cancelled.set()
            self._wake.notify()
        self._thread.join()
