"""Train a byte-level BPE tokenizer on a stream of texts, with rustbpe (in Rust, parallel)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import regex

from pellucid.errors import BadInput
from pellucid.tokenizers.bpe import merges_of
from pellucid.tokenizers.layout import AddedToken, ByteLevelBPE
from pellucid.tokenizers.patterns import PELLUCID_PATTERN
from pellucid.tokenizers.vocabularies import END_OF_TEXT

if TYPE_CHECKING:
    from pellucid.tokenizers.tokenizer import Tokenizer

START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

TEXTS_AT_ONCE = 256
"""Texts that rustbpe holds at one time: memory is these and the distinct pieces, never the whole corpus."""

DIGIT_PAIRS = [f"{n:02d}".encode() for n in range(100)]


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str = PELLUCID_PATTERN) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` ids: 256 bytes, the merges, then 3 special and 6 added tokens.

    Where `pattern` cuts digits in pairs (ours does), the first hundred merges are "00" to "99", so every two-digit
    number is one token and its id is 256 + the number, whether or not the texts hold it.

    Raises `BadInput` when `vocab_size` is too small for these, or the texts too few to fill it.
    """
    from pellucid.tokenizers.tokenizer import Tokenizer

    forced = DIGIT_PAIRS if cuts_digits_in_pairs(pattern) else []
    added = len(SPECIAL) + len(WORDS)
    smallest = 256 + len(forced) + added
    if vocab_size < smallest:
        raise BadInput(f"a vocabulary of {vocab_size} is too small",
                       f"256 bytes, {len(forced)} pairs of digits and {added} added tokens need {smallest}",
                       f"ask for {smallest} or more")
    # Some of the forced pairs are learned as well, and dropped: so ask for as many as if none were forced.
    learned = learn(texts, vocab_size - added, pattern)
    reserved = set(forced)
    tokens = [*forced, *(token for token in learned if token not in reserved)][:vocab_size - 256 - added]
    if not learned:
        raise BadInput("there is no text to train a tokenizer on", next="give at least a few kilobytes of text")
    if len(tokens) < vocab_size - 256 - added:
        raise BadInput(f"the text is too short for a vocabulary of {vocab_size}",
                       f"every piece of it is one token after {len(learned)} merges",
                       f"give more text, or ask for at most {256 + len(tokens) + added}")
    return Tokenizer.from_bpe(assemble(tokens, pattern), eos_token=END_OF_TURN, pad_token=END_OF_TEXT,
                              model_input_names=["input_ids", "attention_mask"])


def learn(texts: Iterable[str], vocab_size: int, pattern: str) -> list[bytes]:
    """The merged tokens in the order that rustbpe learns them (see `bpe.train` for the rule); fewer if used up."""
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(_checked(texts), vocab_size, buffer_size=TEXTS_AT_ONCE, pattern=pattern)
    return [bytes(token) for token, _ in trainer.get_mergeable_ranks()[256:]]


def _checked(texts: Iterable[str]) -> Iterator[str]:
    wanted = "give a list or a generator of texts"
    if isinstance(texts, str):
        raise BadInput("train_bpe was given one string", "it would be read as a list of single characters", wanted)
    if not isinstance(texts, Iterable):
        raise BadInput(f"train_bpe was given {type(texts).__name__}, which holds no texts", next=wanted)
    for text in texts:
        if not isinstance(text, str):
            raise BadInput(f"train_bpe was given {type(text).__name__} among its texts", next="decode it to str first")
        yield mended(text)


def mended(text: str) -> str:
    """Half a surrogate pair (a broken file name, a cut JSON escape), which is no Unicode text, becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cuts_digits_in_pairs(pattern: str) -> bool:
    """Whether digits are cut into pieces of at most two, so that a pair of digits is never part of a longer piece.

    Only then can the hundred pairs be put first without changing any other merge: a piece that holds two ASCII
    digits side by side is those two digits, so their merges compete with nothing.

    >>> cuts_digits_in_pairs(PELLUCID_PATTERN), cuts_digits_in_pairs(r"\\p{N}{1,3}|\\P{N}+")
    (True, False)
    """
    return regex.findall(pattern, "1234 a567\n") == ["12", "34", " a", "56", "7", "\n"]


def assemble(tokens: list[bytes], pattern: str) -> ByteLevelBPE:
    """Bytes, then `tokens`, then the added tokens, with ids in that order."""
    vocab = {bytes([b]): b for b in range(256)} | {token: 256 + i for i, token in enumerate(tokens)}
    first = len(vocab)
    added = [AddedToken(first + i, name, special=name in SPECIAL) for i, name in enumerate(SPECIAL + WORDS)]
    return ByteLevelBPE(vocab, merges_of(vocab), pattern, added)
