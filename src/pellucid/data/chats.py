"""Conversations for fine-tuning, from a file of one's own: every line is checked, and an error names it."""

from __future__ import annotations

import json
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
# ShareGPT and its relatives (LLaMA-Factory, Hermes): who speaks in {"from": ..., "value": ...}
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
            "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
            "observation": "tool", "function_response": "tool", "function_call": "assistant"}
FORM = ('{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]} '
        'or {"prompt": "2+2?", "completion": "4"}')


FIELDS = ("messages", "conversations", "system", "prompt", "completion", "tools")  # of a table, what is read
Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """messages: what a chat template takes, with at least one assistant's message; tools: JSON schemas, or None."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @property
    def key(self) -> str:
        """What the assistant answers to at first; all of it where the assistant begins. Splitting by it (`split.divide_by`)
        keeps two answers to the same question on the same side."""
        before = []
        for message in self.messages:
            if message["role"] == "assistant":
                break
            before.append(f"{message['role']}: {message['content']}")
        return "\n".join(before) or str(self.messages)


def read_chats(file: str | Path) -> Iterator[Chat]:
    """Stream the conversations of a .jsonl, .jsonl.gz, .json or .parquet file.

    A record is {"messages": [...]} (with "tools" where there are any), ShareGPT's {"conversations": [{"from": ...,
    "value": ...}]}, or {"prompt": ..., "completion": ...}, both strings or both lists of messages. Content may be a
    string or a list of {"type": "text", "text": ...} parts.
    Errors: BadInput that names file, line and the valid form; also for a missing or an empty file.
    """
    file = Path(file)
    if not file.is_file():
        raise BadInput(*three_parts("error.no_chats", path=file))
    if not file.name.lower().endswith((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json", ".parquet")):
        raise BadInput(f"{file} is neither JSONL nor Parquet", f"its name ends in {file.suffix or 'nothing'}",
                       f"write one JSON object a line into a .jsonl file: {FORM}")
    return _stream(file)


def _stream(file: Path) -> Iterator[Chat]:
    place = ""
    try:
        for place, record in records_of(file, FIELDS):
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
    record = from_sharegpt(record)
    if "messages" in record:
        messages = messages_in(record["messages"], "messages")
    elif "prompt" in record and "completion" in record:
        messages = [*_side(record["prompt"], "user"), *_side(record["completion"], "assistant")]
    else:
        raise ValueError(f"the fields are {', '.join(map(repr, record)) or 'none'}, "
                         'but "messages", or "prompt" and "completion", are needed')
    if not any(m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls")) for m in messages):
        raise ValueError("no assistant's message with content, so there is nothing to learn")
    return Chat(messages, tools_in(record.get("tools")))


def _side(value: Any, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return messages_in(value, "completion" if role == "assistant" else "prompt")
    raise ValueError('"prompt" and "completion" must be strings, or lists of messages')


# --- parts of a record, for all formats of conversations ------------------------------------------------------------------


def messages_in(value: Any, field: str) -> list[Message]:
    """The checked messages of a field. Errors: ValueError saying what is wrong."""
    if not isinstance(value, list) or not value:
        raise ValueError(f'"{field}" is not a list with at least one message')
    return [message_of(message, number) for number, message in enumerate(value, 1)]


def message_of(message: Any, number: int) -> Message:
    """A message with a known role and its content as text. Errors: ValueError."""
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is a {type(message).__name__} instead of an object")
    message = {name: value for name, value in message.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        hint = nearest(role, list(ROLES)) if isinstance(role, str) else ""
        raise ValueError(f'message {number} has the "role" {role!r}{hint}; possible are {", ".join(ROLES)}')
    content = message.get("content", "" if role == "assistant" and message.get("tool_calls") else None)
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        images = isinstance(content, list) and any(isinstance(p, dict) and "image" in str(p.get("type")) for p in content)
        raise ValueError(f'message {number} has no text in "content"' + (": it has images, which these models cannot see"
                                                                         if images else ""))
    return {**message, "content": content}


def tools_in(value: Any) -> list[dict[str, Any]] | None:
    """JSON schemas of tools, also where a column holds them as JSON text. Errors: ValueError."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise ValueError('"tools" is a text that is not JSON') from None
    if value and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise ValueError('"tools" is not a list of JSON schemas')
    return value or None


def from_sharegpt(record: dict[str, Any]) -> dict[str, Any]:
    """{"conversations": [{"from": "human", "value": ...}, ...]} as {"messages": [{"role": "user", "content": ...}, ...]}.

    The same within prompt, completion, chosen and rejected; a "system" text becomes the first message; a
    `function_call` becomes the tool call that its JSON describes. Other records come back as they are.
    Errors: ValueError for an unknown speaker.
    """
    fields = ("conversations", "messages", "prompt", "completion", "chosen", "rejected")
    changed = {name: [_from_sharegpt(m) for m in record[name]] for name in fields
               if isinstance(record.get(name), list) and any(isinstance(m, dict) and "from" in m for m in record[name])}
    changed |= {name: [_from_sharegpt(record[name])] for name in ("chosen", "rejected")
                if isinstance(record.get(name), dict) and "from" in record[name]}
    if "conversations" not in record and not changed:
        return record
    record = {**record, **changed}
    if "conversations" in record:
        record["messages"] = record.pop("conversations")
        system = record.pop("system", None)
        if isinstance(system, str) and system.strip() and isinstance(record["messages"], list):
            record["messages"] = [{"role": "system", "content": system}, *record["messages"]]
    return record


def _from_sharegpt(message: Any) -> Any:
    if not isinstance(message, dict) or "from" not in message:
        return message
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    speaker, text = message["from"], message.get("value")
    if speaker not in SHAREGPT:
        hint = nearest(speaker, list(SHAREGPT)) if isinstance(speaker, str) else ""
        raise ValueError(f'a message is "from" {speaker!r}{hint}; possible are {", ".join(SHAREGPT)}')
    if speaker == "function_call":
        try:
            call = json.loads(str(text))
            calls = [{"type": "function", "function": {"name": c["name"], "arguments": c.get("arguments", {})}}
                     for c in (call if isinstance(call, list) else [call])]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f'a "function_call" is not JSON with a name and arguments: {str(text)[:60]!r}') from None
        return {"role": "assistant", "content": "", "tool_calls": calls, **rest}
    return {"role": SHAREGPT[speaker], "content": text, **rest}
