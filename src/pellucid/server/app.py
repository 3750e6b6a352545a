"""The OpenAI-compatible face of one or several models.

    /v1/chat/completions  /v1/completions  /v1/responses          text           (here, and server/responses.py)
    /v1/embeddings  /v1/rerank  /v1/score                         vectors        (server/vectors.py)
    /v1/models  /tokenize  /detokenize  /health  /metrics         about          (server/about.py)
    /v1/load_lora_adapter  /v1/unload_lora_adapter                adapters       (server/adapters.py)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response

import pellucid
from pellucid.engine import LLM
from pellucid.engine.config import EngineConfig
from pellucid.server import errors
from pellucid.server.about import add_about
from pellucid.server.access import Access
from pellucid.server.adapters import add_adapters, add_all
from pellucid.server.answers import Envelope, chat_answer, chat_events, text_answer, text_events
from pellucid.server.cors import add_cors, check_origins
from pellucid.server.errors import Json, JsonRoute, Refused
from pellucid.server.guard import Guard
from pellucid.server.jobs import Desk, EventStream, Limits, unless_gone
from pellucid.server.protocol import ChatRequest, CompletionRequest, StreamOptions
from pellucid.server.registry import Registry, Served, VectorModel
from pellucid.server.responses import add_responses
from pellucid.server.vectors import add_vectors

# Newer FastAPI sends spans of its own as soon as OpenTelemetry is there; ours stand in server/access.py.
QUIET: dict[str, Any] = {"telemetry": {"tracing": False, "metrics": False, "logs": False}} if "telemetry" in signature(FastAPI).parameters else {}
Models = LLM | VectorModel | Mapping[str, LLM | VectorModel]


def create_app(
    llm: Models, name: str = "model", *, api_key: str | Sequence[str] | None = None, waiting: int = 16,
    max_body: int = 4 << 20, max_tokens: int | None = None, timeout: float | None = None, engine: EngineConfig | None = None,
    form: str | None = None, tracing: bool = False, adapters: Path | None = None, cors: Sequence[str] = (),
    recommended: bool = True,
) -> FastAPI:
    """An ASGI application that serves `llm` under the model name `name`, or several by their names.

    api_key: what clients must send as bearer token, one or several; None: nothing. Those of one key share cached prefixes.
    waiting: requests that may wait beside those that run; more get 429.  max_body: bytes of the largest request.
    max_tokens, timeout: tokens and seconds of one answer.  engine: how many run at a time, the cache, and so on.
    form: of tool calls; by default what the chat template shows.  tracing: OpenTelemetry spans.
    adapters: folder whose LoRA adapters are served, those that lie there now and those that clients ask to load later.
    recommended: settings that a request leaves out are those of the checkpoint's generation_config.json, if it has any (server/defaults.py).
    cors: origins (https://example.org) whose pages in browsers may call the server; "*", with an API key only: any.
    """
    check_origins(cors, bool(api_key))
    limits = Limits(waiting, max_body, max_tokens, timeout)
    desk = Desk(Registry(dict(llm) if isinstance(llm, Mapping) else {name: llm}, waiting, engine, form, recommended), limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(desk.registry.close)

    app = FastAPI(title="pellucid", version=pellucid.__version__, lifespan=lifespan, **QUIET, docs_url=None, redoc_url=None,
                  default_response_class=Json, responses={"default": {"description": "An error", "model": errors.ErrorBody}})
    app.state.desk = desk
    app.router.route_class = JsonRoute
    app.add_middleware(Guard, api_keys=[api_key] if isinstance(api_key, str) else list(api_key or ()), max_body=max_body)
    if cors:
        add_cors(app, cors)
    app.add_middleware(Access, tracing=tracing)
    errors.install(app)
    add_about(app, desk)
    add_completions(app, desk)
    add_responses(app, desk)
    add_vectors(app, desk)
    add_adapters(app, desk, adapters)
    if adapters is not None:
        add_all(desk, adapters)
    return app


def add_completions(app: FastAPI, desk: Desk) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        model, job = await desk.chat(body, request)
        envelope = Envelope(body.model, "chat.completion", "chatcmpl", model.tokenizer, bool(body.return_token_ids))
        if body.stream:
            return EventStream(chat_events(job, envelope, body.stream_options or StreamOptions()), job)
        return Json(await unless_gone(chat_answer(job, envelope), job, request))

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        model = desk.registry.find(body.model)
        prompts = await asyncio.to_thread(lambda: [prompt_ids(model, prompt, body.add_special_tokens is not False) for prompt in body.prompts])
        job = await desk.start(model, body, prompts, request, {"plain": True, "stops": body.stops})
        silent = len(model.tokenizer.prefix_ids) if isinstance(body.prompts[0], str) and body.add_special_tokens is not False else 0
        envelope = Envelope(body.model, "text_completion", "cmpl", model.tokenizer, bool(body.return_token_ids), silent)
        echo = [prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt) for prompt in body.prompts] if body.echo else None
        if body.stream:
            return EventStream(text_events(job, envelope, body.stream_options or StreamOptions(), echo, body.max_tokens == 0), job)
        return Json(await unless_gone(text_answer(job, envelope, body, echo), job, request))


def prompt_ids(model: Served, prompt: str | list[int], special: bool = True) -> list[int]:
    """special: a text stands behind what the tokenizer puts before one."""
    if isinstance(prompt, str):
        return model.encode(prompt, special)
    if wrong := [i for i in prompt if not 0 <= i < model.llm.model.spec.vocab]:
        most = model.llm.model.spec.vocab - 1
        raise Refused(400, f"{wrong[0]} is no token of this model (0 to {most})", "prompt", "invalid_value")
    return list(prompt)
