"""Text that every machine has without a download: the standard library of the running Python.

Two kinds. "source" is the modules' code, whole files. "docs" is English prose: module documentation and docstrings,
joined a module a document, and the language reference that `help()` shows (pydoc's topics). Nothing is imported or
run; files are parsed with `ast`. "both" gives every text once: the docs, and the sources without their docstrings, so
that no held-out text of one kind stands in a training text of the other.

Left out, because they would flatter or spoil a measurement:
  site-packages, dist-packages   not the standard library, differs on every machine
  test, tests, idle_test         test suites: most of the bytes, repetitive, often not installed
  idlelib, turtledemo            a GUI editor with its help files, demonstrations: often not installed
  encodings                      some hundred nearly equal tables: held-out files would have twins in training
  _sysconfigdata*, config-*      generated; holds paths of this machine
  ensurepip/_bundled, lib2to3    wheels; a copy of the tokenizer and parser, gone from newer Pythons
  tables                         pydoc_data/topics.py (its text is in "docs"), html/entities.py, files above 1 MB
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pellucid.data.reading import Document, read
from pellucid.errors import BadInput, nearest

__all__ = ["Document", "docs", "read", "source", "standard_library"]

Kind = Literal["docs", "source", "both"]
TOPICS = "pydoc_data/topics.py"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "turtledemo", "encodings",
                   "_bundled", "lib2to3", "__pycache__", "lib-dynload", "__phello__"}
SKIPPED_FILES = {TOPICS, "html/entities.py"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
MAX_FILE = 1 << 20  # bytes
SHORTEST = 200  # characters; a module with less documentation makes no document
REPEATED = 40  # characters; a paragraph this long is taken once, wherever it stands again
_Documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def standard_library(kind: Kind = "docs", folder: str | Path | None = None) -> Iterator[Document]:
    """Stream the standard library as documents, in an order that is the same on every call.

    folder: where the library lies; by default where `sysconfig` says. Errors: BadInput for an unknown kind, and where
    this Python came without its sources (embedded or frozen builds).
    """
    kinds = {"docs": docs, "source": source, "both": _both}
    if kind not in kinds:
        raise BadInput(f"unknown kind {kind!r} of the standard library{nearest(kind, list(kinds))}",
                       next=f"one of {', '.join(kinds)}")
    root = Path(folder) if folder else Path(sysconfig.get_path("stdlib"))
    files = modules(root)
    if not files:
        raise BadInput("this Python has no standard library as source files", f"no .py files in {root}",
                       "give a text of your own with --corpus DIR, or use a Python from python.org, conda or uv")
    return kinds[kind](root, files)


def modules(root: Path) -> list[str]:
    """The files that are used, as names relative to `root` with forward slashes, sorted."""
    found: list[str] = []
    for file in root.rglob("*.py"):
        name = file.relative_to(root)
        left_out = SKIPPED_FOLDERS.intersection(name.parts[:-1]) or any(p.startswith(SKIPPED_PREFIXES) for p in name.parts)
        if not left_out and name.as_posix() not in SKIPPED_FILES and file.stat().st_size <= MAX_FILE:
            found.append(name.as_posix())
    return sorted(found)


def source(root: Path, files: list[str]) -> Iterator[Document]:
    """Whole source files."""
    for name in files:
        text = _read(root / name)
        if text.strip():
            yield Document(text, f"python/{name}")


def docs(root: Path, files: list[str]) -> Iterator[Document]:
    """English prose: the language reference by topic, then the documentation of each module.

    A paragraph of `REPEATED` characters or more is given once: several topics contain others whole, and modules copy
    docstrings from each other, so that held-out text would otherwise stand in the training text too.
    """
    seen: set[bytes] = set()
    for name, text in _topics(root / TOPICS):
        yield from _prose(text, f"python/topics/{name}", seen)
    for name in files:
        tree = _parse(_read(root / name))
        if tree is not None:
            yield from _prose("\n\n".join(docstrings(tree)), f"python/docs/{name}", seen)


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Docstrings in the order in which they stand, without their indentation."""
    if isinstance(tree, _Documented):
        text = ast.get_docstring(tree, clean=False)
        if text and text.strip():
            yield inspect.cleandoc(text)
    for block in ("body", "orelse", "handlers", "finalbody"):  # statements only: expressions hold no docstrings
        for child in getattr(tree, block, ()):
            if not isinstance(child, (ast.Expr, ast.Assign, ast.Return)):
                yield from docstrings(child)


def without_docstrings(text: str) -> str:
    """`text` with the lines of its docstrings taken out; a body that was only a docstring becomes `...`."""
    tree = _parse(text)
    if tree is None:
        return text
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and ast.get_docstring(node, clean=False) is not None:
            expression = node.body[0]
            first, last = expression.lineno - 1, expression.end_lineno
            alone = not lines[first][: expression.col_offset].strip() and last < len(lines)
            if not alone:  # def f(): "doc"
                continue
            only = len(node.body) == 1 and not isinstance(node, ast.Module)
            lines[first:last] = [" " * expression.col_offset + "...\n" if only else ""] + [""] * (last - first - 1)
    return "".join(lines)


def _both(root: Path, files: list[str]) -> Iterator[Document]:
    yield from docs(root, files)
    for document in source(root, files):
        text = without_docstrings(document.text)
        if text.strip():
            yield Document(text, document.source)


def _topics(file: Path) -> list[tuple[str, str]]:
    """The entries of pydoc's topics, longest first: whole chapters come before the sections that they contain."""
    if not file.is_file():
        return []
    tree = _parse(_read(file))
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Dict):
            entries = ast.literal_eval(node)
            return sorted(entries.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    return []


def _prose(text: str, name: str, seen: set[bytes]) -> Iterator[Document]:
    kept = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        same = " ".join(paragraph.split())
        if len(same) >= REPEATED:
            digest = hashlib.blake2b(same.encode("utf-8", "surrogatepass"), digest_size=12).digest()
            if digest in seen:
                continue
            seen.add(digest)
        if same:
            kept.append(paragraph.rstrip())
    prose = "\n\n".join(kept) + "\n"
    if len(prose) >= SHORTEST:
        yield Document(prose, name)


def _read(file: Path) -> str:
    """Source text as Python itself decodes it; the empty text for a file that cannot be read or decoded."""
    try:
        with tokenize.open(file) as f:
            return f.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


def _parse(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules are not the reader's concern
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return None
