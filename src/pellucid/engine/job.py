"""A job: a few samples of a prompt that somebody waits for, and what reads their tokens.

The engine's thread puts what the readers make into the job's queue; the listener takes it out in its event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pellucid.engine.outputs import Chunk
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.engine.stopping import cut, early
from pellucid.tokenizers import Tokenizer


class Reader(Protocol):
    """Makes of one sample's tokens what its listener gets. Called in the engine's thread."""

    finish_reason: str | None
    """Set by `read` when nothing more will come, which may be before the engine would end the request (a stop text)."""

    def read(self, request: Request, tokens: list[int]) -> Any:
        """What `tokens`, the newest ones, complete; None: nothing yet. `request.finish_reason` tells whether they are the last."""


@dataclass(eq=False)
class Choice:
    """One sample and what reads it.  taken: when the engine took it up.  first, last: when its first and its latest token came."""

    request: Request
    reader: Reader
    taken: float | None = None
    first: float | None = None
    last: float | None = None


@dataclass(eq=False)
class Job:
    """`async for number, item in job` gives (choice's number, what its reader made)."""

    choices: list[Choice]
    loop: asyncio.AbstractEventLoop
    drop: Callable[[Job], None]
    request_id: str = ""
    arrived: float = field(default_factory=time.perf_counter)
    first: float | None = None  # when the first token came
    queue: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    expiry: asyncio.TimerHandle | None = None

    def put(self, item: tuple[int, Any] | Exception | None) -> None:
        """From the engine's thread; None is the end. A loop that has ended has no listener left."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:
            self.drop(self)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Any]]:
        while (item := await self.queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        """Ends it in whatever state it is; its cache is free after the step under way. Nothing where it has ended. In the event loop."""
        if self.expiry is not None:
            self.expiry.cancel()  # which would hold the job until then
        self.drop(self)

    def expire_after(self, seconds: float) -> None:
        """The listener hears `TimeoutError` and the work ends, unless it was done before."""
        def expire() -> None:
            self.cancel()
            self.queue.put_nowait(TimeoutError(f"the request took longer than {seconds:g} s"))

        self.expiry = self.loop.call_later(seconds, expire)

    @property
    def prompts(self) -> list[Request]:
        """The first request of each prompt."""
        return list({id(c.request.prompt): c.request for c in reversed(self.choices)}.values())

    @property
    def prompt_tokens(self) -> int:
        return sum(len(r.prompt) for r in self.prompts)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, those that the prefix cache held."""
        return sum(r.hit for r in self.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(len(c.request.output) for c in self.choices)


def per_token(request: Request) -> float:
    """Log-probability of an answer, per token."""
    return sum(request.logprobs) / max(1, len(request.logprobs))


def best_first(request: Request) -> tuple[bool, float]:
    """What the samples of a prompt are sorted by where only the best are returned: those that broke off come last."""
    return request.finish_reason == "error", -per_token(request)


class TextReader:
    """Tokens as `Chunk`s of text; a stop text ends the answer and is not part of it."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self.decoder, self.ends, self.stops = tokenizer.stream(), {*tokenizer.eos_ids, *params.stop_token_ids}, params.stop
        self.tokenizer, self.params = tokenizer, params
        self.finish_reason: str | None = None
        self._shown = 0  # characters
        self._text = ""
        self._tokens: list[int] = []
        self._longest = max((len(s) for s in params.stop), default=0)

    def read(self, request: Request, tokens: list[int]) -> Chunk | None:
        self._tokens += tokens
        self.finish_reason = request.finish_reason
        last = self.finish_reason is not None
        for token in tokens[:-1] if self.finish_reason == "stop" and tokens[-1] in self.ends else tokens:
            self._text += self.decoder.add(token)
        if last:
            self._text = cut(self._text + self.decoder.finish(), self.stops, early(self.tokenizer, request.output, self.params) - self._shown)
        end = len(self._text) if last else max(0, len(self._text) - self._longest)  # a stop text may be under way
        text, self._text = self._text[:end], self._text[end:]
        self._shown += end
        if not (text or last):
            return None
        chunk = Chunk(text, self._tokens, self.finish_reason)
        self._tokens = []
        return chunk
