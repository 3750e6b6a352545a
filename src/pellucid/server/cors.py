"""Pages in browsers that may call the server, by the origin that they come from (CORS, as the Fetch standard has it).

A browser asks first (OPTIONS, without a key) whether the page may send JSON and a key. It hears yes for the origins named, and its page
may read what comes back, refusals too. Pages of other origins stay where they are without this: what they can send without asking is
refused for its type (`guard.declare`).
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from pellucid.errors import BadInput
from pellucid.messages import add, three_parts

add({
    "error.origin": ("{origin!r} is no origin of web pages", "{origin!r} 不是网页来源（origin）"),
    "error.origin.why": ("an origin is scheme://host or scheme://host:port, in small letters and without a path",
                         "来源的形式为 scheme://host 或 scheme://host:port，小写且不含路径"),
    "error.origin.next": ("give for instance http://localhost:3000", "例如 http://localhost:3000"),
    "error.any_origin": ("pages of any origin may not call a server that asks for no key", "不要求密钥的服务器不能对任意来源的网页开放"),
    "error.any_origin.why": ("every page that a user of this machine opens could use the model", "本机用户打开的任何网页都能使用此模型"),
    "error.any_origin.next": ("name the origins, or ask for a key (--api-key-file)", "写明允许的来源，或要求密钥（--api-key-file）"),
})


def check_origins(origins: Sequence[str], locked: bool) -> None:
    """BadInput for what no browser would ever send, and for `*` where no key is asked for."""
    for origin in origins:
        if origin == "*":
            if not locked:
                raise BadInput(*three_parts("error.any_origin"))
        elif not is_origin(origin):
            raise BadInput(*three_parts("error.origin", origin=origin))


def is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        return False
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    usual = parts.port is not None and {"http": 80, "https": 443}.get(parts.scheme) == parts.port  # which browsers leave out
    return bool(host) and not usual and text == f"{parts.scheme}://{host}{port}" and text.isascii() and text.isprintable() and not set(text) & set(" *")


def add_cors(app: FastAPI, origins: Sequence[str]) -> None:
    """Clients send headers of their own (`X-Stainless-...`): any may be. No cookies are read, so that none are asked for."""
    near: dict[str, Any] = {"allow_private_network": True} if "allow_private_network" in signature(CORSMiddleware).parameters else {}
    app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"],
                       expose_headers=["X-Request-Id", "Retry-After"], **near)
