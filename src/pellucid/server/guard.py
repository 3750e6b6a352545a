"""What every request passes first: its key, where one is asked for, and the kind and size of its body."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pellucid.server.errors import Refused

OPEN_PATHS = {"/health", "/ping"}
READING = 60  # seconds that a body may take to arrive


class Guard:
    """ASGI middleware. Refuses with 401 what is none of `api_keys` (compared in constant time, shown nowhere), with 413 a
    body of more than `max_body` bytes, before it is read to the end, with 408 one that does not arrive in time, and with 415 one
    that is compressed or, in a browser, declared as something else than JSON."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], max_body: int):
        self.app, self.max_body = app, max_body
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            declare(scope)
            async with asyncio.timeout(READING):
                receive = await self._read(scope, receive)
        except TimeoutError:
            late = Refused(408, f"the body did not arrive within {READING} s", code="body_too_slow", headers={"Connection": "close"})
            await late.response()(scope, receive, send)
            return
        except Refused as refused:
            await refused.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in OPEN_PATHS:
            return
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        fits = [hmac.compare_digest(given.strip(), key) for key in self._keys]  # all of them: the time tells nothing
        if len(fits) > 1 and any(fits):
            scope["state"]["tenant"] = str(fits.index(True))  # their cached prefixes are their own
        if scheme.lower() != b"bearer" or not any(fits):
            raise Refused(401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                          code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body, at most `max_body` bytes; what comes later (the disconnect) is passed on."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        size = int(declared) if declared.isdigit() else 0
        body, more = bytearray(), size <= self.max_body
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return replay([message], receive)
            body += message.get("body", b"")
            size = max(size, len(body))
            more = message.get("more_body", False) and size <= self.max_body
        if size > self.max_body:
            raise Refused(413, f"the body is larger than {self.max_body:,} bytes", code="body_too_large",
                          headers={"Connection": "close"})
        return replay([{"type": "http.request", "body": bytes(body), "more_body": False}], receive)


def declare(scope: Scope) -> None:
    """Bodies are JSON, also where a client says nothing of that, or what `curl -d` says. Not where a page in a browser sends them: with
    those other types a page of any origin may ask a server on its visitor's machine, with JSON's only one that the server lets."""
    headers = dict(scope["headers"])
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refused(415, "the body is compressed; send it as it is, without Content-Encoding", code="unsupported_encoding")
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if scope["method"] != "POST" or kind == b"application/json" or kind.endswith(b"+json"):
        return
    if b"origin" in headers:
        raise Refused(415, "the body must be JSON, and be declared as `Content-Type: application/json`", code="unsupported_type")
    scope["headers"] = [*((name, value) for name, value in scope["headers"] if name != b"content-type"), (b"content-type", b"application/json")]


def replay(messages: list[Any], receive: Receive) -> Receive:
    async def again() -> Message:
        return messages.pop(0) if messages else await receive()

    return again
