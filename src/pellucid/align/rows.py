"""Sampled completions laid into rows for the update: no padding between them, each whole in one row.

Legend: N rows, T tokens a row. `documents` hold the completion's number, so that attention stays within it and every
trained position knows whose it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pellucid.data.packing import IGNORE, PADDING, Packed, best_fit
from pellucid.engine import Sample


def pack_completions(samples: Sequence[Sample], T: int | None = None) -> Packed:
    """Rows of prompt + completion; labels only where a sampled token is predicted (`mask`). Sample i is document i.

    T: row length; by default twice the longest sample, which wastes little and keeps attention short.
    """
    sizes = np.array([len(s.prompt) + len(s.tokens) - 1 for s in samples])  # the last token is only a label
    T = max(T or 0, int(sizes.max()) if T else min(2 * int(sizes.max()), int(sizes.sum())))
    row_of, offset_of, rows = best_fit(sizes, T)
    tokens = np.zeros((rows, T), np.int64)
    labels = np.full((rows, T), IGNORE, np.int64)
    positions = np.zeros((rows, T), np.int64)
    documents = np.full((rows, T), PADDING, np.int64)
    for i, (s, row, at, size) in enumerate(zip(samples, row_of, offset_of, sizes)):
        ids, here = s.prompt + s.tokens, slice(at, at + size)
        tokens[row, here] = ids[:-1]
        sampled = s.tokens if s.mask is None else np.where(s.mask, s.tokens, IGNORE)
        labels[row, at + len(s.prompt) - 1 : at + size] = sampled
        positions[row, here] = np.arange(size)
        documents[row, here] = i
    return Packed(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(positions), torch.from_numpy(documents))
