"""OpenAI's responses: /v1/responses, whole or as a stream of events, with function tools and conversations kept for a while.

A conversation is kept (unless `store` is false) among the last few hundred, in memory: `previous_response_id` goes on with it,
GET and DELETE /v1/responses/{id} read and forget it. A server that restarts has forgotten all of them, and says so.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request, Response

from pellucid.engine.job import Job
from pellucid.server.answers import joined, reader_of, sse, updates, whole
from pellucid.server.calls import Piece
from pellucid.server.conversation import FunctionCall, Message, ToolCall
from pellucid.server.defaults import NOTHING, Defaults
from pellucid.server.errors import Json, Refused, as_json, refusal_of
from pellucid.server.jobs import Desk, EventStream, unless_gone
from pellucid.server.responses_body import NamedChoice, ResponsesRequest

KEPT = 512  # conversations
KEPT_CHARACTERS = 64 << 20  # of all of them


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
        size = len(as_json(body)) + sum(len(m.model_dump_json()) for m in messages)
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
    defaults: Defaults = NOTHING  # of the model
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
            "reasoning": {name: getattr(r.reasoning, name, None) for name in ("effort", "summary")}, "store": r.store is not False,
            "temperature": first_of(r.temperature, self.defaults.temperature), "top_p": first_of(r.top_p, self.defaults.top_p), "text": {"format": form},
            "tool_choice": choice, "tools": [t.model_dump() | {"strict": bool(t.strict)} for t in r.tools or []], "truncation": "disabled",
            "usage": usage, "user": r.user, "metadata": r.metadata or {}, "service_tier": "default"}

    def final(self, job: Job, output: list[dict[str, Any]]) -> dict[str, Any]:
        cut = reader_of(job, 0).finish_reason == "length"
        return self.body("incomplete" if cut else "completed", output, usage_of(job), "max_output_tokens" if cut else None)


def first_of(*values: float | None) -> float:
    """What is asked for, else what the checkpoint recommends, else 1."""
    return next((v for v in values if v is not None), 1.0)


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
        self._calls: list[int] = []  # places of the calls that have not ended

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        events = [] if piece.kind == self._kind else self.close()
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
        if piece.part == "whole":
            return [event for part in ("begin", "more", "end") for event in self._call(replace(piece, part=part))]  # type: ignore[arg-type]
        if piece.part == "begin":
            self._calls.append(len(self.items))
            self.items.append(new_item("tool_call", piece))
            return [{"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(self.items[-1])}]
        index = self._calls[-1] if piece.part == "more" else self._calls.pop(0)  # they end in the order in which they began
        item = self.items[index]
        at = {"output_index": index, "item_id": item["id"]}
        if piece.part == "more":
            item["arguments"] += piece.text
            return [{"type": "response.function_call_arguments.delta", **at, "delta": piece.text}]
        item["status"] = "completed" if piece.part == "end" else "incomplete"
        return [{"type": "response.function_call_arguments.done", **at, "arguments": item["arguments"], "name": item["name"]},
                {"type": "response.output_item.done", "output_index": index, "item": item}]

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
             for item in output if item["type"] == "function_call" and item["status"] == "completed"]
    return Message(role="assistant", content=joined(pieces, "content"), reasoning_content=joined(pieces, "reasoning") or None, tool_calls=calls or None)


def add_responses(app: FastAPI, desk: Desk) -> None:
    conversations = Conversations()

    @app.post("/v1/responses")
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        tenant = request.scope["state"].get("tenant", "")
        before = conversations.find(body.previous_response_id, tenant).messages if body.previous_response_id else []
        model, job = await desk.chat(body.as_chat(before), request)
        envelope = Envelope(body, model.defaults)

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
