"""Muon against the SVD, and against a plain implementation of the published algorithm, written here."""

from __future__ import annotations

import pytest
import torch

from pellucid.optim import Muon, orthogonalize

SHAPES = [(32, 32), (48, 16), (16, 48), (8, 8), (40, 3)]


def matrix(rows, cols, seed=0, smallest=0.03):
    """A random matrix whose singular values are spread from 1 down to `smallest` of the largest."""
    g = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(rows, cols, generator=g), full_matrices=False)
    s = torch.logspace(0, torch.log10(torch.tensor(smallest)), min(rows, cols))
    return 5 * u @ torch.diag(s) @ vh


# --- the plain implementation -----------------------------------------------------------------------------------------


def newton_schulz(g, steps=5):
    """One matrix, float64, the iteration of the published post: X <- a X + (b A + c A^2) X, A = X X^T."""
    x = g.double() / (g.double().norm() + 1e-7)
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    for _ in range(steps):
        A = x @ x.T
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x.T if flip else x


class PlainMuon:
    """One matrix at a time; lr may change from step to step."""

    def __init__(self, weights, momentum=0.95, weight_decay=0.0):
        self.weights = [w.double().clone() for w in weights]
        self.buffers = [torch.zeros_like(w) for w in self.weights]
        self.momentum, self.weight_decay = momentum, weight_decay

    def step(self, grads, lr):
        for w, m, g in zip(self.weights, self.buffers, grads):
            g = g.double()
            m.mul_(self.momentum).add_(g, alpha=1 - self.momentum)
            nesterov = (1 - self.momentum) * g + self.momentum * m
            w.mul_(1 - lr * self.weight_decay)
            w.sub_(lr * max(1, w.shape[0] / w.shape[1]) ** 0.5 * newton_schulz(nesterov))


# --- orthogonalize ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_has_the_directions_of_the_svd_and_singular_values_near_one(shape):
    m = matrix(*shape)
    x = orthogonalize(m)
    assert x.shape == m.shape and x.dtype == m.dtype
    s = torch.linalg.svdvals(x)
    assert 0.6 < s.min() and s.max() < 1.3, s
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    inside = u.T @ x @ vh.T  # a polynomial of m: diagonal in its own singular vectors, and positive
    assert (inside - inside.diag().diag()).abs().max() < 1e-3
    assert inside.diag().min() > 0.6
    cosine = (x * (u @ vh)).sum() / x.norm() / (u @ vh).norm()
    assert cosine > 0.97


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_equals_the_plain_iteration(shape):
    torch.testing.assert_close(orthogonalize(matrix(*shape)), newton_schulz(matrix(*shape)).float(), atol=2e-5, rtol=1e-4)


def test_a_batch_is_its_matrices_one_by_one():
    many = torch.stack([matrix(24, 16, seed=i) * 10.0**-i for i in range(5)])  # of very different sizes
    torch.testing.assert_close(orthogonalize(many), torch.stack([orthogonalize(m) for m in many]), atol=1e-5, rtol=0)
    deep = many.view(5, 1, 24, 16)
    torch.testing.assert_close(orthogonalize(deep)[:, 0], orthogonalize(many))


def test_the_size_of_the_gradient_does_not_matter_and_zero_stays_zero():
    m = matrix(16, 24)
    for scale in (1e-3, 1e3, -1.0):
        expected = orthogonalize(m) * (1 if scale > 0 else -1)
        torch.testing.assert_close(orthogonalize(m * scale), expected, atol=1e-4, rtol=0)
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def test_bfloat16_products_keep_the_directions():
    m = matrix(32, 16)
    x = orthogonalize(m, dtype=torch.bfloat16)
    assert x.dtype == torch.float32
    s = torch.linalg.svdvals(x)
    assert 0.5 < s.min() and s.max() < 1.4
    exact = orthogonalize(m)
    assert (x * exact).sum() / x.norm() / exact.norm() > 0.995


# --- steps ------------------------------------------------------------------------------------------------------------


def train(weights, optimizer, steps=6, rates=None, seed=1):
    """Gives the weights random gradients; returns them all. (steps, weights)"""
    g = torch.Generator().manual_seed(seed)
    given = []
    for t in range(steps):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=g)
        if rates:
            for group in optimizer.param_groups:
                group["lr"] = rates[t]
        given.append([w.grad.clone() for w in weights])
        optimizer.step()
    return given


def parameters(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_equal_the_plain_algorithm(decay):
    """Mixed shapes, several of one shape (they share a batch), a learning rate that changes."""
    weights = parameters([(16, 8), (8, 16), (16, 8), (12, 12), (16, 8)])
    plain = PlainMuon(weights, weight_decay=decay)
    rates = [0.02, 0.05, 0.0, 0.1, 0.02, 0.01]
    for grads, lr in zip(train(weights, Muon(weights, lr=1.0, weight_decay=decay), rates=rates), rates):
        plain.step(grads, lr)
    for ours, theirs in zip(weights, plain.weights):
        torch.testing.assert_close(ours.detach(), theirs.float(), atol=1e-4, rtol=0)


def test_a_stacked_weight_with_parts_is_its_matrices_trained_apart():
    parts = (16, 8, 8)
    (stack,) = parameters([(32, 12)])
    plain = PlainMuon(stack.detach().split(parts), weight_decay=0.1)
    grads = train([stack], Muon([dict(params=[stack], parts=[parts])], lr=0.05, weight_decay=0.1))
    for (grad,) in grads:
        plain.step(grad.split(parts), 0.05)
    torch.testing.assert_close(stack.detach(), torch.cat(plain.weights).float(), atol=1e-4, rtol=0)
    (whole,) = parameters([(32, 12)])
    train([whole], Muon([whole], lr=0.05, weight_decay=0.1))
    assert (whole - stack).abs().max() > 1e-2  # as one matrix it would be something else


def test_a_weight_without_gradient_stays_and_gets_no_state():
    weights = parameters([(8, 8), (8, 8)])
    before = weights[1].detach().clone()
    optimizer = Muon(weights, lr=0.1, weight_decay=0.5)
    weights[0].grad = torch.ones(8, 8)
    optimizer.step()
    assert torch.equal(weights[1], before) and weights[1] not in optimizer.state
    assert not torch.equal(weights[0], parameters([(8, 8)])[0])
