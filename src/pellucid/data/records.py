"""Texts out of JSONL and Parquet: the field is found by its name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pellucid import events
from pellucid.errors import BadInput

TEXT_FIELDS = ("text", "content")
FORMS = '{"text": "..."}, {"messages": [{"role": "user", "content": "..."}]} or {"prompt": "...", "completion": "..."}'
MAX_LINE = 64 << 20  # bytes; a longer line is no document, and would not fit in memory beside a model


def lines_of(file: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of a .jsonl or .jsonl.gz file; empty lines are passed over.

    Errors: BadInput naming file and line for what is not JSON, or for a line of more than 64 MB.
    """
    opened = gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb")
    undecoded = 0
    try:
        with opened as f:
            number = 0
            while line := f.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise BadInput(f"{file}, line {number}: longer than {MAX_LINE >> 20} MB", next="one JSON value a line")
                text = line.decode("utf-8-sig", "replace")
                undecoded += text.count("\ufffd") - line.count("\ufffd".encode())
                if text.strip():
                    yield number, _parse(text, file, number)
    except (EOFError, gzip.BadGzipFile) as error:
        raise BadInput(f"{file} is a broken gzip file", str(error), "download or compress it again") from error
    if undecoded:
        events.note(f"{file.name}: {undecoded} places are not UTF-8, replaced by U+FFFD", "warning")


def _parse(text: str, file: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        shown = text.strip()[:60]
        raise BadInput(f"{file}, line {number} is not JSON: {shown!r}", str(error),
                       f"one JSON object a line, such as {FORMS}") from error


def texts_of_jsonl(file: Path) -> Iterator[str]:
    """The text of each line; empty texts are passed over. Errors: BadInput naming file and line."""
    for number, record in lines_of(file):
        text = text_of(record)
        if text is None:
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise BadInput(f"{file}, line {number} has no text that can be found", f"it has {keys}", f"use {FORMS}")
        if text.strip():
            yield text


def text_of(record: Any) -> str | None:
    """The text of one record: its text field, or its conversation joined by blank lines; None where it has none."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        return None
    for field in TEXT_FIELDS:
        if isinstance(record.get(field), str):
            return record[field]
    if isinstance(record.get("messages"), list):
        parts = [m.get("content") for m in record["messages"] if isinstance(m, dict)]
        return "\n\n".join(part for part in parts if isinstance(part, str)) or None
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return record["prompt"] + "\n\n" + record["completion"]
    return None


def texts_of_parquet(file: Path) -> Iterator[str]:
    """The text column of a Parquet file, some rows at a time."""
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ImportError as error:
        raise BadInput(f"cannot read {file}", "Parquet needs the package pyarrow", "pip install 'pellucid[data]'") from error
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            field = next((name for name in (*TEXT_FIELDS, "messages", "prompt") if name in names), None)
            if field is None or (field == "prompt" and "completion" not in names):
                raise BadInput(f"{file} has no text column", f"its columns are {', '.join(names)}",
                               f"name the column {' or '.join(TEXT_FIELDS)}")
            columns = ["prompt", "completion"] if field == "prompt" else [field]
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    text = text_of(record)
                    if text and text.strip():
                        yield text
    except ArrowException as error:
        raise BadInput(f"{file} is not a whole Parquet file", str(error).split("\n")[0], "download or write it again") from error
