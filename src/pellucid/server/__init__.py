"""The OpenAI-compatible server. Its parsers of answers serve the command line too, where FastAPI may be missing: so it is lazy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pellucid.server.parser import AnswerParser, Piece, parse_answer

if TYPE_CHECKING:
    from pellucid.server.app import create_app
    from pellucid.server.run import running_server, serve_forever

__all__ = ["AnswerParser", "Piece", "create_app", "parse_answer", "running_server", "serve_forever"]
HOME = {"create_app": "app", "running_server": "run", "serve_forever": "run"}


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{HOME[name]}"), name)
