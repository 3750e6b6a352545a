"""The application behind a real port: in the foreground until stopped, or in a thread for a while."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from pellucid.errors import BadInput, PellucidError
from pellucid.messages import add, three_parts
from pellucid.server.app import Models, create_app

add({
    "error.listen": ("cannot listen on {host}:{port}", "无法监听 {host}:{port}"),
    "error.listen.why": ("{text}", "{text}"),
    "error.listen.next": ("choose another --port, or stop what uses it", "换一个 --port，或停止占用它的程序"),
})
GRACE = 10  # seconds that open answers get at a shutdown
HEARING = 5  # seconds in which those that need longer may hear so
SILENCE = 60  # seconds that a connection may be open without asking anything


class Connection(AutoHTTPProtocol):  # type: ignore[misc,valid-type]  # uvicorn's, by h11 or httptools
    """One on which nothing was asked for a while is closed: uvicorn waits without end for a request's first bytes, and for its last header."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.seen: Any = None
        self.look = self.loop.call_later(SILENCE, self.look_again)

    def look_again(self) -> None:
        if self.cycle is self.seen and (self.seen is None or self.seen.response_complete):
            self.transport.close()
        else:
            self.seen = self.cycle
            self.look = self.loop.call_later(SILENCE, self.look_again)

    def connection_lost(self, exc: Exception | None) -> None:
        self.look.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Answers that are not whole `grace` seconds after the stop hear that the server ends; uvicorn would only cut them off."""

    def __init__(self, app: FastAPI, grace: float):
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=math.ceil(grace) + HEARING,
                                server_header=False, http=Connection)
        super().__init__(config)
        self.registry, self.grace = app.state.desk.registry, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.grace, lambda: loop.run_in_executor(None, self.registry.close))
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. BadInput where the address is not to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named: else asyncio leaves Nagle's delay on, 40 ms an answer
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # from here on clients wait instead of being refused, while models are loaded
    except (OSError, OverflowError) as error:
        listener.close()
        raise BadInput(*three_parts("error.listen", host=host, port=port, text=error)) from error
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def serve_forever(app: FastAPI, listener: socket.socket, grace: float = GRACE) -> None:
    """Until Ctrl-C or SIGTERM; then no new connections are taken, and open answers may end within `grace` seconds. Raises RankDied where
    one of a model's processes died: open answers hear it, and the server ends."""
    before = signal.signal(signal.SIGTERM, leave) if threading.current_thread() is threading.main_thread() else None
    server, engines = Server(app, grace), app.state.desk.registry.engines
    for engine in engines:
        engine.when_dead = lambda: setattr(server, "should_exit", True)
    try:
        server.run(sockets=[listener])  # raises the signal again when all is drained
        if dead := next((engine.dead for engine in engines if engine.dead is not None), None):
            raise dead
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def leave(*_: Any) -> None:
    """To be stopped by SIGTERM is the ordinary end of a server."""
    raise SystemExit(0)


@contextlib.contextmanager
def running_server(llm: Models, name: str = "model", host: str = "127.0.0.1", port: int = 0, **options: Any) -> Iterator[str]:
    """A server in a thread; gives its URL (`http://127.0.0.1:PORT`; the API is under `/v1`). options: those of `create_app`."""
    listener = bind(host, port)
    server = Server(create_app(llm, name, **options), GRACE)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True, name="server")
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise PellucidError("the server did not start", next="see what it printed above")
            time.sleep(0.01)
        yield url_of(listener)
    finally:
        server.should_exit = True
        thread.join(GRACE + 5)
        listener.close()
