"""Records out of JSONL, JSON, Parquet and Arrow, streamed; and the text of a record, found by the name of its field."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from pellucid import events
from pellucid.errors import BadInput

TEXT_FIELDS = ("text", "content")
FIELDS = (*TEXT_FIELDS, "messages", "prompt", "completion", "tools")
FORMS = '{"text": "..."}, {"messages": [{"role": "user", "content": "..."}, ...]} or {"prompt": "...", "completion": "..."}'
WINDOW = 1 << 16  # characters of a JSON array in memory at a time
_SPACE = re.compile(r"[ \t\r\n]*")
MAX_LINE = 64 << 20  # bytes; a longer line is no document, and would not fit in memory beside a model


def texts_of(file: Path) -> Iterator[str]:
    """The text of each record of a .jsonl, .jsonl.gz or .parquet file; empty texts are passed over.

    Errors: BadInput that names the file and the line or row.
    """
    for place, record in records_of(file, FIELDS):
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


def records_of(file: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """("line 3" or "row 3", counted from 1, the record) of a file, streamed: memory does not grow with the file.

    .parquet and .arrow are tables; .json holds one array of records, or is read as JSON lines; anything else is JSON
    lines, .gz of them. columns: which of a table's columns are read at all (one of them must be there); None: all.
    """
    name = file.name.lower()
    if name.endswith(".parquet"):
        return _rows(file, columns)
    if name.endswith(".arrow"):
        return _batches(file)
    return _items(file) if name.endswith(".json") and _is_array(file) else _lines(file)


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


def _is_array(file: Path) -> bool:
    with file.open("rb") as f:
        return f.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _items(file: Path) -> Iterator[tuple[str, Any]]:
    """The records of one JSON array, taken one after the other from a window that is read on as needed."""
    decoder, number = json.JSONDecoder(), 0
    with file.open(encoding="utf-8-sig") as f:
        held = _window(f, file, max(WINDOW, 4096))
        at = held.index("[") + 1
        while True:
            at = _behind_space(held, at)
            if held[at : at + 1] == "]" and not number:
                return
            try:
                item, end = decoder.raw_decode(held, at)
                end = _behind_space(held, end)
                if held[end : end + 1] not in (",", "]"):
                    raise ValueError("neither a comma nor the closing bracket follows")
            except (ValueError, RecursionError) as error:
                left = len(held) - at
                new = _window(f, file, max(WINDOW, left)) if left <= MAX_LINE else ""
                if not new:
                    raise BadInput(f"{file}, record {number + 1} is not JSON: {held[at : at + 60]!r}", str(error),
                                   f"write an array of objects, or one a line in a .jsonl file, such as {FORMS}") from error
                held, at = held[at:] + new, 0
                continue
            number += 1
            yield f"record {number}", item
            if held[end] == "]":
                return
            at = end + 1


def _window(opened: TextIO, file: Path, size: int) -> str:
    try:
        return opened.read(size)
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8", str(error), "convert it, for instance with iconv") from error


def _behind_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _rows(file: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    parquet = _pyarrow(file)[0]
    number = 0
    with _told_when_broken(file), parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        wanted = names if columns is None else [name for name in names if name in columns]
        if not wanted:
            raise BadInput(f"{file} has no text column", f"its columns are {', '.join(names)}",
                           f"name the column {' or '.join(TEXT_FIELDS)}")
        for batch in table.iter_batches(batch_size=256, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield f"row {number}", without_nulls(record)


def _batches(file: Path) -> Iterator[tuple[str, Any]]:
    """What `datasets.Dataset.save_to_disk` writes: a stream of record batches."""
    ipc = _pyarrow(file)[1]
    number = 0
    with _told_when_broken(file), file.open("rb") as f, ipc.open_stream(f) as stream:
        for batch in stream:
            for start in range(0, batch.num_rows, 256):
                for record in batch.slice(start, 256).to_pylist():
                    number += 1
                    yield f"row {number}", without_nulls(record)


def without_nulls(value: Any) -> Any:
    """Tables fill records up with nulls, inside messages and arguments of tool calls as well: they are left out."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _pyarrow(file: Path) -> tuple[Any, Any]:
    try:
        import pyarrow.ipc as ipc
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise BadInput(f"cannot read {file}", "Parquet needs the package pyarrow", "pip install 'pellucid[data]'") from error
    return parquet, ipc


@contextlib.contextmanager
def _told_when_broken(file: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk's or the rights' fault, not the file's content
            raise
        raise BadInput(f"{file} is not a whole {file.suffix[1:].capitalize()} file", str(error).split("\n")[0],
                       "download or write it again") from error
