"""What every request passes first: its key, where one is asked for, and the size of its body."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pellucid.server.errors import Refused

OPEN_PATHS = {"/health"}


class Guard:
    """ASGI middleware. Refuses with 401 a wrong `api_key` (compared in constant time, shown nowhere), and with 413 a
    body of more than `max_body` bytes, before it is read to the end."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body: int):
        self.app, self.max_body = app, max_body
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            receive = await self._read(scope, receive)
        except Refused as refused:
            await refused.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            raise Refused(401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                          code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body, at most `max_body` bytes; what comes later (the disconnect) is passed on."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        size = int(declared) if declared.isdigit() else 0
        body, more = b"", size <= self.max_body
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
        return replay([{"type": "http.request", "body": body, "more_body": False}], receive)


def replay(messages: list[Any], receive: Receive) -> Receive:
    async def again() -> Message:
        return messages.pop(0) if messages else await receive()

    return again
