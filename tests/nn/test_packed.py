"""Packed documents equal the same documents by themselves: logits and gradients."""

import pytest
import torch
from small_specs import SPECS, assert_equal, built, tokens

from pellucid.ops import chunked_cross_entropy

LENGTHS = ((9, 1, 13, 70), (30, 63), (93,))  # three rows of 93 tokens: longer than one tile of attention


def packed():
    """(tokens, positions, documents) of the rows, and the documents one by one as (row, start, end)."""
    x = tokens(3, 93)
    positions, documents, pieces = torch.empty_like(x), torch.empty_like(x), []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for i, n in enumerate(lengths):
            positions[row, start : start + n], documents[row, start : start + n] = torch.arange(n), i
            pieces.append((row, start, start + n))
            start += n
    return x, positions, documents, pieces


@pytest.mark.parametrize("name", SPECS)
def test_logits_and_gradients(name):
    model = built(name)
    x, positions, documents, pieces = packed()
    labels = tokens(3, 93, seed=1)
    together = model.hidden(x, positions=positions, documents=documents)
    loss = chunked_cross_entropy(together.flatten(0, 1), model.head_weight, labels.flatten())
    want_loss, apart = 0.0, []
    for row, a, b in pieces:
        hidden = model.hidden(x[row : row + 1, a:b])
        apart.append((row, a, b, hidden[0]))
        want_loss = want_loss + chunked_cross_entropy(hidden[0], model.head_weight, labels[row, a:b])
    for row, a, b, hidden in apart:
        assert_equal(together[row, a:b], hidden)
        assert_equal(model.logits(together[row, a:b]), model.logits(hidden))
    parameters = list(model.parameters())
    got, want = torch.autograd.grad(loss, parameters), torch.autograd.grad(want_loss, parameters)
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0
        assert_equal(a / b.abs().max(), b / b.abs().max())


def test_a_neighbour_changes_nothing_and_its_own_past_does():
    model = built("qwen3")
    x, positions, documents, _ = packed()
    with torch.no_grad():
        before = model(x, positions=positions, documents=documents)
        y = x.clone()
        y[0, :9] = (y[0, :9] + 1) % 61  # the first document of row 0
        after = model(y, positions=positions, documents=documents)
    assert torch.equal(before[0, 9:], after[0, 9:]) and torch.equal(before[1:], after[1:])
    assert (before[0, :9] - after[0, :9]).abs().min(-1).values.max() > 0


def test_padding_is_a_document_of_its_own():
    model = built("qwen3")
    x, positions, documents, _ = packed()
    documents[1, 30:] = -1
    with torch.no_grad():
        rows = model(x, positions=positions, documents=documents)
        assert rows.isfinite().all()
        assert_equal(rows[1, :30], model(x[1:2, :30])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations(dtype):
    """Float32 weights under half-precision activations: within 3 % of the float32 hidden states, gradients float32."""
    model = built("qwen3")
    x, positions, documents, _ = packed()
    want = model.hidden(x, positions=positions, documents=documents)
    grads = torch.autograd.grad(want.square().mean(), list(model.parameters())[:-1])
    model.compute_dtype = dtype
    got = model.hidden(x, positions=positions, documents=documents)
    assert got.dtype == dtype
    assert (got.float() - want).norm() < 0.03 * want.norm()
    for a, b in zip(torch.autograd.grad(got.float().square().mean(), list(model.parameters())[:-1]), grads, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.1 * b.norm()
