"""The lightning indexer's scores and choice against its equation."""

import pytest
import torch

from pellucid.ops import choose_keys, chosen_mask, index_scores, index_scores_reference
from pellucid.ops import indexer as module


def inputs(B, T, S, H=6, e=12):
    g = torch.Generator().manual_seed(B + T + S)
    return (torch.randn(B, T, H, e, generator=g), torch.randn(B, S, e, generator=g), torch.randn(B, T, H, generator=g))


@pytest.mark.parametrize("shape", [(2, 9, 9), (2, 1, 30), (1, 5, 40), (3, 33, 33)], ids=str)
@pytest.mark.parametrize("limit", [2**24, 500, 1])
def test_scores(shape, limit, monkeypatch):
    """Whatever is held at a time."""
    monkeypatch.setattr(module, "SCORES_LIMIT", limit)
    q, k, w = inputs(*shape)
    got, want = index_scores(q, k, w), index_scores_reference(q, k, w)
    assert got.shape == shape and torch.equal(got.isfinite(), want.isfinite())
    assert (got - want)[want.isfinite()].abs().max() < 1e-5
    assert got[:, 0, shape[2] - shape[1] + 1 :].eq(-torch.inf).all() and got[:, :, 0].isfinite().all()


def test_a_score_by_hand():
    """A negative product counts nothing, a negative weight counts against."""
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).view(1, 1, 3, 2)
    k, w = torch.tensor([[[2.0, -3.0]]]), torch.tensor([[[0.5, 10.0, -4.0]]])
    assert index_scores(q, k, w).item() == 0.5 * 2 + 10 * 0 - 4 * 0
    assert index_scores(q, -k, w).item() == 0.5 * 0 + 10 * 3 - 4 * 1


def test_choice():
    scores = torch.tensor([[[5.0, 1.0, 4.0, 3.0, 2.0]]])
    assert sorted(choose_keys(scores, 2)[0, 0].tolist()) == [0, 2]
    hidden = torch.tensor([[[False, True, True, True, True]]])
    assert sorted(choose_keys(scores, 2, hidden)[0, 0].tolist()) == [2, 3]  # what is hidden takes no place
    assert choose_keys(scores, 9).shape == (1, 1, 5)
    assert chosen_mask(torch.tensor([[[0, 3], [1, 2]]]), 4).int().tolist() == [[[1, 0, 0, 1], [0, 1, 1, 0]]]


def test_no_gradient():
    q, k, w = (t.requires_grad_() for t in inputs(1, 4, 4))
    assert not index_scores(q, k, w).requires_grad
