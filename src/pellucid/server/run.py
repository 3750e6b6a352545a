"""The application behind a real port: in the foreground until stopped, or in a thread for a while."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from pellucid.errors import BadInput, PellucidError
from pellucid.messages import add, three_parts
from pellucid.server.app import Models, create_app

add({
    "error.listen": ("cannot listen on {host}:{port}", "无法监听 {host}:{port}"),
    "error.listen.why": ("{text}", "{text}"),
    "error.listen.next": ("choose another --port, or stop what uses it", "换一个 --port，或停止占用它的程序"),
})
GRACE = 10  # seconds that open answers get at a shutdown


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


def server_of(app: FastAPI, grace: int = GRACE) -> uvicorn.Server:
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=grace, server_header=False)
    return uvicorn.Server(config)


def serve_forever(app: FastAPI, listener: socket.socket, grace: int = GRACE) -> None:
    """Until Ctrl-C or SIGTERM; then no new connections are taken, and open answers may end within `grace` seconds. Raises RankDied where
    one of a model's processes died: open answers hear it, and the server ends."""
    before = signal.signal(signal.SIGTERM, leave) if threading.current_thread() is threading.main_thread() else None
    server, engines = server_of(app, grace), app.state.desk.registry.engines
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
    server = server_of(create_app(llm, name, **options))
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
