"""Byte-level byte-pair encoding (Sennrich et al., arXiv 1508.07909; on bytes as in GPT-2), written to be read.

The twin of the fast libraries: `train` gives the merges of rustbpe, `encode` the ids of tiktoken and `tokenizers`.

Training. Cut the text into pieces, write each piece as bytes, and repeat: count all adjacent pairs of tokens
inside pieces, and join the most frequent pair into a new token. **Ties** go to the pair with the smallest
(left id, right id), ids being 0..255 for the bytes and 256, 257, ... for the merges in the order learned.
Pairs that overlap themselves count each time they stand side by side: "aaa" holds (a, a) twice.

Encoding. In each piece, join the adjacent pair whose merge was learned first (the leftmost of equals), until
no pair has a merge.

Unicode classes come from the `regex` module, whose tables may know characters newer than the fast libraries'
(letters added after Unicode 16): text made of those may be cut differently. Everything else is equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import regex

from pellucid.tokenizers.patterns import PELLUCID_PATTERN

Pair = tuple[int, int]
Merges = dict[Pair, int]
"""(left id, right id) -> id of the joined token; in the order learned."""


def cut(text: str, pattern: str = PELLUCID_PATTERN) -> list[bytes]:
    """The pieces that tokens never cross, as UTF-8.

    >>> cut("It's 2024!")
    [b'It', b"'s", b' ', b'20', b'24', b'!']
    """
    return [match.group().encode() for match in regex.finditer(pattern, text)]


def join(ids: list[int], pair: Pair, new: int) -> list[int]:
    """`ids` with every `pair`, from the left and without overlap, replaced by `new`.

    >>> join([1, 1, 1, 2], (1, 1), 9)
    [9, 1, 2]
    """
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def train(texts: Iterable[str], vocab_size: int, pattern: str = PELLUCID_PATTERN) -> Merges:
    """At most `vocab_size` - 256 merges; fewer when the pieces are used up (every piece is one token).

    Counts are kept, not recounted: a merge changes only the pieces that hold the pair.
    """
    frequency = Counter(piece for text in texts for piece in cut(text, pattern))
    words = {piece: list(piece) for piece in frequency}
    counts: Counter[Pair] = Counter()
    holders: dict[Pair, set[bytes]] = {}
    for piece, word in words.items():
        _count_in(counts, holders, piece, word, frequency[piece])

    merges: Merges = {}
    while 256 + len(merges) < vocab_size:
        best = max(counts, key=lambda pair: (counts[pair], -pair[0], -pair[1]), default=None)
        if best is None or counts[best] <= 0:
            break
        new = 256 + len(merges)
        merges[best] = new
        for piece in holders.pop(best):
            for pair in pairwise(words[piece]):
                counts[pair] -= frequency[piece]
            words[piece] = join(words[piece], best, new)
            _count_in(counts, holders, piece, words[piece], frequency[piece])
        del counts[best]
    return merges


def _count_in(counts: Counter[Pair], holders: dict[Pair, set[bytes]], piece: bytes, word: list[int], n: int) -> None:
    for pair in pairwise(word):
        counts[pair] += n
        holders.setdefault(pair, set()).add(piece)


def encode_piece(piece: bytes, merges: Merges) -> list[int]:
    """The ids of one piece, which may be any bytes, valid UTF-8 or not."""
    ids = list(piece)
    while len(ids) > 1:
        pair = min(pairwise(ids), key=lambda pair: merges.get(pair, float("inf")))
        if pair not in merges:
            break
        ids = join(ids, pair, merges[pair])
    return ids


def encode(text: str, merges: Merges, pattern: str = PELLUCID_PATTERN) -> list[int]:
    """The ids of `text`; there are no special tokens here."""
    return [i for piece in cut(text, pattern) for i in encode_piece(piece, merges)]


def token_bytes(merges: Merges) -> list[bytes]:
    """What each id stands for: 256 single bytes, then the merges."""
    tokens = [bytes([b]) for b in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def decode(ids: Iterable[int], merges: Merges) -> str:
    """The text; bytes that are no UTF-8 become U+FFFD."""
    tokens = token_bytes(merges)
    return b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace")


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges behind a bare list of tokens (tiktoken's ranks, rustbpe's export), in order of rank.

    Tokens that no merge of two others makes are left out.
    """
    tokens = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    return [(parts[0], parts[1]) for token in tokens if len(parts := last_split(token, ranks)) == 2]


def last_split(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What the bytes of `token` become when neighbours are joined, lowest rank first, short of `token` itself.

    Two parts are the merge that makes the token: the same two wherever it is made, since nothing outside its bytes
    can have been joined with them before. More parts: no merge ever makes it.
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    never = 1 << 62
    while len(parts) > 2:
        lowest, at = never, 0
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], never)
            if rank < lowest:
                lowest, at = rank, i
        if lowest == never:
            break
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts
