"""What a server tells of itself: its models, how text becomes tokens, whether it lives, and its figures."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import Field

import pellucid
from pellucid.engine.past_calls import past_calls
from pellucid.errors import BadInput
from pellucid.server.conversation import Body, Message, Tool
from pellucid.server.errors import Json, Refused, told
from pellucid.server.jobs import Desk, check_variables
from pellucid.server.metrics import exposition
from pellucid.server.protocol import TemplateOptions
from pellucid.server.registry import Served, VectorModel
from pellucid.tokenizers.chat import variables as template_variables


class TokenizeRequest(Body):
    """A text, or a conversation as the chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: TemplateOptions | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int] = Field(max_length=1 << 20)


class Tokens(Body):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(Body):
    prompt: str


def add_about(app: FastAPI, desk: Desk) -> None:
    registry = desk.registry

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": pellucid.__version__}

    @app.get("/ping", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": next(iter(registry.models)), "pending": registry.pending}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics(request: Request) -> Response:
        return Response(exposition(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model.as_dict() for model in registry.models.values()]}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        return registry.find_any(model_id).as_dict()

    @app.post("/tokenize", response_model=Tokens)
    async def tokenize(body: TokenizeRequest) -> Response:
        model = registry.find_any(body.model or next(iter(registry.models)))
        if (body.prompt is None) == (body.messages is None):
            raise Refused(400, "give either prompt or messages", "prompt", "invalid_value")
        return await asyncio.to_thread(lambda: Json(tokens_of(model, body)))  # a text of megabytes must not hold others up

    @app.post("/detokenize", response_model=Text)
    async def detokenize(body: DetokenizeRequest) -> Response:
        model = registry.find_any(body.model or next(iter(registry.models)))
        if wrong := [i for i in body.tokens if not 0 <= i < model.vocab]:
            raise Refused(400, f"{wrong[0]} is no token of this model", "tokens", "invalid_value")
        return await asyncio.to_thread(lambda: Json({"prompt": model.tokenizer.decode(body.tokens)}))


def tokens_of(model: Served | VectorModel, body: TokenizeRequest) -> dict[str, Any]:
    if body.messages is not None:
        tools = [t.model_dump(exclude_none=True) for t in body.tools] if body.tools else None
        options = body.chat_template_kwargs or TemplateOptions()
        try:
            check_variables(options.model_extra or {}, template_variables(model.tokenizer.template(tools)))
            messages = past_calls(model.tokenizer, [m.plain() for m in body.messages], tools)
            ids = model.tokenizer.encode_chat(messages, tools, options.switch, body.add_generation_prompt, **options.model_extra or {})[0]
        except BadInput as error:
            raise told(error, "messages") from error
    else:
        prefix = model.tokenizer.prefix_ids if body.add_special_tokens else []
        ids = [*prefix, *model.tokenizer.encode(body.prompt or "")]
    words = [model.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": model.context, "tokens": ids, "token_strs": words}
