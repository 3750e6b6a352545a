"""The endless stream of batches: every row once an epoch, and exact resume."""

import json

import pytest
import torch

from pellucid.data.packing import Batches, pack_stream
from pellucid.errors import BadInput


def rows(count, first=0):
    return pack_stream([[first + n, first + n + 1000] for n in range(count)], T=1)


def take(batches, count):
    return [batches.next() for _ in range(count)]


def test_every_row_once_an_epoch_in_another_order():
    batches = Batches(rows(12), 4, seed=3)
    epochs = [torch.cat([b.tokens for b in take(batches, 3)]).flatten().tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and batches.epoch == 3
    assert take(Batches(rows(12), 4, seed=4), 1)[0].tokens.tolist() != take(Batches(rows(12), 4, seed=3), 1)[0].tokens.tolist()


def test_parts_of_a_batch_belong_together():
    batch = Batches(rows(12), 5, seed=0).next()
    assert (batch.labels - batch.tokens == 1000).all() and batch.tokens.dtype == torch.int64 and len(batch) == 5


@pytest.mark.parametrize("before", [0, 1, 2, 3, 7, 20])
def test_resumed_equals_uninterrupted(before):
    """Batches of 5 of 12 rows: they end within an epoch, at its end and across it."""
    uninterrupted = Batches(rows(12), 5, seed=9)
    take(uninterrupted, before)
    state = json.loads(json.dumps(uninterrupted.state()))
    expected = take(uninterrupted, 6)
    resumed = Batches(rows(12), 5, seed=9)
    take(resumed, 4)  # wherever it stood before
    resumed.load_state(state)
    for a, b in zip(expected, take(resumed, 6)):
        assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "labels", "positions", "documents"))
    assert resumed.state() == uninterrupted.state()


def test_position_is_in_rows_so_the_batch_size_may_change():
    whole, halves = Batches(rows(10), 4, seed=1), Batches(rows(10), 4, seed=1)
    whole.next()
    halves.load_state(whole.state())
    halves.batch_size = 2
    assert torch.equal(whole.next().tokens, torch.cat([halves.next().tokens, halves.next().tokens]))
    threes = Batches(rows(10), 3, seed=1)
    threes.load_state(whole.state())  # 8 rows, no multiple of 3
    assert torch.equal(threes.next().tokens, whole.next().tokens[:3])


def test_a_batch_larger_than_the_data():
    assert sorted(Batches(rows(3), 7, seed=0).next().tokens.flatten().tolist())[:6] in ([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 2],
                                                                                   [0, 0, 1, 1, 2, 2])


def test_another_seed_or_other_data_is_refused():
    state = Batches(rows(10), 2, seed=1).state()
    for other in (Batches(rows(10), 2, seed=2), Batches(rows(11), 2, seed=1), Batches(rows(10, first=1), 2, seed=1)):
        with pytest.raises(BadInput, match="cannot resume"):
            other.load_state(state)
    with pytest.raises(BadInput):
        Batches(rows(10), 0)
    assert len(Batches(rows(10), 3, seed=-5).next()) == 3


def test_the_same_tokens_with_other_labels_are_other_data():
    """As after a change of the chat template's mask: the order of rows would go on, what is learned would not."""
    mine, other = rows(12), rows(12)
    other.labels[3] = -100
    with pytest.raises(BadInput, match="data is not the one"):
        Batches(other, 4, seed=3).load_state(Batches(mine, 4, seed=3).state())
