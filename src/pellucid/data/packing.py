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

import itertools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pellucid import events
from pellucid.errors import BadInput

IGNORE = -100  # the label of a position that is not trained; PyTorch's cross-entropy skips it by default
PADDING = -1  # the document id of padding
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

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index: Any) -> Packed:
        """The rows at `index` (a slice, a list or an integer tensor)."""
        return Packed(self.tokens[index], self.labels[index], self.positions[index], self.documents[index])

    def to(self, device: torch.device | str) -> Packed:
        moved = (t.to(device, non_blocking=True) for t in (self.tokens, self.labels, self.positions, self.documents))
        return Packed(*moved, report=self.report)


def pack_stream(encoded: Iterable[Sequence[int]], T: int, remainder: str = "drop", pad_id: int = 0) -> Packed:
    """Rows for language modelling, without padding: (N, T), every position trained.

    encoded: one sequence of ids a document, with its end-of-document id (and, where the first token shall be predicted
    too, a start id). A document longer than the rest of the row continues in the next row as a piece of its own: new
    id, positions from 0, and the last position of the row before still predicts its first token. Nothing is predicted
    across documents. remainder: what happens to the last tokens that do not fill a row: "drop" (counted in
    `report.dropped`) or "pad" (one padded row, so that a measurement sees every token).
    Errors: BadInput where there are fewer than T tokens and they may not be padded.
    """
    _check_length(T)
    if remainder not in ("drop", "pad"):
        raise BadInput(f"remainder {remainder!r} is unknown", next="one of drop, pad")
    flat, lengths = _flatten(encoded)
    short = int((lengths < 2).sum())
    if short:
        flat, lengths = flat[np.repeat(lengths >= 2, lengths)], lengths[lengths >= 2]
    ends = np.cumsum(lengths)
    is_input = np.ones(len(flat), bool)
    is_input[ends - 1] = False  # the last token of a document is only ever a label
    inputs, labels = flat[is_input], flat[1:][is_input[:-1]]
    starts = np.zeros(len(inputs), bool)
    starts[ends - lengths - np.arange(len(lengths))] = True
    rows = -(-len(inputs) // T) if remainder == "pad" else len(inputs) // T
    if not rows:
        raise BadInput(f"the text has {len(inputs)} tokens to train on, fewer than one row of {T}",
                       next="give more text (--corpus), or a shorter context")
    used = min(rows * T, len(inputs))
    starts[0:used:T] = True  # a row never continues the piece of the row before
    packed = _grid(inputs[:used], labels[:used], starts[:used], np.arange(used), rows, T, pad_id)
    packed.report = Packing(rows, T, len(lengths), used, used, without_target=short, dropped=len(inputs) - used)
    events.emit(packed.report)
    return packed


def pack_samples(samples: Iterable[Sample], T: int, overlong: str = "refuse", pad_id: int = 0) -> Packed:
    """Rows of whole samples, for fine-tuning: (N, T), best fit decreasing (Johnson et al. 1974).

    samples: (ids, mask) with mask True for each token that the model shall learn to write. Samples are never cut over
    two rows; the free end of a row is padding (documents -1, labels -100). A sample of more than T positions is left
    out (overlong="refuse") or loses its end ("truncate"); one that trains no token is skipped; both are counted.
    Errors: BadInput for a mask of another length, or if no sample is left.
    """
    _check_length(T)
    if overlong not in ("refuse", "truncate"):
        raise BadInput(f"overlong {overlong!r} is unknown", next="one of refuse, truncate")
    samples = list(samples)
    flat, lengths = _flatten([ids for ids, _ in samples])
    masks, mask_lengths = _flatten([mask for _, mask in samples])
    for number in np.flatnonzero(lengths != mask_lengths)[:1]:
        raise BadInput(f"sample {number} has {lengths[number]} ids and a mask of {mask_lengths[number]}",
                       next="give one mask value for each id")
    starts = np.cumsum(lengths) - lengths
    sizes = _useful_lengths(masks.astype(bool), starts, lengths)
    empty, long = sizes == 0, sizes > T
    if overlong == "truncate":
        sizes = _useful_lengths(masks.astype(bool), starts, np.minimum(lengths, T + 1))
        empty = sizes == 0
    kept = np.flatnonzero(~empty & (sizes <= T))
    _tell(len(samples), int(long.sum()), int(empty.sum()), T, overlong)
    if not len(kept):
        raise BadInput(f"none of the {len(samples)} samples can be trained on",
                       f"{long.sum()} are longer than the context of {T}, {empty.sum()} have no token to learn",
                       "use a longer context, or check that the data has assistant messages")
    return _place(flat, masks.astype(bool), starts, sizes, kept, T, pad_id, int(long.sum()), int(empty.sum()))


def _place(flat: np.ndarray, masks: np.ndarray, starts: np.ndarray, sizes: np.ndarray, kept: np.ndarray, T: int,
           pad_id: int, too_long: int, empty: int) -> Packed:
    row_of, offset_of, rows = best_fit(sizes[kept], T)
    order = np.lexsort((offset_of, row_of))  # samples in reading order of the grid
    kept, row_of, offset_of = kept[order], row_of[order], offset_of[order]
    within = _within(sizes[kept])
    source = np.repeat(starts[kept], sizes[kept]) + within
    labels = np.where(masks[source + 1], flat[source + 1], IGNORE)
    target = np.repeat(row_of * T + offset_of, sizes[kept]) + within
    packed = _grid(flat[source], labels, within == 0, target, rows, T, pad_id)
    packed.report = Packing(rows, T, len(kept), len(source), int((labels != IGNORE).sum()), too_long, empty)
    events.emit(packed.report)
    return packed


def best_fit(sizes: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Best fit decreasing: longest first, each into the fullest row that still has room.

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
    row = place // T
    row_begins = np.flatnonzero(np.diff(row, prepend=-1))
    piece -= np.repeat(piece[row_begins], np.diff(np.append(row_begins, len(inputs))))
    full = np.arange(rows * T).shape == place.shape  # no padding: the grid is the flat array itself

    def laid(values: np.ndarray, blank: int) -> torch.Tensor:
        if full:
            return torch.from_numpy(np.ascontiguousarray(values, np.int64).reshape(rows, T))
        grid = np.full(rows * T, blank, np.int64)
        grid[place] = values
        return torch.from_numpy(grid.reshape(rows, T))

    return Packed(laid(inputs, pad_id), laid(labels, IGNORE), laid(index - first, 0), laid(piece, PADDING))


def _flatten(sequences: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All values in one int64 array, and the length of each sequence."""
    arrays = [np.asarray(s, np.int64) for s in sequences]
    lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
    return (np.concatenate(arrays) if arrays else np.zeros(0, np.int64)), lengths


def _within(sizes: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]"""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _useful_lengths(masks: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Positions that each sample needs: up to the one that predicts its last trained token. (S,)

    The first token of a sample is predicted by nothing, so a mask that is True only there trains nothing: 0.
    """
    within = _within(lengths)
    trained = np.where(masks[np.repeat(starts, lengths) + within], within, 0)
    sizes = np.zeros(len(lengths), np.int64)
    filled = lengths > 0
    if filled.any():
        begins = (np.cumsum(lengths) - lengths)[filled]
        sizes[filled] = np.maximum.reduceat(trained, begins)
    return sizes


def _check_length(T: int) -> None:
    if T < 1:
        raise BadInput(f"rows of {T} tokens are not possible", next="give a context of 1 token or more")


def _tell(samples: int, long: int, empty: int, T: int, overlong: str) -> None:
    if long:
        done = "left out" if overlong == "refuse" else "cut"
        events.note(f"{long} of {samples} samples are longer than the context of {T} tokens: {done}", "warning")
    if empty:
        events.note(f"{empty} of {samples} samples have no token to learn: skipped", "warning")


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
        return {"rows_taken": self.rows_taken, "seed": self.seed, "rows": len(self.packed), "check": self._check()}

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
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.packed))
        return self._order

    def _check(self) -> int:
        parts = (self.packed.tokens, self.packed.labels)
        return zlib.crc32(b"".join(itertools.chain(zlib.crc32(t.numpy()).to_bytes(4, "big") for t in parts)))
