"""One generation at a time, in a thread of its own: the event loop stays free, the queue stays short.

A job is a few samples that run in one batch. Its pieces arrive in an asyncio queue as they are generated; cancelling it
ends the batch after the step under way. (The engine issue puts continuous batching in the place of `generate`.)
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pellucid import events
from pellucid.engine import LLM, Batch, Sample, SamplingParams
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

    sample: Sample
    decoder: Any
    parser: AnswerParser
    finish_reason: str | None = None

    def read(self, eos: list[int]) -> list[Piece]:
        """The pieces that the sample's latest token completes; sets `finish_reason` at the end."""
        s = self.sample
        ended = s.finish_reason == "stop" and s.tokens[-1] in eos
        text = "" if ended else self.decoder.add(s.tokens[-1])
        if s.finish_reason:
            text += self.decoder.finish()
        pieces = self.parser.feed(text)
        if self.parser.stopped:
            s.finish_reason = "stop"
        if s.finish_reason:
            pieces += self.parser.finish()
            self.finish_reason = s.finish_reason
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
        return sum(len(p) for p in {id(c.sample.prompt): c.sample.prompt for c in self.choices}.values())

    @property
    def completion_tokens(self) -> int:
        return sum(len(c.sample.tokens) for c in self.choices)


class Worker:
    """Runs jobs one after another; more than `waiting` of them in the queue are refused with 429."""

    def __init__(self, llm: LLM, waiting: int = 16):
        self.llm, self.waiting = llm, waiting
        llm.model.eval()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._open: dict[int, Job] = {}
        self._lock = threading.Lock()

    @property
    def pending(self) -> int:
        """Jobs that run or wait."""
        return len(self._open)

    def submit(self, prompts: list[list[int]], params: list[SamplingParams], parsers: list[dict[str, Any]]) -> Job:
        """A job of n samples for each prompt. Raises Refused (429) when the queue is full."""
        job = Job([], asyncio.get_running_loop())
        for prompt, p, options in zip(prompts, params, parsers):
            seed = secrets.randbits(62) if p.seed is None else p.seed
            job.choices += [Choice(Sample(prompt, p, seed + j), self.llm.tokenizer.stream(), AnswerParser(**options))
                            for j in range(p.n)]
        with self._lock:
            if len(self._open) > self.waiting:
                raise Refused(429, f"{len(self._open)} requests run or wait here; try again soon", code="queue_full",
                              headers={"Retry-After": "1"})
            self._open[id(job)] = job
        self._pool.submit(self._run, job)
        return job

    def _run(self, job: Job) -> None:
        began, end = time.perf_counter(), None
        try:
            self._generate(job)
        except Exception as error:  # whatever it is, the client must hear of it, and the next job must run
            end = error
        reasons = sorted({c.finish_reason or "cancelled" for c in job.choices})
        reason = "error" if end else "/".join(reasons)
        with self._lock:
            del self._open[id(job)]
        job.put(end or (Refused(503, "the server is shutting down") if "cancelled" in reasons else None))
        events.emit(Served(job.prompt_tokens, job.completion_tokens, time.perf_counter() - began, reason))

    def _generate(self, job: Job) -> None:
        if job.cancelled.is_set():
            return
        eos = self.llm.tokenizer.eos_ids
        numbers = {id(c.sample): i for i, c in enumerate(job.choices)}
        for fed in Batch(self.llm.model, [c.sample for c in job.choices], eos).run():
            for sample in fed:
                number = numbers[id(sample)]
                choice = job.choices[number]
                for piece in choice.read(eos):
                    job.put((number, piece))
                if choice.finish_reason:
                    job.put((number, None))
            if job.cancelled.is_set():
                return

    def close(self) -> None:
        """Ends what runs, drops what waits, and returns when the thread is done."""
        with self._lock:
            for job in self._open.values():
                job.cancelled.set()
        self._pool.shutdown(wait=True)
