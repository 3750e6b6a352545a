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
from collections.abc import Iterable, Iterator

from pellucid import events
from pellucid.data.reading import Document
from pellucid.errors import BadInput

SHARE = 0.05
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


def divide(documents: Iterable[Document], share: float = SHARE) -> tuple[list[Document], list[Document]]:
    """All documents as (train, held out); neither side is empty.

    A corpus of few documents may have none whose hash falls under `share`. Then the documents are cut at paragraphs into
    about 50 pieces, the same rule is applied to the pieces, and the piece with the smallest hash is held out if the
    rule still picks none. This is said as a note. Errors: BadInput when there are not two different pieces of text.
    """
    documents = list(documents)
    sides = _sides(documents, share)
    if all(sides):
        return sides
    pieces = [piece for document in documents for piece in _pieces(document, _size(documents) // 50)]
    fractions = {fraction(piece.text) for piece in pieces}
    if len(fractions) < 2:
        raise BadInput("the corpus is too small to hold some of it out",
                       f"{len(documents)} documents, {_size(documents)} characters, one distinct paragraph",
                       "give more text: --corpus DIR, or the default corpus")
    sides = _sides(pieces, share)
    if not all(sides):
        sides = _sides(pieces, sorted(fractions)[0 if sides[0] else -1], inclusive=bool(sides[0]))
    events.note(f"the corpus has only {len(documents)} documents: held out by paragraphs ({len(pieces)} pieces, "
                f"{len(sides[1])} of them held out)")
    return sides


def _sides(documents: list[Document], limit: float, inclusive: bool = False) -> tuple[list[Document], list[Document]]:
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        place = fraction(document.text)
        sides[place < limit or (inclusive and place == limit)].append(document)
    return sides


def _size(documents: list[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _pieces(document: Document, size: int) -> Iterator[Document]:
    """Whole paragraphs of `document`, joined up to at least `size` characters."""
    held: list[str] = []
    for paragraph in _PARAGRAPH.split(document.text):
        held.append(paragraph)
        if sum(map(len, held)) >= size:
            yield Document("\n\n".join(held), document.source)
            held = []
    if "".join(held).strip():
        yield Document("\n\n".join(held), document.source)
