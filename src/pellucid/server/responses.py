"""OpenAI's responses: /v1/responses, whole or as a stream of events, with function tools and conversations kept for a while.

A conversation is kept (unless `store` is false) among the last few hundred, in memory: `previous_response_id` goes on with it,
GET and DELETE /v1/responses/{id} read and forget it. A server that restarts has forgotten all of them, and says so.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import Discriminator, Field, Tag, model_validator

from pellucid.engine.async_llm import Job
from pellucid.server.answers import joined, reader_of, sse, updates, whole
from pellucid.server.errors import Json, Refused, refusal_of
from pellucid.server.formats import Piece
from pellucid.server.jobs import Desk, EventStream, unless_gone
from pellucid.server.protocol import (
    Body,
    ChatRequest,
    Effort,
    FunctionCall,
    JsonSchema,
    Message,
    NamedFunction,
    NamedTool,
    Part,
    ResponseFormat,
    Tool,
    ToolCall,
)

KEPT = 512  # conversations
KEPT_CHARACTERS = 64 << 20  # of all of them


class TextPart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Field(None, max_length=0)
    logprobs: list[Any] | None = None


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputResult(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextPart]
    id: str | None = None
    status: str | None = None


class InputThought(Body):
    type: Literal["reasoning"]
    summary: list[Any] = []
    content: list[dict[str, Any]] | None = None
    encrypted_content: None = None
    id: str | None = None
    status: str | None = None


def kind_of(item: Any) -> str:
    found = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return found if isinstance(found, str) else "message"


Item = Annotated[
    Annotated[InputMessage, Tag("message")] | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")] | Annotated[InputThought, Tag("reasoning")], Discriminator(kind_of)]


class FunctionTool(Body):
    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedChoice(Body):
    type: Literal["function"]
    name: str


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextOptions(Body):
    format: PlainFormat | SchemaFormat | None = Field(None, discriminator="type")
    verbosity: Literal["medium"] | None = None


class Reasoning(Body):
    effort: Effort | None = None
    summary: None = None


class StreamObfuscation(Body):
    include_obfuscation: bool = False


class ResponsesRequest(Body):
    model: str
    input: str | list[Item] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    tools: list[FunctionTool] | None = Field(None, max_length=256)
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: StreamObfuscation | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    include: list[str] | None = Field(None, max_length=0)
    metadata: dict[str, str] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)

    @model_validator(mode="after")
    def something(self) -> ResponsesRequest:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream true")
        return self

    def as_chat(self, before: list[Message]) -> ChatRequest:
        """The same request as a chat completion, behind the messages of the conversation so far."""
        form = self.text.format if self.text else None
        options: dict[str, Any] = {name: getattr(self, name) for name in (
            "model", "temperature", "top_p", "parallel_tool_calls", "user", "priority", "cache_salt")}
        if self.tools:
            options["tools"] = [Tool(type="function", function=t.model_dump(exclude={"type"})) for t in self.tools]  # type: ignore[arg-type]
        choice = self.tool_choice
        options["tool_choice"] = NamedTool(type="function", function=NamedFunction(name=choice.name)) if isinstance(choice, NamedChoice) else choice
        if isinstance(form, SchemaFormat):
            options["response_format"] = ResponseFormat(type="json_schema", json_schema=JsonSchema.model_validate({"name": form.name, "schema": form.body}))
        elif form is not None:
            options["response_format"] = ResponseFormat(type=form.type)
        first = [Message(role="system", content=self.instructions)] if self.instructions else []
        try:
            return ChatRequest(messages=[*first, *before, *self.messages()], max_completion_tokens=self.max_output_tokens, stream=self.stream,
                               reasoning_effort=self.reasoning.effort if self.reasoning else None, **options)
        except ValueError as error:  # what only chat completions check
            detail = error.errors()[0] if hasattr(error, "errors") else {"msg": str(error)}
            raise Refused(400, detail["msg"].removeprefix("Value error, "), None, "invalid_value") from error

    def messages(self) -> list[Message]:
        """The input as chat messages; calls, and the thought before them, belong to one turn."""
        if isinstance(self.input, str):
            return [Message(role="user", content=self.input)]
        found: list[Message] = []
        thought: str | None = None
        for item in self.input:
            if isinstance(item, InputThought):
                thought = "".join(part.get("text", "") for part in item.content or [])
                continue
            message = message_of(item)
            previous = found[-1] if found else None
            if isinstance(item, InputCall) and previous is not None and previous.role == "assistant":
                previous.tool_calls = [*(previous.tool_calls or []), *(message.tool_calls or [])]
                continue
            if message.role == "assistant" and thought:
                message.reasoning_content = thought
            thought = None
            found.append(message)
        return found


def message_of(item: InputMessage | InputCall | InputResult) -> Message:
    if isinstance(item, InputCall):
        return Message(role="assistant", content=None, tool_calls=[ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))])
    content = item.output if isinstance(item, InputResult) else item.content
    text: Any = content if isinstance(content, str) else [Part(type="text", text=part.text) for part in content]
    if isinstance(item, InputResult):
        return Message(role="tool", content=text, tool_call_id=item.call_id)
    return Message(role=item.role, content=text)


# --- conversations ------------------------------------------------------------------------------------------------------


@dataclass
class Kept:
    """A response, and the conversation that it ends."""

    body: dict[str, Any]
    messages: list[Message]
    tenant: str
    characters: int


@dataclass
class Conversations:
    """The last ones; the oldest go where there are too many, or they are too long."""

    kept: OrderedDict[str, Kept] = field(default_factory=OrderedDict)
    characters: int = 0

    def keep(self, body: dict[str, Any], messages: list[Message], tenant: str) -> None:
        size = sum(len(m.model_dump_json()) for m in messages)
        self.kept[body["id"]] = Kept(body, messages, tenant, size)
        self.characters += size
        while self.kept and (len(self.kept) > KEPT or self.characters > KEPT_CHARACTERS):
            self.characters -= self.kept.popitem(last=False)[1].characters

    def find(self, response_id: str, tenant: str) -> Kept:
        found = self.kept.get(response_id)
        if found is None or found.tenant != tenant:
            raise Refused(404, f"there is no response {response_id!r}: the last {KEPT} are kept, in memory, unless store was false",
                          "previous_response_id", "previous_response_not_found")
        return found

    def forget(self, response_id: str, tenant: str) -> None:
        self.find(response_id, tenant)
        self.characters -= self.kept.pop(response_id).characters


# --- answers --------------------------------------------------------------------------------------------------------------


@dataclass
class Envelope:
    """The response object in its states: `in_progress` before, `completed` or `incomplete` at the end."""

    request: ResponsesRequest
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(24)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None = None, reason: str | None = None) -> dict[str, Any]:
        r = self.request
        form: Any = r.text.format.model_dump(exclude_none=True, by_alias=True) if r.text and r.text.format else {"type": "text"}
        choice = r.tool_choice.model_dump() if isinstance(r.tool_choice, NamedChoice) else r.tool_choice or "auto"
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "background": False, "error": None,
            "incomplete_details": {"reason": reason} if reason else None, "instructions": r.instructions, "max_output_tokens": r.max_output_tokens,
            "model": r.model, "output": output, "parallel_tool_calls": r.parallel_tool_calls is not False, "previous_response_id": r.previous_response_id,
            "reasoning": {"effort": r.reasoning.effort if r.reasoning else None, "summary": None}, "store": r.store is not False,
            "temperature": 1.0 if r.temperature is None else r.temperature, "top_p": 1.0 if r.top_p is None else r.top_p, "text": {"format": form},
            "tool_choice": choice, "tools": [t.model_dump() | {"strict": bool(t.strict)} for t in r.tools or []], "truncation": "disabled",
            "usage": usage, "user": r.user, "metadata": r.metadata or {}, "service_tier": "default"}

    def final(self, job: Job, output: list[dict[str, Any]]) -> dict[str, Any]:
        cut = reader_of(job, 0).finish_reason == "length"
        return self.body("incomplete" if cut else "completed", output, usage_of(job), "max_output_tokens" if cut else None)


def usage_of(job: Job) -> dict[str, Any]:
    prompt, completion = job.prompt_tokens, job.completion_tokens
    return {"input_tokens": prompt, "input_tokens_details": {"cached_tokens": job.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": completion, "output_tokens_details": {"reasoning_tokens": reader_of(job, 0).thought},
            "total_tokens": prompt + completion}


def new_item(kind: str, piece: Piece | None = None) -> dict[str, Any]:
    """An item of the output that is under way."""
    token = secrets.token_hex(24)
    match kind:
        case "reasoning":
            return {"id": f"rs_{token}", "type": "reasoning", "summary": [], "content": [], "status": "in_progress"}
        case "content":
            return {"id": f"msg_{token}", "type": "message", "role": "assistant", "content": [], "status": "in_progress"}
    assert piece is not None
    return {"id": f"fc_{token}", "type": "function_call", "call_id": f"call_{secrets.token_hex(12)}", "name": piece.name, "arguments": "",
            "status": "in_progress"}


PART: dict[str, dict[str, Any]] = {"reasoning": {"type": "reasoning_text", "text": ""},
        "content": {"type": "output_text", "text": "", "annotations": [], "logprobs": []}}


class Output:
    """Builds the items from pieces, and tells every step as an event; the whole answer is what the events built."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._kind = ""  # of the open item

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        events = [] if piece.kind == self._kind != "tool_call" else self.close()
        if piece.kind == "tool_call":
            return events + self._call(piece)
        if not self._kind:
            self._kind = piece.kind
            self.items.append(new_item(piece.kind))
            events.append({"type": "response.output_item.added", **self._at(False), "item": dict(self.items[-1])})
            self.items[-1]["content"] = [dict(PART[piece.kind])]
            events.append({"type": "response.content_part.added", **self._at(), "part": dict(PART[piece.kind])})
        self._part["text"] += piece.text
        return [*events, {"type": f"response.{self._part['type']}.delta", **self._at(), "delta": piece.text, **self._logprobs}]

    def close(self, status: str = "completed") -> list[dict[str, Any]]:
        """The open item is at its end."""
        if not self._kind:
            return []
        self.items[-1]["status"] = status
        part, self._kind = self._part, ""
        return [{"type": f"response.{part['type']}.done", **self._at(), "text": part["text"], **self._logprobs},
                {"type": "response.content_part.done", **self._at(), "part": part},
                {"type": "response.output_item.done", **self._at(False), "item": self.items[-1]}]

    def _call(self, piece: Piece) -> list[dict[str, Any]]:
        item = new_item("tool_call", piece)
        self.items.append(item)
        at = {"output_index": len(self.items) - 1, "item_id": item["id"]}
        events: list[dict[str, Any]] = [
            {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(item)},
            {"type": "response.function_call_arguments.delta", **at, "delta": piece.text},
            {"type": "response.function_call_arguments.done", **at, "arguments": piece.text, "name": piece.name}]
        item |= {"arguments": piece.text, "status": "completed"}
        return [*events, {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}]

    @property
    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self.items[-1]["content"][0]
        return part

    @property
    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self._part["type"] == "output_text" else {}

    def _at(self, part: bool = True) -> dict[str, Any]:
        at = {"output_index": len(self.items) - 1}
        return at | {"item_id": self.items[-1]["id"], "content_index": 0} if part else at


async def response_events(job: Job, envelope: Envelope, keep: Any) -> AsyncIterator[bytes]:
    number = 0

    def event(body: dict[str, Any]) -> bytes:
        nonlocal number
        body = {**body, "sequence_number": number}
        number += 1
        return sse(body, body["type"])

    yield event({"type": "response.created", "response": envelope.body("in_progress", [])})
    yield event({"type": "response.in_progress", "response": envelope.body("in_progress", [])})
    output = Output()
    try:
        async for _, update in updates(job):
            for piece in update.pieces:
                for body in output.add(piece):
                    yield event(body)
    except Exception as error:
        refusal = refusal_of(error)
        failed = envelope.body("failed", output.items) | {"error": {"code": "server_error", "message": refusal.message}}
        yield event({"type": "response.failed", "response": failed})
        return
    cut = reader_of(job, 0).finish_reason == "length"
    for body in output.close("incomplete" if cut else "completed"):
        yield event(body)
    final = envelope.final(job, output.items)
    keep(final)
    yield event({"type": f"response.{final['status']}", "response": final})


async def response_answer(job: Job, envelope: Envelope) -> dict[str, Any]:
    (pieces,) = await whole(job)
    output = Output()
    for piece in pieces:
        output.add(piece)
    output.close("incomplete" if reader_of(job, 0).finish_reason == "length" else "completed")
    return envelope.final(job, output.items)


def answer_message(output: list[dict[str, Any]]) -> Message:
    """The output as the assistant's turn of a conversation."""
    pieces = [Piece("content" if item["type"] == "message" else "reasoning", item["content"][0]["text"])
              for item in output if item["type"] != "function_call"]
    calls = [ToolCall(id=item["call_id"], function=FunctionCall(name=item["name"], arguments=item["arguments"]))
             for item in output if item["type"] == "function_call"]
    return Message(role="assistant", content=joined(pieces, "content"), reasoning_content=joined(pieces, "reasoning") or None, tool_calls=calls or None)


def add_responses(app: FastAPI, desk: Desk) -> None:
    conversations = Conversations()

    @app.post("/v1/responses")
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        tenant = request.scope["state"].get("tenant", "")
        before = conversations.find(body.previous_response_id, tenant).messages if body.previous_response_id else []
        _, job = await desk.chat(body.as_chat(before), request)
        envelope = Envelope(body)

        def keep(final: dict[str, Any]) -> None:
            if body.store is not False:
                conversations.keep(final, [*before, *body.messages(), answer_message(final["output"])], tenant)

        if body.stream:
            return EventStream(response_events(job, envelope, keep), job)
        final = await unless_gone(response_answer(job, envelope), job, request)
        keep(final)
        return Json(final)

    @app.get("/v1/responses/{response_id}")
    async def read(response_id: str, request: Request) -> dict[str, Any]:
        return conversations.find(response_id, request.scope["state"].get("tenant", "")).body

    @app.delete("/v1/responses/{response_id}")
    async def forget(response_id: str, request: Request) -> dict[str, Any]:
        conversations.forget(response_id, request.scope["state"].get("tenant", ""))
        return {"id": response_id, "object": "response", "deleted": True}
