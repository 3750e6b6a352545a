"""The budget with a clock that the test turns."""

from __future__ import annotations

import math

import pytest

from pellucid.errors import BadInput
from pellucid.train import Budget


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_steps(clock):
    budget = Budget(steps=4, clock=clock)
    budget.start()
    assert (budget.progress, budget.eta, budget.over) == (0.0, None, False)
    clock.now += 30
    assert budget.progress == 0.0  # time alone does not count
    budget.done = 3
    assert (budget.progress, budget.elapsed, budget.over) == (0.75, 30.0, False)
    assert budget.eta == pytest.approx(10.0)  # one more at 10 seconds each
    budget.done = 4
    assert (budget.progress, budget.eta, budget.over) == (1.0, 0.0, True)
    budget.done = 5
    assert budget.progress == 1.0


def test_seconds(clock):
    budget = Budget(seconds=60, clock=clock)
    clock.now += 500  # waiting before the start does not count
    budget.start()
    assert (budget.progress, budget.eta) == (0.0, 60.0)
    clock.now += 15
    assert (budget.progress, budget.eta, budget.over) == (0.25, 45.0, False)
    clock.now += 100
    assert (budget.progress, budget.eta, budget.over) == (1.0, 0.0, True)


def test_a_resumed_run_counts_what_lies_behind_and_not_the_pause(clock):
    budget = Budget(seconds=100, clock=clock)
    clock.now += 86_400
    budget.start(done=7, spent=40.0)
    assert (budget.done, budget.elapsed, budget.progress, budget.eta) == (7, 40.0, 0.4, 60.0)
    clock.now += 10
    assert budget.progress == 0.5
    steps = Budget(steps=10, clock=clock)
    steps.start(done=5, spent=50.0)
    clock.now += 10
    steps.done = 6
    assert steps.eta == pytest.approx(40.0)  # 60 seconds for 6 steps


@pytest.mark.parametrize("wrong", [{}, dict(steps=3, seconds=3.0), dict(steps=0), dict(steps=-1), dict(seconds=0.0),
                                   dict(seconds=-5.0), dict(seconds=math.nan), dict(seconds=math.inf)], ids=str)
def test_impossible_budgets_are_refused(wrong):
    with pytest.raises(BadInput) as caught:
        Budget(**wrong)
    assert caught.value.next
