"""Answers in OpenAI's shapes: whole ones and streams of server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from pellucid.server.parser import Piece
from pellucid.server.worker import Job

DONE = "data: [DONE]\n\n"


@dataclass
class Envelope:
    """What all parts of one answer repeat. `object`: chat.completion, text_completion."""

    model: str
    object: str
    prefix: str
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"

    def body(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None, part: str = "") -> dict[str, Any]:
        body = {"id": self.id, "object": self.object + part, "created": self.created, "model": self.model, "choices": choices}
        return body if usage is None else body | {"usage": usage}


def chat_envelope(model: str) -> Envelope:
    return Envelope(model, "chat.completion", "chatcmpl")


def text_envelope(model: str) -> Envelope:
    return Envelope(model, "text_completion", "cmpl")


def usage_of(job: Job) -> dict[str, Any]:
    """Tokens of all prompts (each once) and of all answers, end tokens included; those of prompts that were in the cache."""
    prompt, completion = job.prompt_tokens, job.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": job.cached_tokens}}


def tool_call(piece: Piece) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function",
            "function": {"name": piece.name, "arguments": piece.text}}


def finish_reason(reason: str | None, calls: int) -> str | None:
    """A model that stopped after calling a tool waits for its result."""
    return "tool_calls" if calls and reason == "stop" else reason


async def whole(job: Job) -> list[list[Piece]]:
    """The pieces of every choice, when all are there."""
    pieces: list[list[Piece]] = [[] for _ in job.choices]
    async for number, piece in job:
        if piece is not None:
            pieces[number].append(piece)
    return pieces


async def chat_answer(job: Job, envelope: Envelope) -> dict[str, Any]:
    choices = []
    for number, pieces in enumerate(await whole(job)):
        text = {kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("content", "reasoning")}
        calls = [tool_call(p) for p in pieces if p.kind == "tool_call"]
        message: dict[str, Any] = {"role": "assistant", "content": text["content"] or (None if calls else "")}
        if text["reasoning"]:
            message["reasoning_content"] = text["reasoning"]
        if calls:
            message["tool_calls"] = calls
        reason = finish_reason(job.choices[number].finish_reason, len(calls))
        choices.append({"index": number, "message": message, "logprobs": None, "finish_reason": reason})
    return envelope.body(choices, usage_of(job))


async def text_answer(job: Job, envelope: Envelope) -> dict[str, Any]:
    choices = [{"index": i, "text": "".join(p.text for p in pieces), "logprobs": None,
                "finish_reason": job.choices[i].finish_reason} for i, pieces in enumerate(await whole(job))]
    return envelope.body(choices, usage_of(job))


async def chat_events(job: Job, envelope: Envelope, with_usage: bool) -> AsyncIterator[str]:
    """One choice, piece by piece."""
    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        return sse(envelope.body([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}], part=".chunk"))

    yield event({"role": "assistant", "content": ""})
    calls = 0
    async for _, piece in job:
        if piece is None:
            yield event({}, finish_reason(job.choices[0].finish_reason, calls))
        elif piece.kind == "tool_call":
            yield event({"tool_calls": [{"index": calls, **tool_call(piece)}]})
            calls += 1
        else:
            yield event({"reasoning_content" if piece.kind == "reasoning" else "content": piece.text})
    if with_usage:
        yield sse(envelope.body([], usage_of(job), part=".chunk"))
    yield DONE


async def text_events(job: Job, envelope: Envelope, with_usage: bool) -> AsyncIterator[str]:
    async for _, piece in job:
        text, reason = ("", job.choices[0].finish_reason) if piece is None else (piece.text, None)
        yield sse(envelope.body([{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]))
    if with_usage:
        yield sse(envelope.body([], usage_of(job)))
    yield DONE


def sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
