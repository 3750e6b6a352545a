"""Slots that are kept from step to step are what the tables of blocks say, whatever happened on the way."""

import random

import pytest
import torch

from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.engine.slot_table import SlotTable


def expected(r: Request, group: int, size: int, stop: int) -> list[int]:
    return [r.tables[group][i // size] * size + i % size for i in range(stop)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1, 4, 16])
def test_random_steps(seed, size):
    rng = random.Random(seed)
    table = SlotTable(2, size, rows=2, device=torch.device("cpu"))
    alive: list[Request] = []
    blocks = iter(range(10**6))
    for _ in range(150):
        if rng.random() < 0.15 and len(alive) < 5:
            alive.append(Request([1], SamplingParams(), tables=[[], []]))
            hit = rng.randrange(0, 4) * size  # from a prefix cache: nobody told the table of them
            alive[-1].tables, alive[-1].computed = [[next(blocks) for _ in range(hit // size)] for _ in range(2)], hit
        if alive and rng.random() < 0.05:
            table.forget(alive.pop(rng.randrange(len(alive))))
        for r in alive:
            if r.computed > 2 and rng.random() < 0.1:  # refused drafts: places behind are computed again, in other blocks
                r.computed -= 2
                keep = -(-(r.computed + 1) // size)
                r.tables = [t[:keep] for t in r.tables]
            if r.computed > size and rng.random() < 0.1:  # an equal block of the tree in the place of its own
                place = rng.randrange(r.computed // size)
                r.moved = min(r.moved, place)
                for t in r.tables:
                    t[place] = next(blocks)
        group = [r for r in alive if rng.random() < 0.7]
        if not group:
            continue
        counts = [rng.choice([1, 1, 3, 40]) for _ in group]
        for r, count in zip(group, counts, strict=True):
            for t in r.tables:
                t += [next(blocks) for _ in range(-(-(r.computed + count) // size) - len(t))]
        rows = table.follow(group, [r.computed for r in group], [r.computed + n for r, n in zip(group, counts, strict=True)])
        assert len(set(rows)) == len(rows)
        for r, row, count in zip(group, rows, counts, strict=True):
            r.computed += count
            for g in range(2):
                assert table.slots[g][row, : r.computed].tolist() == expected(r, g, size, r.computed)


def test_a_decoding_step_notes_nothing_but_new_blocks(monkeypatch):
    """What a step does for a request does not grow with its context."""
    table, written = SlotTable(1, 16, rows=64, device=torch.device("cpu")), []
    monkeypatch.setattr(table, "_write", lambda rows, places, blocks: written.append(len(rows)))
    requests = [Request([1], SamplingParams(), tables=[list(range(100))]) for _ in range(64)]
    table.follow(requests, [0] * 64, [800] * 64)
    for n in range(800, 816):
        table.follow(requests, [n] * 64, [n + 1] * 64)
    assert written == [64 * 50, 64], "the prompt's blocks, and one each at the border of a block"
