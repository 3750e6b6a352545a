"""From a request to a job of the engine, and from the job to the response: what all endpoints that generate share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pellucid.engine.async_llm import QueueFull
from pellucid.engine.batch import check_length
from pellucid.engine.job import Job
from pellucid.engine.params import SamplingParams
from pellucid.errors import BadInput
from pellucid.server.answers import sse
from pellucid.server.errors import Refused, refusal_of, told
from pellucid.server.parser import AnswerParser
from pellucid.server.protocol import ChatRequest, Sampling
from pellucid.server.reader import AnswerReader, ForcedCalls, OneCall, Parser
from pellucid.server.registry import Registry, Served

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """waiting: requests beside those that run.  body: bytes.  tokens: most that one answer may have.  seconds: most that one may take."""

    waiting: int = 16
    body: int = 4 << 20
    tokens: int | None = None
    seconds: float | None = None


@dataclass
class Desk:
    """Where the endpoints find the models and the limits."""

    registry: Registry
    limits: Limits
    others: int = 0  # requests under way that are no jobs of an engine: vectors and scores

    async def limited(self, answer: Coroutine[Any, Any, T], request: Request) -> T:
        """The answer, within the limits that jobs have too: how many may be here, and for how long."""
        if self.others >= self.registry.config.running + self.limits.waiting:
            answer.close()
            raise QueueFull(f"{self.others} requests for vectors or scores are here")
        self.others += 1
        try:
            async with asyncio.timeout(self.limits.seconds):
                return await unless_gone(answer, None, request)
        except TimeoutError as error:
            raise TimeoutError(f"the request took longer than {self.limits.seconds:g} s") from error
        finally:
            self.others -= 1

    async def chat(self, body: ChatRequest, request: Request) -> tuple[Served, Job]:
        model = self.registry.find(body.model)
        messages, tools, thinking, variables = body.for_template()
        try:
            read = await asyncio.to_thread(model.read_by_template, tools)
            check_variables(variables, read)
            if body.reasoning_effort is not None and "reasoning_effort" in read:
                variables = {"reasoning_effort": body.reasoning_effort, **variables}
            if body.add_generation_prompt is False and not body.goes_on:
                variables = {**variables, "add_generation_prompt": False}
            ids = await asyncio.to_thread(lambda: model.chat_ids(messages, tools, thinking, body.goes_on, **variables))
        except BadInput as error:
            raise told(error, "messages") from error
        think, shut = model.form.think
        if body.goes_on:
            opens = messages[-1]["content"].rfind(think) > messages[-1]["content"].rfind(shut)
        else:
            opens = model.tokenizer.decode(ids[-8:]).rstrip().endswith(think)
        options = {"thinking": opens, "tools": body.reads_calls, "stops": body.stops, "form": model.form, "schemas": body.schemas or None}
        return model, await self.start(model, body, [ids], request, options, opens or (model.thinks and thinking is not False and not body.goes_on))

    async def start(self, model: Served, body: Sampling, prompts: list[list[int]], request: Request, options: dict[str, Any],
              thinking: bool = False) -> Job:
        """The request as a job in the queue; what cannot fit the context is refused before. options: of the parser."""
        prompts = [self._shortened(model, body, ids) for ids in prompts]
        params = self._params(model, body, prompts, thinking)
        forced = body.forced if isinstance(body, ChatRequest) else None

        def reader(p: SamplingParams, number: int) -> AnswerReader:
            live = bool(body.stream)
            if forced is not None:
                parser: Parser = ForcedCalls(forced, AnswerParser(**options | {"tools": False, "stops": ()}), live)
            else:
                parser = AnswerParser(**options, keeps_stop=bool(body.include_stop_str_in_output), live=live)
                parser = OneCall(parser) if isinstance(body, ChatRequest) and body.parallel_tool_calls is False else parser
            return AnswerReader(model, parser, p, body.asked_logprobs is not None, body.skip_special_tokens is False)

        state = request.scope["state"]
        try:
            job = await model.engine.submit(prompts, params, reader, namespace=namespace_of(model, body, state.get("tenant", "")),
                                      priority=body.priority, adapter=model.adapter, request_id=state.get("request_id", ""))
        except BadInput as error:
            raise told(error, None, "invalid_value") from error
        state["model"], state["job"] = model.name, job
        if self.limits.seconds:
            job.expire_after(self.limits.seconds)
        return job

    @staticmethod
    def _shortened(model: Served, body: Sampling, ids: list[int]) -> list[int]:
        """The last tokens of a prompt: as many as are asked for, or (-1) as the context has beside the answer."""
        most = body.truncate_prompt_tokens
        if most == -1:
            most = max(1, min(model.llm.context, model.engine.longest) - max(1, body.limit() or body.usual_limit(model.defaults) or 1))
        return ids if most is None else ids[-most:]

    def _params(self, model: Served, body: Sampling, prompts: list[list[int]], thinking: bool) -> list[SamplingParams]:
        context, most = model.llm.context, self.limits.tokens
        if most is not None and (body.limit() or 0) > most:
            raise Refused(400, f"max_tokens is {body.limit()}; this server allows {most}", "max_tokens", "invalid_value")
        try:
            each = [body.params(min(max(1, min(context, model.engine.longest) - len(ids)), most or context), thinking, model.defaults) for ids in prompts]
        except BadInput as error:
            raise told(error, None, "invalid_value") from error
        if wrong := [t for t in each[0].logit_bias or () if t >= model.llm.model.spec.vocab]:
            raise Refused(400, f"logit_bias names {wrong[0]}, which is no token of this model", "logit_bias", "invalid_value")
        try:
            for ids, p in zip(prompts, each):
                check_length(len(ids), p.max_tokens, context)
        except BadInput as error:
            raise told(error, "messages" if isinstance(body, ChatRequest) else "prompt", "context_length_exceeded") from error
        return each


OUR_OWN = {"messages", "tools", "add_generation_prompt", "goes_on"}


def check_variables(given: dict[str, Any], read: frozenset[str]) -> None:
    """What a client gives to the template must be read there, and be nothing that stands in other fields."""
    if wrong := [name for name in given if name not in read or name in OUR_OWN]:
        others = ", ".join(sorted({"enable_thinking", *read} - OUR_OWN))
        raise Refused(400, f"chat_template_kwargs: {wrong[0]!r} is nothing that can be given to this model's chat template; it reads {others}",
                      f"chat_template_kwargs.{wrong[0]}", "unsupported_field")


def namespace_of(model: Served, body: Sampling, tenant: str) -> str:
    """Cached prefixes are shared within it alone: an adapter's entries differ, keys and salts ask for privacy. No salt gives another's."""
    parts = (model.namespace, tenant, body.cache_salt or "")
    return ascii(parts) if any(parts) else ""


async def unless_gone(answer: Awaitable[T], job: Job | None, request: Request) -> T:
    """The answer; a client that leaves meanwhile ends the work, a job's generation too."""
    task = asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait({task}, timeout=0.2))[0]:
            if await request.is_disconnected():
                raise Refused(499, "the client has gone")
        return task.result()
    finally:
        if job is not None:
            job.cancel()
        task.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; however the response ends, the job ends too."""

    def __init__(self, parts: AsyncIterator[bytes], job: Job):
        super().__init__(with_errors(parts), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


async def with_errors(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A failure behind the first part can no longer become a status: it is sent as an event."""
    try:
        async for part in parts:
            yield part
    except Exception as error:
        yield sse(refusal_of(error).body)
