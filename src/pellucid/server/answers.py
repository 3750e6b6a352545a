"""Answers in OpenAI's shapes: whole ones and streams of server-sent events."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from pellucid.engine.job import Job, best_first
from pellucid.engine.request import Request
from pellucid.server.calls import Piece
from pellucid.server.errors import Refused, as_json
from pellucid.server.protocol import CompletionRequest, StreamOptions
from pellucid.server.reader import AnswerReader, Update
from pellucid.tokenizers import Tokenizer

DONE = b"data: [DONE]\n\n"
FAULTS = {"form_lost": "the form that was asked for became too complex to follow",
          "not_numbers": "the model's logits for this request are not numbers; its weights may be damaged, or have diverged in training",
          "refused": "a process of the model could not take the request"}
"""What is told of requests that end by an error of their own (`Request.fault`)."""


@dataclass
class Envelope:
    """What all parts of one answer repeat. `object`: chat.completion, text_completion."""

    model: str
    object: str
    prefix: str
    tokenizer: Tokenizer
    ids: bool = False  # tell the tokens too (return_token_ids)
    silent: int = 0  # tokens before a prompt that its echoed text does not show
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"

    def body(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None, part: str = "") -> dict[str, Any]:
        body = {"id": self.id, "object": self.object + part, "created": self.created, "model": self.model, "choices": choices}
        return body if usage is None else body | {"usage": usage}


def reader_of(job: Job, number: int) -> AnswerReader:
    reader = job.choices[number].reader
    assert isinstance(reader, AnswerReader)
    return reader


def usage_of(job: Job) -> dict[str, Any]:
    """Tokens of all prompts (each once) and of all answers, end tokens included; those of prompts that were in the cache."""
    prompt, completion = job.prompt_tokens, job.completion_tokens
    thought = sum(reader_of(job, i).thought for i in range(len(job.choices)))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": job.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": thought}}


# --- log-probabilities ------------------------------------------------------------------------------------------------


def finite(logprob: float) -> float:
    """JSON has no infinity."""
    return logprob if math.isfinite(logprob) else -9999.0


def places_of(request: Request, places: range) -> list[tuple[int, float, list[tuple[int, float]]]]:
    """(token, log-probability, the most probable ones with theirs) of each place of the answer."""
    output = request.output
    return [(output[i], request.logprobs[i], request.tops[i]) for i in places]


def prompt_places(request: Request) -> list[tuple[int, float | None, list[tuple[int, float]]]]:
    """The same of the prompt. Nothing stands before its first token, from which its probability could follow."""
    return [(request.prompt[0], None, []), *zip(request.prompt[1:], request.prompt_logprobs, request.prompt_tops)]


def prompt_logprobs(tokenizer: Tokenizer, request: Request) -> list[dict[str, Any] | None] | None:
    """As vLLM tells them: for each token of the prompt {id: {"logprob", "decoded_token"}}, its own first."""
    if request.params.prompt_logprobs is None:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"logprob": finite(logprob), "decoded_token": tokenizer.token_bytes(token).decode("utf-8", "replace")}

    return [None if logprob is None else {str(t): entry(t, p) for t, p in [(token, logprob), *tops]}
            for token, logprob, tops in prompt_places(request)]


def chat_logprobs(tokenizer: Tokenizer, request: Request, places: range) -> dict[str, Any] | None:
    """As chat completions tell them."""
    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}

    if not places:
        return None
    content = [entry(token, logprob) | {"top_logprobs": [entry(*top) for top in tops]}
               for token, logprob, tops in places_of(request, places)]
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer: Tokenizer, places: list[tuple[int, float | None, list[tuple[int, float]]]], offset: int = 0, silent: int = 0) -> dict[str, Any]:
    """As completions tell them. offset: of the first token in the text.  silent: tokens before it that the text does not show."""
    def text(token: int) -> str:
        return tokenizer.token_bytes(token).decode("utf-8", "replace")

    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, logprob, tops in places:
        found["tokens"].append(text(token))
        found["token_logprobs"].append(None if logprob is None else finite(logprob))
        best = {text(t): finite(p) for t, p in tops} if logprob is not None else None
        found["top_logprobs"].append(best if best is None else best | {text(token): finite(logprob)})  # type: ignore[arg-type]
        found["text_offset"].append(offset)
        offset += len(text(token)) if len(found["tokens"]) > silent else 0
    return found


# --- whole answers ------------------------------------------------------------------------------------------------------


def tool_call(piece: Piece) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function",
            "function": {"name": piece.name, "arguments": piece.text}}


class CallDeltas:
    """The calls of one choice as deltas: the first of a call has its id and name, later ones go on with its arguments."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    def __call__(self, piece: Piece) -> dict[str, Any] | None:
        """None: nothing to say. A call that is lost cannot be taken back; it only does not count."""
        match piece.part:
            case "begin":
                self.begun += 1
                return {"index": self.begun - 1, **tool_call(piece)}
            case "more":
                return {"index": self.begun - 1, "function": {"arguments": piece.text}}
            case "end":
                self.ended += 1
        return None


def finish_reason(reason: str | None, calls: int) -> str | None:
    """A model that stopped after calling a tool waits for its result."""
    return "tool_calls" if calls and reason == "stop" else reason


async def whole(job: Job) -> list[list[Piece]]:
    """The pieces of every choice, when all are there."""
    pieces: list[list[Piece]] = [[] for _ in job.choices]
    async for number, update in updates(job):
        pieces[number] += update.pieces
    return pieces


async def updates(job: Job) -> AsyncIterator[tuple[int, Update]]:
    """Of the job, as long as anything may come of it. Where all its samples broke off, the request has failed."""
    lost = 0
    async for number, update in job:
        lost += update.finish_reason == "error"
        if lost == len(job.choices):
            raise failure(job, number)
        yield number, update


def failure(job: Job, number: int) -> Refused:
    """Why the sample broke off."""
    fault = job.choices[number].request.fault
    return Refused(500, FAULTS[fault], "response_format" if fault == "form_lost" else None, fault)


def ending(job: Job, number: int, reason: str | None) -> dict[str, Any]:
    """How a choice ends: why, and by which text or token (vLLM's field). One that broke off says so; the others are answered."""
    told = {"finish_reason": reason, "stop_reason": reader_of(job, number).stop_reason if reason else None}
    return told | failure(job, number).body if reason == "error" else told


def joined(pieces: list[Piece], kind: str) -> str:
    return "".join(p.text for p in pieces if p.kind == kind)


def thought(text: str) -> dict[str, Any]:
    """A thought by both names that clients look for: DeepSeek's, and vLLM's and OpenRouter's."""
    return {"reasoning_content": text, "reasoning": text} if text else {}


def said(job: Job, number: int) -> range:
    """Places of a whole answer whose log-probabilities were asked for."""
    reader = reader_of(job, number)
    return range(reader.said if reader.with_logprobs else 0)


async def chat_answer(job: Job, envelope: Envelope) -> dict[str, Any]:
    choices = []
    for number, pieces in enumerate(await whole(job)):
        calls = [tool_call(p) for p in pieces if p.kind == "tool_call"]
        message: dict[str, Any] = {"role": "assistant", "content": joined(pieces, "content") or (None if calls else ""), "refusal": None,
                                   **thought(joined(pieces, "reasoning"))}
        if calls:
            message["tool_calls"] = calls
        logprobs = chat_logprobs(envelope.tokenizer, job.choices[number].request, said(job, number))
        reason = finish_reason(reader_of(job, number).finish_reason, len(calls))
        choices.append({"index": number, "message": message, "logprobs": logprobs, **ending(job, number, reason)})
        if envelope.ids:
            choices[-1]["token_ids"] = reader_of(job, number).tokens
    body = envelope.body(choices, usage_of(job))
    if (told := prompt_logprobs(envelope.tokenizer, job.choices[0].request)) is not None:
        body["prompt_logprobs"] = told
    return body | {"prompt_token_ids": job.choices[0].request.prompt} if envelope.ids else body


async def text_answer(job: Job, envelope: Envelope, body: CompletionRequest, echo: list[str] | None) -> dict[str, Any]:
    """echo: texts of the prompts, put before the answers; with max_tokens 0 they are all that is asked for."""
    pieces, n, no_text = await whole(job), body.n or 1, body.max_tokens == 0
    drawn = len(job.choices) // len(job.prompts)
    choices: list[dict[str, Any]] = []
    for prompt in range(len(job.prompts)):
        numbers = range(prompt * drawn, (prompt + 1) * drawn)
        for number in numbers if n == drawn else sorted(numbers, key=lambda i: best_first(job.choices[i].request))[:n]:
            text, reason = "" if no_text else joined(pieces[number], "content"), reader_of(job, number).finish_reason
            choices.append({"index": len(choices), "text": (echo[prompt] if echo else "") + text,
                            "logprobs": echoed_logprobs(job, number, envelope, bool(echo), no_text),
                            **ending(job, number, reason)})
            if envelope.ids:
                choices[-1] |= {"token_ids": reader_of(job, number).tokens, "prompt_token_ids": job.choices[number].request.prompt}
            if body.prompt_logprobs is not None:
                choices[-1]["prompt_logprobs"] = prompt_logprobs(envelope.tokenizer, job.choices[number].request)
    return envelope.body(choices, usage_of(job))


def echoed_logprobs(job: Job, number: int, envelope: Envelope, echo: bool, no_text: bool) -> dict[str, Any] | None:
    reader, request = reader_of(job, number), job.choices[number].request
    if not reader.with_logprobs:
        return None
    places: list[tuple[int, float | None, list[tuple[int, float]]]] = []
    if echo:
        places += prompt_places(request)
    if not no_text:
        places += places_of(request, said(job, number))
    return text_logprobs(envelope.tokenizer, places, silent=envelope.silent if echo else 0)


# --- streams ------------------------------------------------------------------------------------------------------------


async def chat_events(job: Job, envelope: Envelope, options: StreamOptions) -> AsyncIterator[bytes]:
    """Every choice, piece by piece."""
    def event(number: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None,
              tokens: list[int] | None = None, first: bool = False) -> bytes:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, **ending(job, number, reason)}
        choice |= {"token_ids": tokens} if tokens else {}
        body = envelope.body([choice], usage_of(job) if options.continuous_usage_stats else None, ".chunk")
        return sse(body | {"prompt_token_ids": job.choices[0].request.prompt} if first and envelope.ids else body)

    for number in range(len(job.choices)):
        yield event(number, {"role": "assistant", "content": ""}, first=number == 0)
    calls = [CallDeltas() for _ in job.choices]
    async for number, update in updates(job):
        logprobs = chat_logprobs(envelope.tokenizer, job.choices[number].request, update.places)
        tokens = update.tokens if envelope.ids else None
        for piece in update.pieces:
            if piece.kind == "tool_call":
                if (call := calls[number](piece)) is None:
                    continue
                delta: dict[str, Any] = {"tool_calls": [call]}
            else:
                delta = {"content": piece.text} if piece.kind == "content" else thought(piece.text)
            yield event(number, delta, None, logprobs, tokens)
            logprobs = tokens = None  # told once
        if update.finish_reason:
            yield event(number, {}, finish_reason(update.finish_reason, calls[number].ended), logprobs, tokens)
    if options.include_usage:
        yield sse(envelope.body([], usage_of(job), part=".chunk"))
    yield DONE


async def text_events(job: Job, envelope: Envelope, options: StreamOptions, echo: list[str] | None, no_text: bool) -> AsyncIterator[bytes]:
    def event(number: int, text: str, reason: str | None = None, logprobs: dict[str, Any] | None = None, tokens: list[int] | None = None) -> bytes:
        choice = {"index": number, "text": text, "logprobs": logprobs, **ending(job, number, reason)}
        if envelope.ids:
            choice |= {"token_ids": tokens or []} | ({} if number in told else {"prompt_token_ids": job.choices[number].request.prompt})
            told.add(number)
        return sse(envelope.body([choice], usage_of(job) if options.continuous_usage_stats else None))

    drawn = len(job.choices) // len(job.prompts)
    offsets = [0] * len(job.choices)
    begun, told = set[int](), set[int]()  # choices whose prompt's text, and whose prompt's tokens, were told
    async for number, update in updates(job):
        if echo and number not in begun:  # its prompt has been read by now
            begun.add(number)
            own: Any = prompt_places(job.choices[number].request) if reader_of(job, number).with_logprobs else None
            own = None if own is None else text_logprobs(envelope.tokenizer, own, silent=envelope.silent)
            offsets[number] = len(echo[number // drawn])
            yield event(number, echo[number // drawn], logprobs=own)
        text = "" if no_text else joined(update.pieces, "content")
        logprobs = None
        if update.places and not no_text:
            places: Any = places_of(job.choices[number].request, update.places)
            logprobs = text_logprobs(envelope.tokenizer, places, offsets[number])
            offsets[number] += sum(map(len, logprobs["tokens"]))
        yield event(number, text, update.finish_reason, logprobs, update.tokens)
    if options.include_usage:
        yield sse(envelope.body([], usage_of(job)))
    yield DONE


def sse(body: dict[str, Any], event: str = "") -> bytes:
    return (f"event: {event}\n".encode() if event else b"") + b"data: " + as_json(body) + b"\n\n"


__all__ = ["DONE", "Envelope", "Update", "chat_answer", "chat_events", "joined", "sse", "text_answer", "text_events", "updates", "usage_of", "whole"]
