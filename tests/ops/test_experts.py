"""Experts: every twin against the loop over experts, values and gradients; the pairs that they work on, by hand."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch import tensor

from pellucid.ops import (
    ExpertWeights,
    Pairs,
    capacity_of,
    choose_experts,
    choose_jit,
    experts,
    experts_few,
    experts_grouped,
    experts_reference,
    experts_sorted,
    gated,
    pairs_by_expert,
    pairs_of_choice,
    route,
)

module = importlib.import_module("pellucid.ops.experts")  # its function stands in front of it
E, D, WIDTH, K = 6, 16, 8, 2
FIELDS = ("gate_up", "down", "gate_up_bias", "down_bias")
GATES = {"silu": ("silu", None), "gelu": ("gelu", None), "clamped": ("silu", (1.702, 1.0))}


def case(N: int, gate: str, bias: bool, dtype=torch.float32, weights=None, width: int = WIDTH):
    """x, logits and weights; expert 4 is never chosen, expert 1 often."""
    g = torch.Generator().manual_seed(N)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    act, clamp = GATES[gate]
    w = ExpertWeights(*(t.to(weights or dtype) for t in (0.3 * draw(E, 2 * width, D), 0.3 * draw(E, D, width))),
                      *((0.5 * draw(E, n)).to(weights or dtype) if bias else None for n in (2 * width, D)), act, clamp)
    logits = draw(N, E) + tensor([0.0, 2.0, 0.0, 0.0, -100.0, 0.0])
    return draw(N, D).to(dtype), logits.to(torch.promote_types(dtype, torch.float32)), w


def each(w, change):
    return replace(w, **{n: None if getattr(w, n) is None else change(getattr(w, n)) for n in FIELDS})


def widened(w):
    return each(w, torch.Tensor.float)


def leaves(x, logits, w):
    """The same, each asking for its gradient."""
    own = lambda t: t.clone().requires_grad_()
    x, logits, w = own(x), own(logits), each(w, own)
    return x, logits, w, [t for t in (x, logits, *(getattr(w, n) for n in FIELDS)) if t is not None]


def run(path, x, logits, w):
    """The result, and the gradients of all that has one."""
    x, logits, w, wanted = leaves(x, logits, w)
    pairs = pairs_by_expert(*route(logits, K, renormalize=True), E)
    assert pairs.counts[4] == 0
    y = path(x, pairs, w)
    pull = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * pull).sum(), wanted)]


def assert_near(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and b.abs().max() > 0
        assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max()


@pytest.fixture(params=["compiled", "plain"])
def kernels(request, monkeypatch):
    """With the kernels of ops.jit between the products, and with PyTorch's operators."""
    if request.param == "plain":
        monkeypatch.setattr(module, "jit_serves", lambda *tensors: False)
    elif not choose_jit().value:
        pytest.skip(choose_jit().reason)
    return request.param


@pytest.mark.parametrize("limit", [None, 7], ids=["one block", "blocks of 7 rows"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_sorted_equals_the_loop(kernels, gate, bias, limit, monkeypatch):
    if limit:
        monkeypatch.setattr(module, "_limit", lambda *sizes: limit)
    inputs = case(23, gate, bias)
    want = run(experts_reference, *inputs)
    assert_near(run(experts_sorted, *inputs), want, 2e-6)
    with torch.no_grad():
        x, logits, w = inputs
        assert_near([experts_sorted(x, pairs_by_expert(*route(logits, K, renormalize=True), E), w)], want[:1], 2e-6)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bfloat16 weights", "float32 weights"])
def test_sorted_in_bfloat16(kernels, weights):
    x, logits, w = case(40, "silu", True, torch.bfloat16, weights)
    got, want = run(experts_sorted, x, logits, w), run(experts_reference, x.float(), logits, widened(w))
    for a, b in zip(got, want, strict=True):  # of the size of bfloat16's rounding, in the mean
        assert (a.float() - b).norm() < 0.01 * b.norm()
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32, *(weights,) * 4]


@pytest.mark.parametrize("gate", GATES)
def test_gradients_of_sorted_against_finite_differences(gate):
    x, logits, w = case(5, gate, True, torch.float64)
    x, logits, w, wanted = leaves(x, logits, w)
    pairs = pairs_by_expert(*route(logits, K), E)
    scales = pairs.weights.detach().requires_grad_()

    def f(x, scales, *matrices):
        return experts_sorted(x, Pairs(pairs.tokens, scales, pairs.counts), ExpertWeights(*matrices, w.act, w.clamp))

    assert torch.autograd.gradcheck(f, (x, scales, *wanted[2:]), fast_mode=True)


def test_only_wanted_gradients_are_made():
    """Frozen experts under a trained router, and the other way round."""
    x, logits, w = case(11, "silu", True)
    pairs = pairs_by_expert(*route(logits.requires_grad_(), K), E)
    (alone,) = torch.autograd.grad(experts_sorted(x, pairs, w).square().sum(), logits)
    x, logits, w, _ = leaves(x, logits.detach(), w)
    y = experts_sorted(x, pairs_by_expert(*route(logits, K), E), w)
    (among,) = torch.autograd.grad(y.square().sum(), logits)
    assert torch.equal(alone, among)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_grouped_equals_the_loop(gate, bias):
    inputs = case(23, gate, bias)
    assert_near(run(experts_grouped, *inputs), run(experts_reference, *inputs), 2e-6)


@pytest.mark.skipif(not choose_jit().value, reason=str(choose_jit()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [1, 2, 9, 40])
@pytest.mark.parametrize(("gate", "bias", "width"), [("silu", False, 8), ("silu", True, 7), ("clamped", True, 8), ("clamped", False, 37)])
def test_few_equals_the_loop(gate, bias, width, N, dtype):
    x, logits, w = case(N, gate, bias, dtype, width=width)
    pairs = pairs_by_expert(*route(logits, K), E)
    got, want = experts_few(x, pairs, w), experts_reference(x.float(), pairs, widened(w))
    assert got.dtype == dtype
    assert_near([got], [want.to(dtype)], 2e-6 if dtype == torch.float32 else 2**-7)  # one rounding, at the end


def test_the_choice_and_its_reason(monkeypatch):
    x, logits, w = case(3, "silu", False)
    pairs = pairs_by_expert(*route(logits, K), E)
    few = "few" if choose_jit().value else "sorted"
    assert choose_experts(x, pairs, w)[0] == few
    assert choose_experts(x.requires_grad_(), pairs, w) == ("sorted", f"6 rows for {sum(n > 0 for n in pairs.counts)} experts: a product for each")
    with torch.no_grad():
        assert choose_experts(x, pairs, w)[0] == few
        assert choose_experts(x, pairs, replace(w, act="gelu"))[0] == "sorted"
        many = pairs_by_expert(*route(logits.repeat(60, 1), K), E)
        assert choose_experts(x.repeat(60, 1), many, w)[0] == "sorted"
    on_meta = x.detach().to("meta")
    assert choose_experts(on_meta, pairs, w)[0] == "grouped"
    assert choose_experts(on_meta[:, :15], pairs, w)[0] == "sorted"


def test_no_pairs_at_all():
    x, logits, w = case(4, "silu", True)
    pairs = pairs_by_expert(*route(logits, K), E, real=torch.zeros(4, dtype=torch.bool))
    assert pairs.counts == [0] * E
    assert torch.equal(experts(x, pairs, w), torch.zeros_like(x))
    y = experts_sorted(x.requires_grad_(), pairs, w)
    assert torch.autograd.grad(y.sum(), x)[0].eq(0).all()


def test_the_clamped_gate_by_hand():
    """gpt-oss: (up + 1) * gate * sigmoid(1.702 gate) after the limits; the gate has no lower one."""
    got = gated(tensor([[9.0, -9.0, 1.0, 9.0, -9.0, 2.0]]), clamp=(1.702, 7.0))
    s = lambda x: 1 / (1 + torch.exp(tensor(-1.702 * x)))
    torch.testing.assert_close(got[0], torch.stack((8 * 7 * s(7.0), -6 * -9 * s(-9.0), 3 * 1 * s(1.0))))


# --- pairs ------------------------------------------------------------------------------------------------------------

CHOSEN = tensor([[0, 2], [2, 0], [0, 1], [0, 2]])
WEIGHTS = tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])


def listed(pairs):
    """[(expert, token, weight)], as they stand."""
    owner = [e for e, n in enumerate(pairs.counts) for _ in range(n)]
    return [(e, t, round(w, 1)) for e, t, w in zip(owner, pairs.tokens.tolist(), pairs.weights.tolist(), strict=True)]


def test_pairs_stand_by_expert_first_choices_first():
    assert listed(pairs_by_expert(WEIGHTS, CHOSEN, 4)) == [
        (0, 0, 0.9), (0, 2, 0.7), (0, 3, 0.6), (0, 1, 0.2), (1, 2, 0.3), (2, 1, 0.8), (2, 0, 0.1), (2, 3, 0.4)]


def test_padding_goes_to_no_expert():
    real = tensor([True, False, True, True])
    assert listed(pairs_by_expert(WEIGHTS, CHOSEN, 4, real)) == [
        (0, 0, 0.9), (0, 2, 0.7), (0, 3, 0.6), (1, 2, 0.3), (2, 0, 0.1), (2, 3, 0.4)]


def test_a_full_expert_drops_second_choices_and_late_tokens():
    assert listed(pairs_by_expert(WEIGHTS, CHOSEN, 4, capacity=2)) == [
        (0, 0, 0.9), (0, 2, 0.7), (1, 2, 0.3), (2, 1, 0.8), (2, 0, 0.1)]
    assert [capacity_of(*sizes) for sizes in ((4, 4, 2, 1.0), (4, 4, 2, 1.25), (5, 4, 1, 1.0), (1, 8, 1, 1.0))] == [2, 3, 2, 1]


def test_dropped_pairs_get_no_gradient():
    weights = WEIGHTS.clone().requires_grad_()
    pairs = pairs_by_expert(weights, CHOSEN, 4, capacity=2)
    pairs.weights.sum().backward()
    assert weights.grad.tolist() == [[1, 1], [1, 0], [1, 1], [0, 0]]


def test_pairs_of_experts_that_chose():
    assert listed(pairs_of_choice(tensor([[0.9, 0.6], [0.7, 0.5]]), tensor([[1, 0], [2, 3]]))) == [
        (0, 1, 0.9), (0, 0, 0.6), (1, 2, 0.7), (1, 3, 0.5)]
