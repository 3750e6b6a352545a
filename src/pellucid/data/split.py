"""Train or held out? The text itself decides, by its hash.

    held out  <=>  blake2b(normalised text) / 2^64 < share

So the answer never depends on file names, order, machine or run; the same text found in two places is always on the
same side; and a corpus that grows keeps the side of every old document. Texts that differ only in line endings,
white space, a byte order mark or Unicode composition count as the same text.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from pellucid import events
from pellucid.data.reading import Document
from pellucid.errors import BadInput

SHARE = 0.05
R = TypeVar("R")
_PARAGRAPH = re.compile(r"\n[ \t]*\n")


def fraction(text: str) -> float:
    """Where `text` falls in [0, 1), uniformly over texts."""
    same = " ".join(unicodedata.normalize("NFC", text.lstrip("\ufeff")).split())
    digest = hashlib.blake2b(same.encode("utf-8", "surrogatepass"), digest_size=8, person=b"pellucid.split")
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53  # 53 bits: exact as a float, never rounded up to 1


def is_heldout(text: str, share: float = SHARE) -> bool:
    """True for about `share` of all texts: those that training must never see."""
    if not 0 <= share <= 1:
        raise BadInput(f"a held-out share of {share} is not possible", next="give a number from 0 to 1, such as 0.05")
    return fraction(text) < share


def divide_by(records: Iterable[R], key: Callable[[R], str], source: object, what: str) -> tuple[list[R], list[R]]:
    """Records as (train, held out) by the hash of their keys: equal keys are on one side, and neither side is empty.

    Where few records all fall on one side, those of the key with the smallest hash are held out, and no others.
    source, what: for the message. Errors: BadInput where there are not two different keys.
    """
    placed = [(fraction(key(record)), record) for record in records]
    held = [place < SHARE for place, _ in placed]
    if not any(held) or all(held):
        least = min((place for place, _ in placed), default=0.0)
        held = [place == least for place, _ in placed]
    sides: tuple[list[R], list[R]] = ([], [])
    for side, (_, record) in zip(held, placed):
        sides[side].append(record)
    if not all(sides):
        raise BadInput(f"{source} holds too few {what}", "one part is held out to measure what was learned",
                       f"give at least two {what} with different prompts")
    return sides


def divide(documents: Iterable[Document], share: float = SHARE) -> tuple[list[Document], list[Document]]:
    """All documents as (train, held out); neither side is empty.

    The rule is `is_heldout`. In a corpus of few documents it may hold out nothing, or far too much (a third of `share`
    or less, three times or more, in characters). Then the documents are cut into about 100 pieces of whole paragraphs,
    and those with the smallest hashes are held out until `share` is reached; a note says so.
    Errors: BadInput where there are not two different pieces of text.
    """
    documents = list(documents)
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        sides[is_heldout(document.text, share)].append(document)
    total = _size(documents)
    if all(sides) and share / 3 < _size(sides[1]) / total < share * 3:
        return sides
    pieces = [piece for document in documents for piece in _pieces(document, max(1, total // 100))]
    train, heldout = _smallest(pieces, share)
    events.note(f"the corpus has only {len(documents)} documents: split by paragraphs instead "
                f"({len(heldout)} of {len(pieces)} pieces are held out)")
    return train, heldout


def _smallest(pieces: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """The pieces with the smallest hashes are held out; equal pieces stay together."""
    order = sorted((fraction(piece.text), number) for number, piece in enumerate(pieces))
    if not order or order[0][0] == order[-1][0]:
        raise BadInput("the corpus is too small to hold some of it out", f"{_size(pieces)} characters, no two different "
                       "paragraphs or lines", "give more text, or (in `pellucid grow`) the default corpus by leaving --corpus out")
    wanted, held, limit = share * _size(pieces), 0, order[0][0]
    for place, number in order:
        if held >= wanted or place == order[-1][0]:
            break
        held, limit = held + len(pieces[number].text), place
    sides: tuple[list[Document], list[Document]] = ([], [])
    for piece in pieces:
        sides[fraction(piece.text) <= limit].append(piece)
    return sides


def _size(documents: list[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _pieces(document: Document, size: int) -> Iterator[Document]:
    """Paragraphs of `document` (lines, where a paragraph is long), joined up to at least `size` characters."""
    held, length = "", 0
    for paragraph in _PARAGRAPH.split(document.text):
        for unit in paragraph.splitlines(keepends=True) if len(paragraph) > 2 * size else [paragraph]:
            held, length = held + unit, length + len(unit)
            if length >= size:
                yield Document(held, document.source)
                held, length = "", 0
        held += "\n\n" if held else ""
    if held.strip():
        yield Document(held, document.source)
