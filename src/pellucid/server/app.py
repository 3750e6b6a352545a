"""The OpenAI-compatible face of an `LLM`: /v1/chat/completions, /v1/completions, /v1/models, /health."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

import pellucid
from pellucid.engine import LLM
from pellucid.engine.batch import check_length
from pellucid.engine.core import EngineConfig
from pellucid.errors import BadInput
from pellucid.server import errors
from pellucid.server.answers import (
    chat_answer,
    chat_envelope,
    chat_events,
    sse,
    text_answer,
    text_envelope,
    text_events,
)
from pellucid.server.errors import Refused, told
from pellucid.server.guard import Guard
from pellucid.server.parser import THINK
from pellucid.server.protocol import ChatRequest, CompletionRequest, Sampling
from pellucid.server.worker import Job, Worker

T = TypeVar("T")


def create_app(llm: LLM, name: str, *, api_key: str | None = None, waiting: int = 16, max_body: int = 4 << 20,
               engine: EngineConfig | None = None) -> FastAPI:
    """An ASGI application that serves `llm` under the model name `name`.

    api_key: what clients must send as bearer token; None: nothing.  waiting: requests that may wait beside those that run; more get
    429.  max_body: bytes of the largest request.  engine: how many run at a time, the cache, and so on.
    """
    worker = Worker(llm, waiting, engine)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(title="pellucid", version=pellucid.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.worker = worker
    app.add_middleware(Guard, api_key=api_key, max_body=max_body)
    errors.install(app)
    add_about(app, worker, name)
    add_completions(app, worker, name)
    return app


def add_about(app: FastAPI, worker: Worker, name: str) -> None:
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "pellucid",
             "max_model_len": worker.llm.context}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "pending": worker.pending}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        check_model(model_id, name)
        return model


def add_completions(app: FastAPI, worker: Worker, name: str) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        check_model(body.model, name)
        messages, tools, thinking = body.for_template()
        try:
            ids = worker.llm.chat_ids(messages, tools, thinking)
        except BadInput as error:
            raise told(error, "messages") from error
        opens = worker.llm.tokenizer.decode(ids[-8:]).rstrip().endswith(THINK)
        job = submit(worker, body, [ids], {"thinking": opens, "tools": body.reads_calls})
        envelope = chat_envelope(name)
        if body.stream:
            return EventStream(chat_events(job, envelope, wants_usage(body)), job)
        return JSONResponse(await unless_gone(chat_answer(job, envelope), job, request))

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model, name)
        prompts = [prompt_ids(worker.llm, prompt) for prompt in body.prompts]
        job = submit(worker, body, prompts, {"plain": True})
        envelope = text_envelope(name)
        if body.stream:
            return EventStream(text_events(job, envelope, wants_usage(body)), job)
        return JSONResponse(await unless_gone(text_answer(job, envelope), job, request))


def check_model(asked: str, name: str) -> None:
    if asked != name:
        raise Refused(404, f"the model {asked!r} does not exist; this server has {name!r}", "model", "model_not_found")


def wants_usage(body: Sampling) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def prompt_ids(llm: LLM, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return llm.tokenizer.encode(prompt)
    if wrong := [i for i in prompt if not 0 <= i < llm.model.spec.vocab]:
        raise Refused(400, f"{wrong[0]} is no token of this model (0 to {llm.model.spec.vocab - 1})", "prompt", "invalid_value")
    return prompt


def submit(worker: Worker, body: Sampling, prompts: list[list[int]], options: dict[str, Any]) -> Job:
    """The request as a job in the queue; what cannot fit the context is refused before."""
    context = worker.llm.context
    try:
        params = [body.params(max(1, context - len(ids))) for ids in prompts]
        for ids, p in zip(prompts, params):
            check_length(len(ids), p.max_tokens, context)
    except BadInput as error:
        raise told(error, "messages" if isinstance(body, ChatRequest) else "prompt", "context_length_exceeded") from error
    try:
        return worker.submit(prompts, params, [options | {"stops": body.stops}] * len(prompts))
    except BadInput as error:
        raise told(error, "max_tokens", "context_length_exceeded") from error


async def unless_gone(answer: Awaitable[T], job: Job, request: Request) -> T:
    """The answer; a client that leaves meanwhile ends the generation."""
    task = asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait({task}, timeout=0.2))[0]:
            if await request.is_disconnected():
                raise Refused(499, "the client has gone")
        return task.result()
    finally:
        job.cancelled.set()
        task.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; however the response ends, the job ends too."""

    def __init__(self, parts: AsyncIterator[str], job: Job):
        super().__init__(with_errors(parts), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancelled.set()


async def with_errors(parts: AsyncIterator[str]) -> AsyncIterator[str]:
    """A failure behind the first part can no longer become a status: it is sent as an event."""
    try:
        async for part in parts:
            yield part
    except Refused as refused:
        yield sse(refused.body)
    except Exception as error:
        yield sse(Refused(500, f"this should not have happened: {type(error).__name__}").body)
