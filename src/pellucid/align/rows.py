"""Sampled completions laid into rows for the update: no padding between them, each whole in one row.

Legend: N rows, T tokens a row. `documents` hold the completion's number, so that attention stays within it and every
trained position knows whose it is.

Completions of one prompt can share it. Then it stands in the row once, less its last token, and behind it each completion as a
branch that sees it (`parents`) and none of the others:

    tokens     p0 p1 | p2 a0 a1 | p2 b0 b1 b2        labels   . . | a0 a1 a2 | b0 b1 b2 b3
    positions   0  1 |  2  3  4 |  2  3  4  5        documents 9 9 | 0 0 0 | 1 1 1 1     parents . . | 9 9 9 | 9 9 9 9

Every branch computes what it would behind its own copy of the prompt, and the gradients of the copies add up in the one that is
there. Of a group of G completions of L tokens behind a prompt of P, P + G L tokens are computed in place of G (P + L).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pellucid.data.packing import IGNORE, NONE, PADDING, Packed, best_fit
from pellucid.engine import Sample

LONGEST = 1024
"""Tokens of a row that shares prompts, and at most eight times the longest completion with its prompt; at least twice that."""


def pack_completions(samples: Sequence[Sample], T: int | None = None, share: bool = False) -> Packed:
    """Rows of prompt + completion; labels only where a sampled token is predicted (`mask`). Sample i is document i.

    T: row length; by default twice the longest sample, which wastes little and keeps attention short. share: equal prompts stand in
    a row once (for models that `nn.context.branching` lets); by default the row length that needs the fewest tokens.
    """
    sizes = np.array([len(s.prompt) + len(s.tokens) - 1 for s in samples])  # the last token is only a label
    longest, total = int(sizes.max()), int(sizes.sum())
    if not share:
        return _laid(samples, [[i] for i in range(len(samples))], max(T or 0, longest if T else min(2 * longest, total)))
    most = max(2 * longest, min(8 * longest, LONGEST))
    tried = {max(T, longest)} if T else {min(max(t, longest), most, total) for t in _lengths(samples, longest)}
    plans = {t: _families(samples, t) for t in sorted(tried)}
    rows = {t: best_fit(_sizes(samples, plan), t)[2] for t, plan in plans.items()}
    best = min(rows, key=lambda t: rows[t] * t)
    return _laid(samples, plans[best], best)


def _lengths(samples: Sequence[Sample], longest: int) -> list[int]:
    """Lengths of a row that may fit: of one and two of the largest whole family, and multiples of the longest completion."""
    largest = int(_sizes(samples, _families(samples, None)).max())
    return [largest, 2 * largest, 2 * longest, 3 * longest, 4 * longest, 6 * longest, LONGEST]


def _families(samples: Sequence[Sample], T: int | None) -> list[list[int]]:
    """Samples that share their prompt, as many together as fit in T."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, s in enumerate(samples):
        by_prompt.setdefault(tuple(s.prompt), []).append(i)
    families = []
    for prompt, members in by_prompt.items():
        branches = np.array([len(samples[i].tokens) for i in members])
        place, _, count = best_fit(branches, int(branches.sum()) if T is None else T - len(prompt) + 1)
        families += [[i for i, p in zip(members, place) if p == k] for k in range(count)]
    return families


def _sizes(samples: Sequence[Sample], families: Sequence[Sequence[int]]) -> np.ndarray:
    """Tokens of each family: the prompt less its last token, which begins every branch, and what follows it."""
    return np.array([len(samples[f[0]].prompt) - 1 + sum(len(samples[i].tokens) for i in f) for f in families])


def _laid(samples: Sequence[Sample], families: Sequence[Sequence[int]], T: int) -> Packed:
    row_of, offset_of, rows = best_fit(_sizes(samples, families), T)
    tokens = np.zeros((rows, T), np.int64)
    labels = np.full((rows, T), IGNORE, np.int64)
    positions = np.zeros((rows, T), np.int64)
    documents = np.full((rows, T), PADDING, np.int64)
    parents = np.full((rows, T), NONE, np.int64)
    for number, (family, row, at) in enumerate(zip(families, row_of, offset_of)):
        prompt = samples[family[0]].prompt
        own, shared = len(samples) + number, len(prompt) - 1
        alone = len(family) == 1  # its prompt belongs to the completion
        stem = slice(at, at + shared)
        tokens[row, stem], positions[row, stem] = prompt[:-1], np.arange(shared)
        documents[row, stem] = family[0] if alone else own
        at += shared
        for i in family:
            s = samples[i]
            here = slice(at, at + len(s.tokens))
            tokens[row, here] = prompt[-1:] + s.tokens[:-1]
            labels[row, here] = s.tokens if s.mask is None else np.where(s.mask, s.tokens, IGNORE)
            positions[row, here] = np.arange(shared, shared + len(s.tokens))
            documents[row, here], parents[row, here] = i, NONE if alone else own
            at = here.stop
    return Packed(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(positions), torch.from_numpy(documents),
                  parents=torch.from_numpy(parents) if len(families) < len(samples) else None)
