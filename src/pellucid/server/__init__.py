"""The OpenAI-compatible server."""

from pellucid.server.app import create_app
from pellucid.server.parser import AnswerParser, Piece, parse_answer
from pellucid.server.run import running_server, serve_forever

__all__ = ["AnswerParser", "Piece", "create_app", "parse_answer", "running_server", "serve_forever"]
