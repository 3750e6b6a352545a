"""What is told of every request: its id, one event when it ends, and a span where tracing is on."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pellucid import events
from pellucid.errors import PellucidError

ID = b"x-request-id"


@dataclass
class Answered(events.Event):
    """A request over HTTP was answered.  status: 0 where its client left before.  Tokens: None where no text was asked for."""

    kind = "answered"
    request_id: str
    method: str
    path: str
    status: int
    seconds: float
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


class Access:
    """ASGI middleware, the outermost one. A client's own `X-Request-Id` is kept, where it is a short word; else a new one is made."""

    def __init__(self, app: ASGIApp, tracing: bool = False):
        self.app = app
        self.tracer = tracer() if tracing else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope["state"] = {**scope.get("state", {}), "request_id": request_id(scope)}
        status = [0]

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message = {**message, "headers": [*message["headers"], (ID, state["request_id"].encode())]}
            await send(message)

        began = time.perf_counter()
        with self._span(scope) as span:
            try:
                await self.app(scope, receive, with_id)
            finally:
                record = record_of(scope, status[0], time.perf_counter() - began)
                if span is not None:
                    describe(span, record)
                events.emit(record)

    @contextlib.contextmanager
    def _span(self, scope: Scope) -> Iterator[Any]:
        if self.tracer is None:
            yield None
            return
        from opentelemetry import propagate, trace

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        with self.tracer.start_as_current_span(f"{scope['method']} {scope['path']}", propagate.extract(headers), kind=trace.SpanKind.SERVER) as span:
            yield span


def request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(ID, b"").decode("latin-1")
    return given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else f"req_{secrets.token_hex(12)}"


def record_of(scope: Scope, status: int, seconds: float) -> Answered:
    state = scope["state"]
    job = state.get("job")
    return Answered(state["request_id"], scope["method"], scope["path"], status, seconds, state.get("model"),
                    None if job is None else job.prompt_tokens, None if job is None else job.completion_tokens)


def tracer() -> Any:
    """Of OpenTelemetry. Where no program has set a provider, spans go to the OTLP endpoint of the usual environment variables."""
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise PellucidError("tracing needs OpenTelemetry", str(error), "pip install 'pellucid[otel]'") from error
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        provider = TracerProvider(resource=Resource.create({"service.name": "pellucid"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)
    return trace.get_tracer("pellucid")


def describe(span: Any, record: Answered) -> None:
    """The record as attributes, by OpenTelemetry's names for HTTP and for generative models."""
    attributes = {"http.request.method": record.method, "url.path": record.path, "http.response.status_code": record.status,
                  "pellucid.request_id": record.request_id, "gen_ai.request.model": record.model,
                  "gen_ai.usage.input_tokens": record.prompt_tokens, "gen_ai.usage.output_tokens": record.completion_tokens}
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
