"""Records out of JSONL and Parquet, and the text of a record, found by the name of its field."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pellucid import events
from pellucid.errors import BadInput

TEXT_FIELDS = ("text", "content")
FIELDS = (*TEXT_FIELDS, "messages", "prompt", "completion", "tools")
FORMS = '{"text": "..."}, {"messages": [{"role": "user", "content": "..."}, ...]} or {"prompt": "...", "completion": "..."}'
MAX_LINE = 64 << 20  # bytes; a longer line is no document, and would not fit in memory beside a model


def texts_of(file: Path) -> Iterator[str]:
    """The text of each record of a .jsonl, .jsonl.gz or .parquet file; empty texts are passed over.

    Errors: BadInput that names the file and the line or row.
    """
    for place, record in records_of(file):
        text = text_of(record)
        if text is None:
            keys = f"the fields {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise BadInput(f"{file}, {place}: no text can be found", f"it has {keys}", f"use {FORMS}")
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


def records_of(file: Path) -> Iterator[tuple[str, Any]]:
    """("line 3" or "row 3", counted from 1, the record) of a JSONL or Parquet file, streamed."""
    return _rows(file) if file.name.lower().endswith(".parquet") else _lines(file)


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    opened = gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")
    number = undecoded = 0
    with opened as f:
        while line := _line(f, file, number + 1):
            number += 1
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", "replace")
            undecoded += text.count("\ufffd") - line.count("\ufffd".encode())
            if text.strip():
                yield f"line {number}", _parse(text, file, number)
    if undecoded:
        events.note(f"{file.name}: {undecoded} places are not UTF-8, replaced by U+FFFD", "warning")


def _line(opened: Any, file: Path, number: int) -> bytes:
    try:
        line = opened.readline(MAX_LINE + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{file} is a broken gzip file", str(error), "download or compress it again") from error
    if len(line) > MAX_LINE:
        raise BadInput(f"{file}, line {number}: longer than {MAX_LINE >> 20} MB", next="write one JSON object a line")
    return line


def _parse(text: str, file: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        whole = ", as in a .json file" if text.strip() in "[{" else ""
        raise BadInput(f"{file}, line {number} is not JSON: {text.strip()[:60]!r}", str(error),
                       f"write one JSON object a line (not over several lines{whole}), such as {FORMS}") from error


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ImportError as error:
        raise BadInput(f"cannot read {file}", "Parquet needs the package pyarrow", "pip install 'pellucid[data]'") from error
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            columns = [name for name in names if name in FIELDS]  # the others are not even read from the disk
            if not columns:
                raise BadInput(f"{file} has no text column", f"its columns are {', '.join(names)}",
                               f"name the column {' or '.join(TEXT_FIELDS)}")
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", {k: v for k, v in record.items() if v is not None}
    except (ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk's or the rights' fault, not the file's content
            raise
        raise BadInput(f"{file} is not a whole Parquet file", str(error).split("\n")[0],
                       "download or write it again") from error
