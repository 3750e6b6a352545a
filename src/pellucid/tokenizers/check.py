"""Is this a tokenizer at all?  Questions asked of every file before it is used; each answer no is a `BadInput`.

The libraries underneath would crash on some damaged files, hang on others and silently take the rest: a merge of
tokens that do not exist, two tokens of one id, an added token whose id is another than they give it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn, TypeGuard

from pellucid.errors import BadInput

AGAIN = "copy or download the model's folder again"

LARGEST_ID = 1 << 24
"""Sixteen times the largest vocabulary that there is; tables are made of this size."""

LARGEST_FILE = 1 << 28
"""Bytes; the largest tokenizer.json has 35 million."""

LONGEST_WORD = 10_000
"""Of WordPiece, whose time grows with the square of it; BERT's is 100."""


def broken(what: str, why: str) -> NoReturn:
    raise BadInput(f"{what} is broken", why, AGAIN)


def is_id(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < LARGEST_ID


def an_object(value: Any, what: str) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        broken(what, f"it holds {type(value).__name__} where a JSON object belongs")
    return value


def vocabulary(vocab: Any, what: str) -> dict[str, int]:
    """Token -> id, with an id of its own for each."""
    an_object(vocab, what)
    ids = list(vocab.values())
    if not all(map(is_id, ids)):
        bad = next((word, i) for word, i in vocab.items() if not is_id(i))
        broken(what, f"token {bad[0]!r:.80} has the id {bad[1]!r:.40}; an id is a whole number from 0 to {LARGEST_ID - 1}")
    if len(set(ids)) < len(ids):
        seen: dict[int, str] = {}
        for word, i in vocab.items():
            if i in seen:
                broken(what, f"the tokens {seen[i]!r:.60} and {word!r:.60} share the id {i}")
            seen[i] = word
    return vocab


def merges(pairs: Any, vocab: dict[str, int], prefix: str, what: str) -> None:
    """Every merge joins two tokens to a third; as "left right" or ["left", "right"].

    prefix: what continued words begin with, which is dropped where they are joined.
    """
    if not isinstance(pairs, list):
        broken(what, "its merges are no list")
    for place, entry in enumerate(pairs):
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            broken(what, f"merge {place} is {entry!r:.80}, not a pair of tokens")
        left, right = pair
        joined = left + right[len(prefix):]
        if left not in vocab or right not in vocab or joined not in vocab:
            unknown = next(token for token in (left, right, joined) if token not in vocab)
            broken(what, f"merge {place}, {left!r:.60} and {right!r:.60}, names {unknown!r:.60}, which is no token")


def added_tokens(entries: Any, ids: dict[str, int], what: str) -> None:
    """Tokens with a text, and with the id that `tokenizers` gives them: the vocabulary's, else the next that is free.

    ids: of the model's own tokens.
    """
    if not isinstance(entries, list):
        broken(what, "its added_tokens are no list")
    given: dict[str, int] = {}
    for entry in entries:
        content, number = an_object(entry, f"added_tokens in {what}").get("content"), entry.get("id")
        if not isinstance(content, str) or not content or not is_id(number):
            broken(what, f"an added token has the text {content!r:.60} and the id {number!r:.40}")
        if content in given:
            broken(what, f"the added token {content!r:.60} is listed twice")
        given[content] = ids[content] if content in ids else max([len(ids), *(i + 1 for i in given.values())])
        if given[content] != number:
            broken(what, f"its added token {content!r:.60} has the id {number}, where it would get {given[content]}")


def tokenizer(data: Any, what: str) -> dict[str, Any]:
    """The content of a tokenizer.json."""
    model = an_object(data, what).get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise BadInput(f"{what} holds no tokenizer", 'a tokenizer.json has a "model" with a "vocab"', AGAIN)
    words = model["vocab"]
    if isinstance(words, list):  # Unigram: pairs of token and score, the id is the place
        if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in words):
            broken(what, "its vocabulary is no list of tokens and scores")
        ids = {pair[0]: i for i, pair in enumerate(words)}
    else:
        ids = vocabulary(words, what)
    if "merges" in model:
        merges(model["merges"], ids, model.get("continuing_subword_prefix") or "", what)
    added_tokens(data.get("added_tokens") or [], ids, what)
    longest = model.get("max_input_chars_per_word", 100)
    if type(longest) is not int or not 0 < longest <= LONGEST_WORD:
        broken(what, f"it takes words of {longest!r:.40} characters; from 1 to {LONGEST_WORD} make sense")
    return data


def texts(values: Any, what: str) -> list[str]:
    """A list of texts, given by a person."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise BadInput(f"{what} must be a list of texts, not {type(values).__name__}", next='give ["a text", "another"]')
    values = list(values)
    for value in values:
        if not isinstance(value, str):
            raise BadInput(f"{what} hold {type(value).__name__} where a text belongs", next="decode it to str first")
    return values
