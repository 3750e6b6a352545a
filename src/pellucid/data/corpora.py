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
import gc
import hashlib
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from pellucid.data.reading import Document, read
from pellucid.errors import BadInput, nearest

__all__ = ["Document", "read", "standard_library"]

Kind = Literal["docs", "source", "both"]
KINDS = get_args(Kind)
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
    if kind not in KINDS:
        raise BadInput(f"unknown kind {kind!r} of the standard library{nearest(kind, list(KINDS))}",
                       next=f"one of {', '.join(KINDS)}")
    root = Path(folder) if folder else Path(sysconfig.get_path("stdlib"))
    files = modules(root)
    if not files:
        raise BadInput("this Python has no standard library as source files", f"no .py files in {root}",
                       "give a text of your own with --corpus DIR, or use a Python from python.org, conda or uv")
    return _sources(root, files) if kind == "source" else _documented(root, files, with_source=kind == "both")


def modules(root: Path) -> list[str]:
    """The files that are used, as names relative to `root` with forward slashes, sorted."""
    found: list[str] = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED_FOLDERS and not name.startswith(SKIPPED_PREFIXES)]
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            name = file.relative_to(root).as_posix()
            if name not in SKIPPED_FILES and not file.name.startswith(SKIPPED_PREFIXES) and _small(file):
                found.append(name)
    return sorted(found)


def _sources(root: Path, files: list[str]) -> Iterator[Document]:
    for name in files:
        text = _read(root / name)
        if text.strip():
            yield Document(text, f"python/{name}")


def _documented(root: Path, files: list[str], with_source: bool) -> Iterator[Document]:
    """The language reference by topic, then the documentation of each module, and its code where asked for.

    A paragraph of `REPEATED` characters or more is given once: several topics contain others whole, and modules copy
    docstrings from each other, so that held-out text would otherwise stand in the training text too.
    """
    seen: set[bytes] = set()
    for name, text in _topics(root / TOPICS):
        yield from _prose(text, f"python/topics/{name}", seen)
    for name in files:
        text = _read(root / name)
        tree = _parse(text)
        if tree is not None:
            docstrings = (ast.get_docstring(node) or "" for node in documented(tree))
            yield from _prose("\n\n".join(docstrings), f"python/docs/{name}", seen)
        if with_source:
            text = without_docstrings(text, tree) if tree is not None else text
            if text.strip():
                yield Document(text, f"python/{name}")


def documented(tree: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The nodes that have a docstring, in the order in which they stand."""
    if isinstance(tree, _Documented) and ast.get_docstring(tree, clean=False) is not None:
        yield tree
    for block in ("body", "orelse", "handlers", "finalbody", "cases"):  # statements only: expressions hold no docstrings
        for child in getattr(tree, block, ()):
            if not isinstance(child, (ast.Expr, ast.Assign, ast.Return)):
                yield from documented(child)


def without_docstrings(text: str, tree: ast.Module) -> str:
    """`text`, whose syntax tree is `tree`, without its docstrings; a body that was only a docstring becomes `...`.

    A docstring that shares a line with code stays.
    """
    lines = [line + "\n" for line in text.split("\n")]  # not splitlines: form feeds end no line in Python's grammar
    for node in documented(tree):
        string = node.body[0]
        first, last = string.lineno - 1, string.end_lineno or string.lineno
        before = lines[first].encode()[: string.col_offset]
        after = lines[last - 1].encode()[string.end_col_offset :].strip()
        if before.strip() or (after and not after.startswith(b"#")):
            continue
        only = len(node.body) == 1 and not isinstance(node, ast.Module)
        lines[first:last] = [before.decode() + "...\n" if only else ""] + [""] * (last - first - 1)
    return "".join(lines)[:-1]


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
    collecting = gc.isenabled()
    gc.disable()  # a tree is a hundred thousand new objects and no cycle: looking for one takes as long as parsing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules are not the reader's concern
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return None
    finally:
        if collecting:
            gc.enable()


def _small(file: Path) -> bool:
    try:
        return file.stat().st_size <= MAX_FILE
    except OSError:  # a link to nothing
        return False
