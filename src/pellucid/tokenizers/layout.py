"""`tokenizer.json`, the file that `tokenizers` and transformers read: its byte-level BPE, in and out.

A byte-level BPE file spells every byte as one printable character (GPT-2's alphabet), names its split pattern,
and lists the vocabulary, the merges and the added tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pellucid.tokenizers.patterns import GPT2_PATTERN, KNOWN_PATTERNS


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in text before anything is cut.

    special: control tokens (end of turn ...), never made from a person's text; the others (`<think>`) are words
    with an id of their own.  plain: none of the file's whitespace or whole-word options is set.
    """

    id: int
    content: str
    special: bool = True
    normalized: bool = False
    plain: bool = True

    @classmethod
    def read(cls, entry: dict[str, Any]) -> AddedToken:
        """From an entry of `added_tokens`."""
        plain = not any(entry.get(option) for option in ("single_word", "lstrip", "rstrip"))
        return cls(entry["id"], entry["content"], entry.get("special", False), entry.get("normalized", False), plain)


@dataclass
class ByteLevelBPE:
    """Everything that decides ids: bytes -> id, merges in order, pattern, NFC or not, added tokens."""

    vocab: dict[bytes, int]
    merges: list[tuple[bytes, bytes]]
    pattern: str
    added: list[AddedToken] = field(default_factory=list)
    nfc: bool = False
    whole_pieces: bool = False
    """A piece that is a token is taken whole, without asking the merges (`ignore_merges`, Llama 3)."""


def byte_alphabet() -> list[str]:
    """The character that spells each byte: itself where printable in Latin-1, else the next one from U+0100 on.

    >>> byte_alphabet()[ord("A")], byte_alphabet()[ord(" ")], byte_alphabet()[0]
    ('A', 'Ġ', 'Ā')
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    alphabet, spare = [], 256
    for byte in range(256):
        alphabet.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return alphabet


SPELL = byte_alphabet()
UNSPELL = {character: byte for byte, character in enumerate(SPELL)}


def spell(token: bytes) -> str:
    """bytes -> the file's spelling."""
    return "".join(map(SPELL.__getitem__, token))


def unspell(word: str) -> bytes:
    """The file's spelling -> bytes; KeyError for a character outside the alphabet."""
    return bytes(map(UNSPELL.__getitem__, word))


def write(bpe: ByteLevelBPE) -> dict[str, Any]:
    """The content of tokenizer.json."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": t.id, "content": t.content, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": t.special} for t in bpe.added],
        "normalizer": {"type": "NFC"} if bpe.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": bpe.pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": bpe.whole_pieces,
            "vocab": {spell(token): i for token, i in sorted(bpe.vocab.items(), key=lambda item: item[1])},
            "merges": [[spell(left), spell(right)] for left, right in bpe.merges]},
    }


class NotByteLevel(ValueError):
    """The file holds another kind of tokenizer; the message says what differs."""


def read(data: dict[str, Any]) -> ByteLevelBPE:
    """The byte-level BPE in a tokenizer.json; `NotByteLevel` when any part of it is something else."""
    model = data["model"]
    # Files written before 2021 leave the type out.
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise NotByteLevel(f"its model is {model.get('type')}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise NotByteLevel(f"it sets {option}")
    if (data.get("decoder") or {}).get("type") != "ByteLevel":
        raise NotByteLevel("its decoder does not join bytes")
    added = [AddedToken.read(t) for t in data.get("added_tokens") or []]
    names = {t.content for t in added}
    try:
        vocab = {unspell(word): i for word, i in model["vocab"].items() if word not in names}
        merges = [_merge(entry) for entry in model["merges"]]
    except KeyError as error:
        raise NotByteLevel(f"its vocabulary holds {error.args[0]!r}, which spells no byte") from error
    return ByteLevelBPE(vocab, merges, _pattern(data.get("pre_tokenizer")), added,
                        _is_nfc(data.get("normalizer")), bool(model.get("ignore_merges")))


def _merge(entry: str | list[str]) -> tuple[bytes, bytes]:
    left, right = entry.split(" ") if isinstance(entry, str) else entry
    return unspell(left), unspell(right)


def _is_nfc(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None:
        return False
    parts = normalizer.get("normalizers", []) if normalizer["type"] == "Sequence" else [normalizer]
    if all(part["type"] == "NFC" for part in parts):
        return bool(parts)
    raise NotByteLevel(f"it normalises with {', '.join(part['type'] for part in parts)}")


def _pattern(pre: dict[str, Any] | None) -> str:
    """The one regular expression that cuts, if it is one that the engines are known to agree on."""
    if pre is None:
        raise NotByteLevel("it does not cut text into pieces")
    parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    *splits, last = parts or [{"type": "nothing"}]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise NotByteLevel("its pieces are not bytes, or a space is put before the text")
    patterns = [_split_pattern(split) for split in splits]
    if last.get("use_regex", True):
        patterns.append(GPT2_PATTERN)
    if len(patterns) != 1:
        raise NotByteLevel(f"it cuts text {len(patterns)} times")
    if patterns[0] not in KNOWN_PATTERNS:
        raise NotByteLevel(f"it cuts text by a pattern that is not on the list of known ones: {patterns[0]}")
    return patterns[0]


def _split_pattern(split: dict[str, Any]) -> str:
    # For a pattern that covers all text, the matches are the pieces under each of these two settings.
    settings = split.get("behavior"), bool(split.get("invert"))
    if split["type"] != "Split" or settings not in {("Isolated", False), ("Removed", True)}:
        raise NotByteLevel(f"it cuts text by {split['type']} with {settings}")
    return split["pattern"].get("Regex", "")
