"""Documents from files and folders: plain text, Markdown, source code, JSONL and Parquet, streamed.

Nothing here holds a large file whole: a text longer than `PIECE` characters arrives as several documents, cut at blank
lines where there are any. Order is by name, so the same folder always gives the same stream.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pellucid import events
from pellucid.errors import BadInput, nearest
from pellucid.messages import add, three_parts

add({
    "error.no_text": ("there is no file or folder {path}", "没有文件或目录 {path}"),
    "error.no_text.next": ("check the path of the text", "检查文本路径"),
})
PIECE = 1 << 20  # characters
KINDS: dict[str, tuple[str, ...]] = {
    "text": (".txt", ".text"),
    "markdown": (".md", ".markdown", ".rst", ".adoc"),
    "source": (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".go", ".rs", ".java", ".kt", ".scala",
               ".js", ".mjs", ".jsx", ".ts", ".tsx", ".rb", ".php", ".swift", ".lua", ".jl", ".r", ".pl", ".sh", ".sql",
               ".hs", ".ml", ".zig", ".cs", ".html", ".css", ".tex", ".toml", ".yaml", ".yml"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"),
    "parquet": (".parquet",),
}
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}  # beside all hidden ones
_UNDECODED = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, slots=True)
class Document:
    """One text that stands alone, and where it came from (a name for people, not a path to open)."""

    text: str
    source: str


def read(path: str | Path, kinds: Iterable[str] = tuple(KINDS)) -> Iterator[Document]:
    """Stream the documents of a file or a folder (with its folders).

    kinds: which of text, markdown, source, jsonl, parquet. A file named directly is read as its suffix says, and as
    text where the suffix is unknown. Hidden files and folders, caches, installed packages and binary files are left
    out; a folder reached twice through links is read once. Bad UTF-8 becomes U+FFFD and is counted in a note.
    Errors: BadInput at once where the path or a kind is wrong, and at the end where nothing held any text.
    """
    path, wanted = Path(path), tuple(kinds)
    for kind in wanted:
        if kind not in KINDS:
            raise BadInput(f"unknown kind of file {kind!r}{nearest(kind, list(KINDS))}", next=f"one of {', '.join(KINDS)}")
    if not path.exists():
        raise BadInput(*three_parts("error.no_text", path=path))
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise BadInput(f"cannot read the folder {path}", "no permission", "choose another folder, or change its rights")
    return _stream(path, wanted)


def _stream(path: Path, kinds: tuple[str, ...]) -> Iterator[Document]:
    files = [(path, kind_of(path) or "text")] if path.is_file() else list(files_in(path, kinds))
    found = 0
    for file, kind in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        for document in _open(file, kind, name, alone=path.is_file()):
            found += 1
            yield document
    if not found:
        suffixes = " ".join(s for kind in kinds for s in KINDS[kind])
        raise BadInput(f"no text found in {path}", f"{len(files)} files with a known suffix, all empty" if files else
                       f"no file with a known suffix ({suffixes})", "give another path, or rename the files")


def _open(file: Path, kind: str, name: str, alone: bool) -> Iterator[Document]:
    from pellucid.data import records

    try:
        if kind in ("jsonl", "parquet"):
            yield from (Document(text, name) for text in records.texts_of(file))
        elif looks_binary(file):
            if alone:
                raise BadInput(f"{file} is not text", "it holds zero bytes", "give .txt, .md, source, .jsonl or .parquet")
            events.note(f"{name}: skipped, it is not text")
        else:
            yield from (Document(text, name) for text in texts_of_file(file, name))
    except OSError as error:
        if alone:
            raise BadInput(f"cannot read {file}", error.strerror or str(error), "check the file and its rights") from error
        events.note(f"{name}: skipped, {error.strerror or error}", "warning")


def kind_of(path: Path) -> str | None:
    """The kind that the file's suffix names, or None."""
    name = path.name.lower()
    return next((kind for kind, suffixes in KINDS.items() if name.endswith(suffixes)), None)


def files_in(folder: Path, kinds: Iterable[str] = tuple(KINDS)) -> Iterator[tuple[Path, str]]:
    """(file, kind) below `folder`, by name; each real file once, whatever links lead to it."""
    wanted, seen = set(kinds), set()

    def walk(place: Path) -> Iterator[tuple[Path, str]]:
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            events.note(f"{place}: skipped, {error.strerror or error}", "warning")
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            real = os.path.realpath(entry.path)
            kind = kind_of(Path(entry.name))
            if real in seen:
                continue
            if _is(entry.is_dir) and entry.name not in SKIPPED_FOLDERS:
                seen.add(real)
                yield from walk(Path(entry.path))
            elif kind in wanted and _is(entry.is_file):
                seen.add(real)
                yield Path(entry.path), kind

    seen.add(os.path.realpath(folder))
    yield from walk(Path(folder))


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a link that goes in circles
        return False


def looks_binary(file: Path) -> bool:
    """A zero byte among the first 8 kB, unless a byte order mark says UTF-16."""
    with file.open("rb") as f:
        head = f.read(8192)
    return b"\0" in head and not head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def texts_of_file(file: Path, name: str | None = None) -> Iterator[str]:
    """The text of `file` in pieces of at most about `PIECE` characters; an empty file gives none."""
    with file.open("rb") as f:
        head = f.read(3)
    utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    undecoded = 0
    with file.open(encoding="utf-16" if utf16 else "utf-8-sig",
                   errors="replace" if utf16 else "surrogateescape") as f:
        for piece in pieces_of(f):
            clean, bad = _UNDECODED.subn("\ufffd", piece)
            undecoded += bad
            if clean.strip():
                yield clean
    if undecoded:
        events.note(f"{name or file.name}: {undecoded} bytes are not UTF-8, replaced by U+FFFD", "warning")


def pieces_of(stream: TextIO, size: int = PIECE) -> Iterator[str]:
    """Cut a stream into pieces of at most `size`: at the last blank line, else the last line end, else anywhere."""
    held = ""
    while more := stream.read(size - len(held)):
        held += more
        if len(held) < size:
            continue
        cut = held.rfind("\n\n", size // 2) + 2
        cut = cut if cut > 1 else held.rfind("\n", size // 2) + 1 or size
        yield held[:cut]
        held = held[cut:]
    if held:
        yield held
