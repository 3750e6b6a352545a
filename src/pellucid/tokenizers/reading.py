"""The files of tokenizers, read: each of a sensible size, and broken ones refused with the place that is wrong."""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from pellucid.errors import BadInput
from pellucid.tokenizers import check


def read_bytes(path: Path) -> bytes:
    """A file of a sensible size."""
    try:
        if path.stat().st_size > check.LARGEST_FILE:
            check.broken(str(path), f"it has {path.stat().st_size} bytes, and no tokenizer needs {check.LARGEST_FILE}")
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read", str(error.strerror), "check the file's permissions") from error


def read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        check.broken(str(path), f"it is not UTF-8: {error}")


def read_json(path: Path) -> Any:
    """None when there is no such file."""
    if not path.is_file():
        return None
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and brackets without end
        check.broken(str(path), f"it is not JSON: {error}")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one when there is no such file."""
    content = read_json(path)
    return {} if content is None else check.an_object(content, str(path))


def read_merges(path: Path) -> list[list[str]]:
    """One pair a line; a line of comment on top."""
    lines = read_text(path).split("\n")
    return [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]


def read_ranks(path: Path) -> dict[bytes, int]:
    """token -> rank: lines of the token's bytes in base64, a space, and the rank, which counts from 0."""
    ranks: dict[bytes, int] = {}
    for place, line in enumerate(read_bytes(path).splitlines()):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            number = int(rank)
            raw = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error) as error:
            check.broken(str(path), f"line {place + 1} is no token in base64 with its rank: {error}")
        if not raw or raw in ranks or number != len(ranks):
            check.broken(str(path), f"line {place + 1} is empty, repeats a token, or has rank {number} instead of {len(ranks)}")
        ranks[raw] = number
    if any(bytes([b]) not in ranks for b in range(256)):
        check.broken(str(path), "some of the 256 bytes are no token of it")
    return ranks


# White space by Unicode, as the library strips it.
_SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"


def read_lines(path: Path) -> dict[str, int]:
    """One token a line, the id is the number of the line; of equal tokens the last counts, as in the library."""
    lines = read_text(path).removesuffix("\n").split("\n")
    return {line.rstrip(_SPACES): i for i, line in enumerate(lines)}
