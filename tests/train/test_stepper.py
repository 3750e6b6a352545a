"""One step: the cut into micro-batches changes nothing, gradients are clipped, and a bad one is skipped whole."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_training import decoder, equal, rows, weights

from pellucid import events
from pellucid.data.packing import IGNORE, Packed
from pellucid.optim import OptimConfig, Optimizers, Schedule, build_optimizer
from pellucid.train import Stepper, language_loss
from pellucid.train.loss import share_of

FLAT = Schedule("constant", warmup=0.0)
CUTS = {"8": [8], "1s": [1] * 8, "3+5": [3, 5], "5+3": [5, 3], "2+2+4": [2, 2, 4]}


def eight_rows():
    """Rows of very unequal numbers of labels; one has none."""
    packed = rows(30, T=32)
    assert len(packed) >= 8
    packed = packed.rows(slice(0, 8))
    packed.labels[2] = IGNORE
    packed.labels[5, 3:] = IGNORE
    return packed


def cut(packed, sizes):
    at = 0
    for size in sizes:
        yield packed.rows(slice(at, at + size))
        at += size


def stepped(optimizer, sizes, steps=1, clip=1.0):
    model, packed = decoder(), eight_rows()
    stepper = Stepper(model, optimizer(model), FLAT, clip)
    total = int((packed.labels != IGNORE).sum())
    results = [stepper.step(cut(packed, sizes), share_of(model, total), 0.5) for _ in range(steps)]
    return weights(model), results


OPTIMIZERS = {
    "sgd": lambda m: Optimizers([torch.optim.SGD(m.parameters(), lr=0.5)]),
    "muon": lambda m: build_optimizer(m, OptimConfig("muon", lr=0.02)),
    "adamw": lambda m: build_optimizer(m, OptimConfig("adamw", lr=1e-3)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
def test_weights_after_a_step_do_not_depend_on_the_cut(optimizer, sizes):
    whole, (a,) = stepped(optimizer, [8])
    parts, (b,) = stepped(optimizer, sizes)
    assert not equal(whole, weights(decoder()))
    assert b.loss == pytest.approx(a.loss, rel=1e-5) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
    for x, y in zip(whole, parts):
        # AdamW's first step is lr * sign(gradient): where the gradient is all rounding, the sign is too.
        far = (x - y).abs() > 2e-5
        assert far.float().mean() < (0.002 if optimizer is OPTIMIZERS["adamw"] else 1e-9)


def test_the_loss_of_the_step_is_the_mean_over_its_labels():
    _, (result,) = stepped(OPTIMIZERS["sgd"], [3, 5])
    nats, count = language_loss(decoder(), eight_rows())
    assert result.loss == pytest.approx(float(nats.detach()) / count, rel=1e-5)


def test_a_mean_of_means_would_be_something_else():
    """So that the test above could fail: the rows are uneven enough."""
    nats = [(n.detach(), c) for n, c in (language_loss(decoder(), row) for row in cut(eight_rows(), [1] * 8))]
    mean_of_means = sum(float(n) / c for n, c in nats if c) / sum(1 for _, c in nats if c)
    assert abs(mean_of_means - sum(float(n) for n, _ in nats) / sum(c for _, c in nats)) > 1e-3


def test_the_gradient_is_clipped_once_over_all_micro_batches():
    before = weights(decoder())
    for sizes in ([8], [3, 5], [1] * 8):
        after, (result,) = stepped(OPTIMIZERS["sgd"], sizes, clip=0.01)
        moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(after, before)))
        assert moved == pytest.approx(0.5 * 0.01, rel=1e-3)  # lr * clip
        assert result.grad_norm > 0.1  # what is reported is the norm before clipping
    free, (result,) = stepped(OPTIMIZERS["sgd"], [8], clip=None)
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(free, before)))
    assert moved == pytest.approx(0.5 * result.grad_norm, rel=1e-4)


def test_the_schedule_sets_the_rate_of_the_step():
    model = decoder()
    stepper = Stepper(model, build_optimizer(model, OptimConfig(lr=0.02)), Schedule("linear", warmup=0.5))
    for progress, factor in ((0.25, 0.5), (0.5, 1.0), (0.75, 0.5)):
        result = stepper.step([eight_rows()], share_of(model, 100), progress)
        assert result.lr == pytest.approx(0.02 * factor)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_not_finite_skips_the_step_and_touches_nothing(bad, name, clip):
    model, packed = decoder(), eight_rows()
    stepper = Stepper(model, build_optimizer(model, OptimConfig(name, weight_decay=0.1)), FLAT, clip)
    good = share_of(model, 100)
    stepper.step(cut(packed, [8]), good, 0.5)

    def spoiled(micro: Packed):
        return good(micro) + (bad * model.norm.weight.sum() if len(micro) == 5 else 0.0)

    names = {p: n for n, p in model.named_parameters()}
    before, state = weights(model), {k: v.clone() for k, v in stepper.optimizer.state_tensors(names).items()}
    notes = []
    with events.subscribed(notes.append):
        result = stepper.step(cut(packed, [3, 5]), spoiled, 0.5)
    assert result.skipped and stepper.skipped == 1 and not math.isfinite(result.grad_norm)
    assert [n.kind for n in notes] == ["note"]
    assert equal(weights(model), before)
    after = stepper.optimizer.state_tensors(names)
    assert after.keys() == state.keys() and all(torch.equal(after[k], state[k]) for k in state)
    assert all(p.grad is None for p in model.parameters())
    result = stepper.step(cut(packed, [3, 5]), good, 0.5)  # and the next one is as if nothing had happened
    assert not result.skipped and not equal(weights(model), before)
    assert all(torch.isfinite(w).all() for w in weights(model))


def test_a_step_of_rows_without_labels_is_a_step_of_gradient_zero():
    model, packed = decoder(), eight_rows()
    packed.labels[:] = IGNORE
    before = weights(model)
    result = Stepper(model, OPTIMIZERS["adamw"](model), FLAT).step(cut(packed, [3, 5]), share_of(model, 0), 0.0)
    assert (result.loss, result.grad_norm, result.skipped) == (0.0, 0.0, False)
    assert equal(weights(model), before)
