"""Conversations for fine-tuning, from a file of one's own: every line is checked, and an error names it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pellucid.data.records import records_of
from pellucid.errors import BadInput, nearest
from pellucid.messages import add, three_parts

add({
    "error.no_chats": ("there is no file {path}", "没有文件 {path}"),
    "error.no_chats.next": ("check the path given to --data", "检查 --data 的路径"),
})
ROLES = ("system", "user", "assistant", "tool")
FORM = ('{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]} '
        'or {"prompt": "2+2?", "completion": "4"}')


@dataclass(frozen=True)
class Chat:
    """messages: what a chat template takes, with at least one assistant's message; tools: JSON schemas, or None."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @property
    def key(self) -> str:
        """What the assistant answers to at first. Splitting by it (`split.is_heldout(chat.key)`) keeps two answers to
        the same question on the same side."""
        before = []
        for message in self.messages:
            if message["role"] == "assistant":
                break
            before.append(f"{message['role']}: {message['content']}")
        return "\n".join(before)


def read_chats(file: str | Path) -> Iterator[Chat]:
    """Stream the conversations of a .jsonl, .jsonl.gz or .parquet file.

    A line is {"messages": [...]} (with "tools" where there are any) or {"prompt": ..., "completion": ...}, both
    strings or both lists of messages. Content may be a string or a list of {"type": "text", "text": ...} parts.
    Errors: BadInput that names file, line and the valid form; also for a missing or an empty file.
    """
    file = Path(file)
    if not file.is_file():
        raise BadInput(*three_parts("error.no_chats", path=file))
    if not file.name.lower().endswith((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".parquet")):
        raise BadInput(f"{file} is neither JSONL nor Parquet", f"its name ends in {file.suffix or 'nothing'}",
                       f"write one JSON object a line into a .jsonl file: {FORM}")
    return _stream(file)


def _stream(file: Path) -> Iterator[Chat]:
    place = ""
    try:
        for place, record in records_of(file):
            try:
                yield chat_of(record)
            except ValueError as error:
                raise BadInput(f"{file}, {place}: {error}", next=f"the valid form is {FORM}") from None
    except OSError as error:
        raise BadInput(f"cannot read {file}", error.strerror or str(error), "check the file and its rights") from error
    if not place:
        raise BadInput(f"{file} is empty", next=f"write one conversation a line: {FORM}")


def chat_of(record: Any) -> Chat:
    """One record as a `Chat`. Errors: ValueError saying what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} instead of an object")
    if "messages" in record:
        messages = record["messages"]
    elif "prompt" in record and "completion" in record:
        messages = _side(record["prompt"], "user") + _side(record["completion"], "assistant")
    else:
        raise ValueError(f"the fields are {', '.join(map(repr, record)) or 'none'}, "
                         'but "messages", or "prompt" and "completion", are needed')
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is not a list with at least one message')
    checked = [_message(message, number) for number, message in enumerate(messages, 1)]
    if not any(m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls")) for m in checked):
        raise ValueError("no assistant's message with content, so there is nothing to learn")
    tools = record.get("tools")
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError('"tools" is not a list of JSON schemas')
    return Chat(checked, tools or None)


def _side(value: Any, role: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return value
    raise ValueError('"prompt" and "completion" must be strings, or lists of messages')


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is a {type(message).__name__} instead of an object")
    message = {name: value for name, value in message.items() if value is not None}  # Parquet fills up with nulls
    role = message.get("role")
    if role not in ROLES:
        hint = nearest(role, list(ROLES)) if isinstance(role, str) else ""
        raise ValueError(f'message {number} has the "role" {role!r}{hint}; possible are {", ".join(ROLES)}')
    content = message.get("content", "" if role == "assistant" and message.get("tool_calls") else None)
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f'message {number} has no text in "content"')
    return {**message, "content": content}
