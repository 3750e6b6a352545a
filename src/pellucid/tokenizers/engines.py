"""The fast encoders behind `Tokenizer`: tiktoken where it provably gives the file's ids, else `tokenizers`."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pellucid.errors import BadInput
from pellucid.tokenizers.bpe import cut
from pellucid.tokenizers.check import AGAIN
from pellucid.tokenizers.layout import AddedToken, ByteLevelBPE, NotByteLevel, read, unspell
from pellucid.tokenizers.proof import merged_by_rank
from pellucid.tokenizers.spans import either

LONGEST_SPACE = 200_000
"""Characters of white space that tiktoken may see in a row: at some more its regular expressions run out of stack, and it panics."""


class TiktokenEngine:
    """tiktoken over the ranks of a byte-level BPE."""

    def __init__(self, bpe: ByteLevelBPE, ranks: dict[bytes, int]):
        import tiktoken

        self.nfc, self.pattern = bpe.nfc, bpe.pattern
        self._encoding = tiktoken.Encoding("pellucid", pat_str=bpe.pattern, mergeable_ranks=ranks, special_tokens={})
        self.encode_ordinary = self._encoding.encode_ordinary
        if bpe.nfc:
            from tokenizers import normalizers

            self._library_nfc = normalizers.NFC().normalize_str

    def plain(self, text: str, first: bool = True) -> list[int]:
        """The ids of a text without added tokens."""
        text = self.normal(text) if self.nfc else text
        if len(text) > LONGEST_SPACE and any(m.end() - m.start() > LONGEST_SPACE for m in re.finditer(r"\s+", text)):
            return [i for piece in cut(text, self.pattern) for i in self._encoding._encode_single_piece(piece)]
        return self.encode_ordinary(text)

    def normal(self, text: str) -> str:
        """NFC by the library's tables, which is slow: so only where there is something to do.

        Its tables are older than Python's, so what Python finds normalised it leaves as it is (a test asks for all
        of Unicode); what it would change may differ, and is left to it.
        """
        return text if text.isascii() or unicodedata.is_normalized("NFC", text) else self._library_nfc(text)


class LibraryEngine:
    """Hugging Face `tokenizers`, for everything that is not a byte-level BPE of a known pattern."""

    def __init__(self, data: dict[str, Any]):
        from tokenizers import Tokenizer

        # Padding and truncation of the day the file was made, and what it puts around a text, are not for here.
        data = data | {"padding": None, "truncation": None, "post_processor": None}
        with library_failures():
            # One of each kind, since switching one back and forth would not be safe among threads.
            self.full = Tokenizer.from_str(json.dumps(data))
            self._careful = Tokenizer.from_str(json.dumps(data))
            self._careful.encode_special_tokens = True
            self._bare = Tokenizer.from_str(json.dumps(data | {"added_tokens": []}))
        cutting = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
        self._prepends = any(sign in cutting for sign in ('"Metaspace"', '"Prepend"', '"add_prefix_space": true'))
        added = [AddedToken.read(entry) for entry in data.get("added_tokens") or []]
        # The token of unknown words stands in honest text too.
        unknown = unknown_token(data["model"])
        special = {t.content: t.id for t in added if t.special and t.content != unknown}
        self._special, self._special_texts = set(special.values()), either(special)

    def plain(self, text: str, first: bool = True) -> list[int]:
        """The ids of a text without added tokens; not `first`: no space is put before it."""
        with library_failures():
            return self._safe(text, self._plain(text, first))

    def _plain(self, text: str, first: bool) -> list[int]:
        if first or not self._prepends:
            return self._bare.encode(text, add_special_tokens=False).ids
        # What stands after a newline gets no space in front; then the newline goes.
        newline = self._bare.encode("\n", add_special_tokens=False).ids
        ids = self._bare.encode("\n" + text, add_special_tokens=False).ids
        return ids[len(newline):] if ids[:len(newline)] == newline else self._plain(text, True)

    def encode(self, text: str, allow_special: bool) -> list[int]:
        return self.encode_batch([text], allow_special)[0]

    def encode_batch(self, texts: list[str], allow_special: bool) -> list[list[int]]:
        library = self.full if allow_special else self._careful
        with library_failures():
            found = [found.ids for found in library.encode_batch_fast(texts, add_special_tokens=False)]
            return found if allow_special else list(map(self._safe, texts, found))

    def _safe(self, text: str, ids: list[int]) -> list[int]:
        """`ids`, or other ids of `text` without special tokens: some models (Unigram, whole words) find these as words.

        Such a text is cut inside the names of special tokens; where that is not enough, into single characters.
        """
        if self._special.isdisjoint(ids):
            return ids
        broken = self._special_texts.sub(lambda m: m.group()[0] + BREAK + m.group()[1:], text.replace(BREAK, "\ufffd"))
        for parts in (broken.split(BREAK), list(text)):
            ids = [i for at, part in enumerate(parts) if part for i in self._plain(part, first=at == 0)]
            if self._special.isdisjoint(ids):
                return ids
        raise BadInput("this text cannot be told from a special token", f"{text[:80]!r} is one to this tokenizer",
                       "leave it out, or encode with allow_special=True where you wrote it yourself")


def unknown_token(model: dict[str, Any]) -> str | None:
    """What stands for what the vocabulary lacks: named by its text, or in a Unigram model by its place."""
    place, words = model.get("unk_id"), model.get("vocab")
    if type(place) is int and isinstance(words, list) and 0 <= place < len(words):
        return str(words[place][0])
    return model.get("unk_token")


BREAK = "\ufdd4"
"""A noncharacter, which no exchanged text holds."""


@contextmanager
def library_failures() -> Iterator[None]:
    """What `tokenizers` raises for a file that it cannot use: bare `Exception`s, and panics, which are none."""
    try:
        yield
    except (BadInput, UnicodeEncodeError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadInput("the tokenizer's file cannot be used", f"{type(error).__name__}: {error}"[:300], AGAIN) from error


def choose_engine(data: dict[str, Any]) -> tuple[TiktokenEngine | LibraryEngine, str]:
    """The engine for the content of a tokenizer.json, and why.  ValueError when the content is broken."""
    try:
        bpe = read(data)
        odd = [t.content for t in bpe.added if not t.plain or (t.normalized and bpe.nfc)]
        if odd:
            raise NotByteLevel(f"its added token {odd[0]!r} matches by whitespace, word or normalised text")
        ranks = merged_by_rank(bpe)
    except NotByteLevel as why:
        return LibraryEngine(data), f"tokenizers (the file is no byte-level BPE that tiktoken can run: {why})"
    return TiktokenEngine(bpe, ranks), "tiktoken (a byte-level BPE of a known pattern, merges in the order of ids)"


def token_table(data: dict[str, Any]) -> list[bytes | None] | None:
    """id -> bytes where each token stands for bytes of its own (a ByteLevel decoder), else None.

    A word's last token in CLIP's vocabulary (`cat</w>`) stands for its bytes and a space.
    """
    if (data.get("decoder") or {}).get("type") != "ByteLevel" or not isinstance(data["model"].get("vocab"), dict):
        return None
    vocab, added = data["model"]["vocab"], data.get("added_tokens") or []
    suffix = data["model"].get("end_of_word_suffix") or ""
    table: list[bytes | None] = [None] * (1 + max([*vocab.values(), *(t["id"] for t in added)], default=-1))
    for word, number in vocab.items():
        last = bool(suffix) and word.endswith(suffix)
        try:
            table[number] = unspell(word.removesuffix(suffix)) + b" " * last
        except KeyError:  # a token that is text, not bytes (an added token listed in the vocabulary)
            table[number] = word.encode()
    for token in added:
        table[token["id"]] = token["content"].encode()
    return table
