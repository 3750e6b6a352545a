"""What an encoder reads: texts, or pairs of them, with special tokens around, cut to a length, padded to one.

    BERT     [CLS] a [SEP]            [CLS] a [SEP] b [SEP]      types 0 0 0 1 1
    CLIP     <|startoftext|> a <|endoftext|>
    Llama 3  <|begin_of_text|> a

The post-processor of tokenizer.json says so. Rules and results are those of transformers' fast tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pellucid.errors import BadInput
from pellucid.tokenizers import check

if TYPE_CHECKING:
    import torch


class Batch(NamedTuple):
    """Each (B, T) int64: ids; mask, 1 = real token; types, 0 = first text, 1 = second (as BERT counts them)."""

    ids: torch.Tensor
    mask: torch.Tensor
    types: torch.Tensor


class Part(NamedTuple):
    """A piece of a frame: the first text ("A"), the second ("B"), or special ids ("")."""

    text: str
    ids: tuple[int, ...]
    kind: int


class Frame(NamedTuple):
    """What stands around one text, and around two."""

    single: tuple[Part, ...]
    pair: tuple[Part, ...]


BARE = Frame((Part("A", (), 0),), (Part("A", (), 0), Part("B", (), 1)))


def frame_of(post: dict[str, Any] | None) -> Frame:
    """The frame of a tokenizer.json's post-processor.  `BadInput` when it is broken, or none that is known."""
    try:
        return BARE if post is None else _by_processor(post)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        check.broken("the tokenizer's post-processor", f"{type(error).__name__}: {error}")


def _by_processor(post: dict[str, Any]) -> Frame:
    kind = post["type"]
    if kind == "ByteLevel":  # moves offsets only
        return BARE
    if kind == "Sequence":
        frames = [frame for part in post["processors"] if (frame := _by_processor(part)) is not BARE]
        if len(frames) > 1:
            raise BadInput("the tokenizer puts special tokens around a text twice", "which is not supported",
                           "encode with `encode`, which puts none, and add them yourself")
        return frames[0] if frames else BARE
    if kind == "TemplateProcessing":
        return Frame(*(tuple(_template_part(item, post["special_tokens"]) for item in post[name])
                       for name in ("single", "pair")))
    if kind in ("BertProcessing", "RobertaProcessing"):
        start, end = (Part("", (_an_id(post[name][1]),), 0) for name in ("cls", "sep"))
        if kind == "RobertaProcessing":  # both texts are of type 0, and two ends stand between them
            return Frame((start, Part("A", (), 0), end), (start, Part("A", (), 0), end, end, Part("B", (), 0), end))
        single = (start, Part("A", (), 0), end)
        return Frame(single, (*single, Part("B", (), 1), end._replace(kind=1)))
    raise BadInput(f"the tokenizer's post-processor is a {kind!r:.40}", "which is not known here",
                   "encode with `encode`, which puts nothing around a text")


def _template_part(item: dict[str, Any], special: dict[str, Any]) -> Part:
    [(name, value)] = item.items()
    kind = value["type_id"]
    if type(kind) is not int or kind not in (0, 1):
        check.broken("the tokenizer's post-processor", f"it has the token type {kind!r:.40}")
    if name == "Sequence" and value["id"] in ("A", "B"):
        return Part(value["id"], (), kind)
    return Part("", tuple(map(_an_id, special[value["id"]]["ids"])), kind)


def _an_id(value: Any) -> int:
    if not check.is_id(value):
        check.broken("the tokenizer's post-processor", f"it names the token id {value!r:.40}")
    return value


def shorten(a: list[int], b: list[int], room: int, left: bool) -> tuple[list[int], list[int]]:
    """Both cut to `room` tokens together, longest first: the longer one until they are equal, then both in turn.

    left: cut at their beginnings instead of their ends.  Of an odd room the longer text gets the larger half; of equal
    ones the second.

    >>> shorten([1, 2, 3, 4, 5], [6, 7], 4, left=False)
    ([1, 2], [6, 7])
    """
    short, long = sorted((len(a), len(b)))
    if short + long > room:
        long = max(short, room - short)
        if short + long > room:
            short, long = room // 2, room - room // 2
        first, second = (long, short) if len(a) > len(b) else (short, long)
        a, b = (_cut(a, first, left), _cut(b, second, left))
    return a, b


def _cut(ids: list[int], length: int, left: bool) -> list[int]:
    return ids[max(0, len(ids) - length):] if left else ids[:length]


def assemble(parts: Sequence[Part], a: list[int], b: list[int]) -> tuple[list[int], list[int]]:
    """(ids, types) of one row."""
    filled = [({"A": a, "B": b}.get(part.text, part.ids), part.kind) for part in parts]
    return [i for ids, _ in filled for i in ids], [kind for ids, kind in filled for _ in ids]


def pad(rows: Sequence[tuple[list[int], list[int]]], width: int, pad_id: int, left: bool) -> Batch:
    """(B, T) of rows (ids, types) of at most `width` = T tokens."""
    import torch

    def table(columns: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        padded = [[filler] * (width - len(c)) + [*c] if left else [*c] + [filler] * (width - len(c)) for c in columns]
        return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), width)

    return Batch(table([ids for ids, _ in rows], pad_id), table([[1] * len(ids) for ids, _ in rows], 0),
                 table([types for _, types in rows], 0))
