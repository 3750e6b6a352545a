"""When do two ways to run byte-pair encoding give the same ids on every text?

`tokenizers` joins the pairs that a file lists, first listed first. tiktoken joins any two neighbours whose joined
bytes are a token, lowest id first; and it takes a piece that is a token whole.

Look at the moment when tiktoken makes the token T of two neighbours. Nothing outside T's bytes has been joined with
them, so they went through the same steps as if T stood alone: the two neighbours are always the same pair, the last
step of T alone. Hence the two agree on every text when, for every T that can be made at all, the file lists this
pair, and lists these pairs in the order of ids. A token that no step makes is found only as a whole piece: with
`ignore_merges` by both, without it by neither if it is left out of the ranks.
"""

from __future__ import annotations

from pellucid.tokenizers.bpe import last_split
from pellucid.tokenizers.layout import ByteLevelBPE, NotByteLevel

Splits = dict[bytes, tuple[bytes, bytes]]
NEVER = 1 << 62

MOST_STEPS = 100_000_000
"""To take unreachable tokens apart, which takes the square of their length; Llama 3's take a million."""


def merged_by_rank(bpe: ByteLevelBPE) -> dict[bytes, int]:
    """The ranks that make tiktoken equal to the file; `NotByteLevel`, with the first reason, if none do."""
    ids = bpe.vocab
    if any(bytes([b]) not in ids for b in range(256)):
        raise NotByteLevel("its vocabulary lacks some of the 256 bytes")
    if len(set(ids.values())) < len(ids):
        raise NotByteLevel("two of its tokens share an id")
    listed: dict[bytes, list[tuple[int, bytes, bytes]]] = {}
    # A pair that is listed twice has its last place (the library overwrites the first).
    for (left, right), place in {pair: place for place, pair in enumerate(bpe.merges)}.items():
        listed.setdefault(left + right, []).append((place, left, right))

    ranks, previous, steps = dict(ids), -1, 0
    splits: Splits = {}
    for token in sorted(ids, key=ids.__getitem__):
        if len(token) < 2:
            continue
        merged = _place_of_merge(token, listed.get(token, []), ids, splits)
        if merged is None:
            steps += len(token) ** 2
            if steps > MOST_STEPS:
                raise NotByteLevel("its tokens are too long to prove anything about them")
            if len(last_split(token, ids)) == 2:
                raise NotByteLevel(f"the merge that would make token {ids[token]} is not in the file, or out of order")
            if not bpe.whole_pieces:
                del ranks[token]
        elif merged < previous:
            raise NotByteLevel(f"the merge of token {ids[token]} stands before those of lower ids")
        else:
            previous = merged
    return ranks


def _place_of_merge(token: bytes, candidates: list[tuple[int, bytes, bytes]], ids: dict[bytes, int],
                    splits: Splits) -> int | None:
    """The place in the file of the merge that makes `token`, which is then kept in `splits`.

    Tokens come in the order of ids, so parts that are in `splits` have lower ids.
    """
    for place, left, right in candidates:
        made = all(len(part) == 1 or part in splits for part in (left, right))
        if made and not crossed(left, right, ids, splits):
            splits[token] = left, right
            return place
    return None


def crossed(left: bytes, right: bytes, ids: dict[bytes, int], splits: Splits) -> bool:
    """Whether some merge joins across the boundary before `left` and `right` are complete.

    Walk back in time: undo the younger of the two tokens at the boundary, and ask whether the pair that stood there
    then would have been joined before the undone merges happened. Of equal ids the left one is the older.
    """
    left_until = right_until = NEVER
    while True:
        left_age = ids[left] if len(left) > 1 else -1
        right_age = ids[right] if len(right) > 1 else -1
        if left_age > right_age:
            left_until, left = left_age, splits[left][1]
        elif right_age >= 0:
            right_until, right = right_age, splits[right][0]
        else:
            return False
        joined = ids.get(left + right, NEVER)
        if joined < left_until and joined <= right_until:
            return True
