"""Failures in the shape that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from pellucid.engine.async_llm import Closed, QueueFull
from pellucid.errors import BadInput
from pellucid.parallel import RankDied

KINDS = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
         500: "server_error", 503: "server_error", 504: "timeout_error"}

NO_FIELD = re.compile(r"(body|str|int|float|bool|list\[.*|function-.*|constrained-.*)$")  # pydantic's names of its own


class Json(JSONResponse):
    """Halves of characters, which a client may have sent and JSON cannot hold as they are, are written as escapes."""

    def render(self, content: Any) -> bytes:
        return as_json(content)


class StrictRequest(Request):
    """Its body is JSON as RFC 8259 has it: Python's `json` takes NaN and infinite numbers too, which nothing could be answered with."""

    async def json(self) -> Any:
        return json.loads(await self.body(), parse_constant=finite, parse_float=finite)


class JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


def finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no number of JSON, or too large")
    return number


def as_json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every failure, in the shape of OpenAI's."""

    error: ErrorDetail


class Refused(Exception):
    """A request that is answered with `status` and a reason; `param` names the field that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Json:
        return Json(self.body, self.status, headers=self.headers)


def told(error: BadInput, param: str | None = None, code: str | None = None) -> Refused:
    """An input that pellucid refuses, as a 400."""
    return Refused(400, ". ".join(part for part in (error.what, error.why, error.next) if part), param, code)


def install(app: FastAPI) -> None:
    """Every failure of `app` leaves in the one shape."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return error.response()

    @app.exception_handler(QueueFull)
    async def full(_: Request, error: QueueFull) -> JSONResponse:
        return refusal_of(error).response()

    @app.exception_handler(Closed)
    async def closed(_: Request, error: Closed) -> JSONResponse:
        return refusal_of(error).response()

    @app.exception_handler(TimeoutError)
    async def late(_: Request, error: TimeoutError) -> JSONResponse:
        return refusal_of(error).response()

    @app.exception_handler(BadInput)
    async def bad_input(_: Request, error: BadInput) -> JSONResponse:
        return told(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return unreadable(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400 and error.__cause__ is not None:  # FastAPI could not read the body
            return Refused(400, f"the body cannot be read as JSON: {error.__cause__}", code="invalid_json").response()
        where = f"{request.method} {request.url.path}"
        return Refused(error.status_code, f"{error.detail}: {where}", headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return refusal_of(error).response()


def refusal_of(error: Exception) -> Refused:
    """What a client hears of any failure; of one that should not have happened its kind alone."""
    match error:
        case Refused():
            return error
        case QueueFull():
            return Refused(429, f"{error.what}; try again soon", code="queue_full", headers={"Retry-After": "1"})
        case Closed():
            return Refused(503, error.what, code="shutting_down", headers={"Retry-After": "5"})
        case RankDied():
            return Refused(503, f"{error.what}: the server is ending", code="process_died")
        case TimeoutError():
            return Refused(504, str(error) or "the request took too long", code="timeout")
        case BadInput():
            return told(error)
    return Refused(500, f"this should not have happened: {type(error).__name__}")


def unreadable(errors: Any) -> Refused:
    """The most exact of pydantic's complaints about the first field, with the path of what is wrong."""
    first = most_exact(errors)
    where = ".".join(str(part) for part in first["loc"] if not NO_FIELD.match(str(part)))
    match first["type"]:
        case "json_invalid":
            return Refused(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}", code="invalid_json")
        case "missing":
            return Refused(400, f"the field {where or 'body'} is missing", where or None, "missing_field")
        case "extra_forbidden":
            return Refused(400, f"the field {where} is not supported", where, "unsupported_field")
        case "union_tag_invalid":  # an image for a model of texts, for instance
            return Refused(400, f"{where}: {first['ctx']['tag']!r} is not supported here; it may be {first['ctx']['expected_tags']}", where, "unsupported_type")
    reason = first["msg"].removeprefix("Value error, ")
    return Refused(400, f"{where}: {reason}" if where else reason, where or None, "invalid_value")


def most_exact(errors: Any) -> Any:
    """Of a field that may be a text or a list, pydantic complains for each: what lies deepest is meant, where only one kind reaches so deep."""
    def kinds(error: Any) -> tuple[str, ...]:
        return tuple(str(part) for part in error["loc"] if NO_FIELD.match(str(part)))

    same = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    depth = max(len(error["loc"]) for error in same)
    deepest = [error for error in same if len(error["loc"]) == depth]
    return deepest[0] if len({kinds(error) for error in deepest}) == 1 else errors[0]
