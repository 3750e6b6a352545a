"""Packing: token sequences of any length laid end to end in rows of T, instead of padded one by one.

Legend: N rows, T tokens a row. A row may hold pieces of several documents:

    tokens     a0 a1 a2 | b0 b1 b2 b3 | .        labels   a1 a2 a3 | b1 b2 b3 b4 | -100
    positions   0  1  2 |  0  1  2  3 | 0        documents 0  0  0 |  1  1  1  1 | -1

Attention must be limited to equal ids in `documents`; then a packed row computes what its documents would alone.
Labels are already shifted: `labels[t]` is the token to predict at position t. The last token of a document has nothing
to predict, so it stands only in the labels (a4 is no input above), and the same holds for the tail of a chat sample
behind its last trained token: under causal attention such a tail cannot change the loss, it only costs time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pellucid import events
from pellucid.errors import BadInput

IGNORE = -100  # the label of a position that is not trained; PyTorch's cross-entropy skips it by default
PADDING = -1  # the document id of padding
NONE = -2  # in place of a parent: a document that goes on from no other
Sample = tuple[Sequence[int], Sequence[bool]]


@dataclass
class Packing(events.Event):
    """What packing did. Utilisation = used / (rows * length)."""

    kind = "packing"
    rows: int
    length: int  # T
    documents: int  # documents or samples placed
    used: int  # positions that hold a token
    targets: int  # positions that are trained
    too_long: int = 0  # samples of more than T tokens, refused or truncated
    without_target: int = 0  # samples or documents with no token to predict, skipped
    dropped: int = 0  # tokens at the end of a stream that did not fill a row

    @property
    def utilisation(self) -> float:
        return self.used / max(1, self.rows * self.length)


@dataclass
class Packed:
    """N rows of T tokens; see the picture at the top of the file."""

    tokens: torch.Tensor  # (N, T) int64
    labels: torch.Tensor  # (N, T) int64, -100 = not trained
    positions: torch.Tensor  # (N, T) int64, from 0 in every document piece
    documents: torch.Tensor  # (N, T) int64, 0, 1, ... within a row; -1 = padding
    report: Packing | None = None
    parents: torch.Tensor | None = None  # (N, T) int64, the document that a token's own goes on from; NONE: it begins by itself

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index: Any) -> Packed:
        """The rows at `index` (a slice, a list or an integer tensor)."""
        return Packed(self.tokens[index], self.labels[index], self.positions[index], self.documents[index],
                      parents=None if self.parents is None else self.parents[index])

    def to(self, device: torch.device | str) -> Packed:
        tokens, labels, positions, documents = (
            part.to(device, non_blocking=True) for part in (self.tokens, self.labels, self.positions, self.documents))
        parents = None if self.parents is None else self.parents.to(device, non_blocking=True)
        return Packed(tokens, labels, positions, documents, self.report, parents)


def pack_stream(encoded: Iterable[Sequence[int]], T: int, remainder: str = "drop", pad_id: int = 0,
                max_tokens: int | None = None) -> Packed:
    """Rows for language modelling, without padding: (N, T), every position trained.

    encoded: one sequence of ids a document, with its end-of-document id (and, where the first token shall be predicted
    too, a start id). A document longer than the rest of the row continues in the next row as a piece of its own: new
    id, positions from 0, and the last position of the row before still predicts its first token. Nothing is predicted
    across documents. max_tokens: `encoded` is read no further once it has given so many (all is held in memory, 32
    bytes a token). remainder: what happens to the last tokens that do not fill a row: "drop" (counted in
    `report.dropped`) or "pad" (one padded row, so that a measurement sees every token).
    Errors: BadInput where there are fewer than T tokens and they may not be padded.
    """
    _check(T, "remainder", remainder, ("drop", "pad"))
    flat, lengths = _flatten(encoded if max_tokens is None else _until(encoded, max_tokens))
    useful = lengths >= 2  # one token alone has nothing to predict and nothing that predicts it
    flat, lengths = flat[np.repeat(useful, lengths)], lengths[useful]
    ends = np.cumsum(lengths)
    is_input = np.ones(len(flat), bool)
    is_input[ends - 1] = False  # the last token of a document is only ever a label
    inputs, labels = flat[is_input], flat[1:][is_input[:-1]]
    starts = np.zeros(len(inputs), bool)
    starts[ends - lengths - np.arange(len(lengths))] = True
    rows = -(-len(inputs) // T) if remainder == "pad" else len(inputs) // T
    if not rows:
        raise BadInput(f"the text has {len(inputs)} tokens to train on, fewer than one row of {T}",
                       next="give more text, or a shorter context")
    used = min(rows * T, len(inputs))
    starts[0:used:T] = True  # a row never continues the piece of the row before
    packed = _grid(inputs[:used], labels[:used], starts[:used], np.arange(used), rows, T, pad_id)
    packed.report = Packing(rows, T, len(lengths), used, used, without_target=int((~useful).sum()),
                            dropped=len(inputs) - used)
    events.emit(packed.report)
    return packed


def pack_samples(samples: Iterable[Sample], T: int, overlong: str = "refuse", pad_id: int = 0) -> Packed:
    """Rows of whole samples, for fine-tuning: (N, T), by best fit decreasing.

    samples: (ids, mask) with mask True for each token that the model shall learn to write. Samples are never cut over
    two rows; the free end of a row is padding (documents -1, labels -100). A sample that needs more than T positions
    is left out (overlong="refuse") or loses its end ("truncate"); one that trains no token is skipped; both are
    counted. Errors: BadInput for a mask of another length than its ids, or if no sample is left.
    """
    _check(T, "overlong", overlong, ("refuse", "truncate"))
    samples = list(samples)
    ids, lengths = _flatten([ids for ids, _ in samples])
    masks, mask_lengths = _flatten([mask for _, mask in samples], bool)
    for number in np.flatnonzero(lengths != mask_lengths)[:1]:
        raise BadInput(f"sample {number} has {lengths[number]} ids and a mask of {mask_lengths[number]}",
                       next="give one mask value for each id")
    begins = np.cumsum(lengths) - lengths
    sizes = _positions_needed(masks, begins, lengths)
    long = sizes > T
    if overlong == "truncate":
        sizes = _positions_needed(masks, begins, np.minimum(lengths, T + 1))
    empty = sizes == 0
    kept = ~empty & (sizes <= T)
    report = Packing(0, T, int(kept.sum()), int(sizes[kept].sum()), 0, int(long.sum()), int(empty.sum()))
    _tell(report, len(samples), overlong)

    row, offset, report.rows = best_fit(sizes[kept], T)
    order = np.lexsort((offset, row))  # samples as they stand in the grid, row by row
    begins, sizes, row, offset = begins[kept][order], sizes[kept][order], row[order], offset[order]
    within = _within(sizes)
    source = np.repeat(begins, sizes) + within
    labels = np.where(masks[source + 1], ids[source + 1], IGNORE)
    packed = _grid(ids[source], labels, within == 0, np.repeat(row * T + offset, sizes) + within, report.rows, T, pad_id)
    report.targets = int((labels != IGNORE).sum())
    packed.report = report
    events.emit(report)
    return packed


def best_fit(sizes: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Best fit decreasing (Johnson et al. 1974): longest first, each into the fullest row that still has room.

    sizes (S,), each 1..T -> row (S,), offset in the row (S,), number of rows. The free spaces that exist are the bits
    of one integer, so the fullest row with room for `size` is the lowest bit at or above `size`.
    """
    row_of, offset_of = np.empty(len(sizes), np.int64), np.empty(len(sizes), np.int64)
    with_room: list[list[int]] = [[] for _ in range(T + 1)]  # free space -> rows
    spaces, rows = 0, 0
    for sample in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[sample])
        fitting = spaces >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = with_room[free].pop()
            if not with_room[free]:
                spaces ^= 1 << free
        else:
            free, row, rows = T, rows, rows + 1
        row_of[sample], offset_of[sample] = row, T - free
        with_room[free - size].append(row)
        spaces |= 1 << (free - size)
    return row_of, offset_of, rows


def _grid(inputs: np.ndarray, labels: np.ndarray, starts: np.ndarray, place: np.ndarray, rows: int, T: int,
          pad_id: int) -> Packed:
    """inputs, labels, starts (True at the first token of a piece), place (index in the grid): all (M,) -> Packed."""
    index = np.arange(len(inputs))
    first = np.maximum.accumulate(np.where(starts, index, 0))
    piece = np.cumsum(starts)
    row_begins = np.flatnonzero(np.diff(place // T, prepend=-1))
    piece -= np.repeat(piece[row_begins], np.diff(row_begins, append=len(inputs)))
    full = len(place) == rows * T  # no padding: the grid is the flat array itself

    def laid(values: np.ndarray, blank: int) -> torch.Tensor:
        if full:
            return torch.from_numpy(values.reshape(rows, T))
        grid = np.full(rows * T, blank, np.int64)
        grid[place] = values
        return torch.from_numpy(grid.reshape(rows, T))

    return Packed(laid(inputs, pad_id), laid(labels, IGNORE), laid(index - first, 0), laid(piece, PADDING))


def _flatten(sequences: Iterable[Sequence[int]], dtype: type = np.int64) -> tuple[np.ndarray, np.ndarray]:
    """All values in one array, and the length of each sequence."""
    arrays: list[np.ndarray] = [np.asarray(sequence, dtype) for sequence in sequences]
    lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
    return (np.concatenate(arrays) if arrays else np.zeros(0, dtype)), lengths


def _until(encoded: Iterable[Sequence[int]], tokens: int) -> Iterator[Sequence[int]]:
    for ids in encoded:
        yield ids
        tokens -= len(ids)
        if tokens <= 0:
            return


def _within(sizes: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]"""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _positions_needed(masks: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Positions of each sample up to the one that predicts its last trained token; 0 where none is trained. (S,)

    Nothing predicts the first token, so a mask that is True only there trains nothing.
    """
    within = _within(lengths)
    trained = np.where(masks[np.repeat(begins, lengths) + within], within, 0)
    sizes = np.zeros(len(lengths), np.int64)
    filled = lengths > 0  # reduceat has no empty segments
    if filled.any():
        sizes[filled] = np.maximum.reduceat(trained, (np.cumsum(lengths) - lengths)[filled])
    return sizes


def _check(T: int, name: str, value: str, choices: tuple[str, ...]) -> None:
    if T < 1:
        raise BadInput(f"rows of {T} tokens are not possible", next="give a context of 1 token or more")
    if value not in choices:
        raise BadInput(f"{name} {value!r} is unknown", next=f"one of {', '.join(choices)}")


def _tell(report: Packing, samples: int, overlong: str) -> None:
    why = (f"{report.too_long} of {samples} samples are longer than the context of {report.length} tokens, "
           f"{report.without_target} have no token to learn")
    if not report.documents:
        raise BadInput("there is no sample to train on", why, "use a longer context, or check the data's assistant messages")
    if report.too_long or report.without_target:
        events.note(f"{why}: the first are {'left out' if overlong == 'refuse' else 'cut'}, the others skipped", "warning")


class Batches:
    """An endless, resumable stream of batches: rows in a new order each epoch.

    The order of epoch e is a function of (seed, e) only, and the position is one number (rows taken so far), so
    `state()` is exact: a stream that loads it goes on with the very batch that the other would have given. A batch
    that reaches the end of an epoch is filled from the next one: every batch has `batch_size` rows.
    """

    def __init__(self, packed: Packed, batch_size: int, seed: int = 0):
        if not len(packed):
            raise BadInput("there are no rows to draw batches from", next="give more data")
        if batch_size < 1:
            raise BadInput(f"a batch of {batch_size} rows is not possible", next="give 1 or more")
        self.packed, self.batch_size, self.seed = packed, batch_size, seed
        self.rows_taken = 0
        self._epoch, self._order = -1, np.zeros(0, np.int64)
        self._check = 0  # of the data, so that a resumed run cannot go on with other data
        for part in (packed.tokens, packed.labels):
            self._check = zlib.crc32(part.cpu().contiguous().numpy().data, self._check)

    @property
    def epoch(self) -> float:
        """Passes over the data so far, with fraction."""
        return self.rows_taken / len(self.packed)

    def next(self) -> Packed:
        """The next `batch_size` rows: tokens, labels, positions, documents, each (batch_size, T)."""
        index: list[np.ndarray] = []
        needed = self.batch_size
        while needed:
            epoch, at = divmod(self.rows_taken, len(self.packed))
            part = self._order_of(epoch)[at : at + needed]
            index.append(part)
            needed -= len(part)
            self.rows_taken += len(part)
        return self.packed.rows(torch.from_numpy(np.concatenate(index)))

    def state(self) -> dict[str, int]:
        """Plain integers, for a checkpoint."""
        return {"rows_taken": self.rows_taken, "seed": self.seed, "rows": len(self.packed), "check": self._check}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken. Errors: BadInput if the data or the seed is another one."""
        mine = self.state()
        for name, what in (("seed", "seed"), ("rows", "number of rows"), ("check", "data")):
            if state[name] != mine[name]:
                raise BadInput(f"cannot resume: the {what} is not the one of the interrupted run",
                               f"{name} was {state[name]}, is {mine[name]}",
                               "resume with the same data and seed, or start a new run")
        self.rows_taken = int(state["rows_taken"])

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed % 2**64, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self.packed))
        return self._order
