"""WordPiece (Schuster and Nakajima 2012; as in BERT, arXiv 1810.04805), written to be read.

The twin of `tokenizers`' WordPiece: `encode` gives its ids, `decode` its text. Four steps:

1. `clean` control characters away and turn every kind of white space into a space; set a space on each side of a
   Chinese character; strip accents; lower case. (`strip_accents: null` in BERT's files means "as `lowercase`".)
2. `cut` at white space, and on both sides of each punctuation character.
3. `pieces` of each word, greedily: the longest token that the word begins with, then the longest that the rest
   begins with, written with `##` in front. One part without a token, and the whole word is the unknown token;
   so is a word of more than 100 characters.
4. The ids of the pieces. There are no special tokens here: `[CLS] a [SEP]` is `Tokenizer.encode_batch`.

Unicode classes come from Python, whose tables may know characters newer than the fast library's (its accents and
punctuation are those of about 2015): text made of those may be cut differently. Everything else is equal.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence

# As the library has them: the block from U+2B820 on begins 256 characters late there.
CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
           (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))

# What `decode` writes without the space before it.
CLOSED_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
             (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))


def is_space(c: str) -> bool:
    """White space by Unicode; Python counts four separators of teletypes (U+001C to U+001F) besides."""
    return c.isspace() and c not in "\x1c\x1d\x1e\x1f"


def is_control(c: str) -> bool:
    """Control and format characters, private use; tab and the line ends are white space instead."""
    return unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs") and c not in "\t\n\r"


def is_chinese(c: str) -> bool:
    """A character of the blocks that Chinese (and Japanese kanji, Korean hanja) are written in."""
    return any(first <= ord(c) <= last for first, last in CHINESE)


def is_punctuation(c: str) -> bool:
    """Punctuation by Unicode, and the ASCII symbols (`$`, `+`, `~` ...), which Unicode counts as symbols."""
    ascii_symbol = c.isascii() and c.isprintable() and not c.isalnum() and c != " "
    return ascii_symbol or unicodedata.category(c)[0] == "P"


def clean(text: str) -> str:
    """
    >>> clean("a\\x00b\\u200bc\\td")
    'abc d'
    """
    kept = (c for c in text if c not in "\0\ufffd" and not is_control(c))
    return "".join(" " if is_space(c) else c for c in kept)


def spaced(text: str) -> str:
    """
    >>> spaced("a中文b")
    'a 中  文 b'
    """
    return "".join(f" {c} " if is_chinese(c) else c for c in text)


def without_accents(text: str) -> str:
    """
    >>> without_accents("naïve café")
    'naive cafe'
    """
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")


def normalize(text: str, lowercase: bool = True, strip_accents: bool | None = None, chinese: bool = True) -> str:
    """Step 1."""
    text = clean(text)
    text = spaced(text) if chinese else text
    text = without_accents(text) if (lowercase if strip_accents is None else strip_accents) else text
    # Character by character: a final sigma is not told apart.
    return "".join(map(str.lower, text)) if lowercase else text


def cut(text: str) -> list[str]:
    """Step 2.

    >>> cut("don't stop, $5")
    ['don', "'", 't', 'stop', ',', '$', '5']
    """
    words: list[str] = []
    inside = False  # the last word goes on
    for c in text:
        alone = is_punctuation(c)
        if is_space(c) or alone:
            inside = False
        if alone:
            words.append(c)
        elif not is_space(c):
            if inside:
                words[-1] += c
            else:
                words.append(c)
            inside = True
    return words


def pieces(word: str, vocab: Mapping[str, int], unknown: str = "[UNK]", longest: int = 100) -> list[str]:
    """Step 3.

    >>> pieces("unaffable", {"un": 0, "una": 1, "##aff": 2, "##ff": 3, "##able": 4, "##a": 5, "##b": 6})
    ['una', '##ff', '##able']
    """
    if len(word) > longest:
        return [unknown]
    found: list[str] = []
    start = 0
    while start < len(word):
        prefix = "##" if start else ""
        end = next((end for end in range(len(word), start, -1) if prefix + word[start:end] in vocab), None)
        if end is None:
            return [unknown]
        found.append(prefix + word[start:end])
        start = end
    return found


def encode(text: str, vocab: Mapping[str, int], lowercase: bool = True, strip_accents: bool | None = None,
           chinese: bool = True, unknown: str = "[UNK]", longest: int = 100) -> list[int]:
    """The ids of `text`."""
    words = cut(normalize(text, lowercase, strip_accents, chinese))
    return [vocab[piece] for word in words for piece in pieces(word, vocab, unknown, longest)]


def decode(ids: Iterable[int], tokens: Sequence[str]) -> str:
    """Words with a space between them, pieces joined, no space before a full stop; what was lost stays lost.

    tokens: id -> token.
    """
    text = ""
    for place, i in enumerate(ids):
        token = tokens[i]
        if place:
            token = token[2:] if token.startswith("##") else f" {token}"
        for apart, together in CLOSED_UP:
            token = token.replace(apart, together)
        text += token
    return text
