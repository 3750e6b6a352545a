"""Schedules at points computed by hand, and their shape everywhere."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from pellucid.optim import Schedule

CASES = [
    (Schedule(), {0: 0.001, 0.01: 0.5, 0.02: 1, 0.3: 1, 0.6: 1, 0.7: 0.75, 0.8: 0.5, 0.9: 0.25, 1: 0}),
    (Schedule("wsd", warmup=0.1, decay=0.5, floor=0.2), {0.05: 0.5, 0.1: 1, 0.5: 1, 0.75: 0.6, 1: 0.2}),
    (Schedule("wsd", warmup=0.0, decay=0.0), {0: 1, 0.5: 1, 1: 1}),
    (Schedule("linear", warmup=0.05, floor=0.1), {0: 0.001, 0.025: 0.5, 0.05: 1, 0.525: 0.55, 1: 0.1}),
    (Schedule("linear", warmup=0.0), {0: 1, 0.25: 0.75, 0.5: 0.5, 1: 0}),
    (Schedule("cosine", warmup=0.2), {0.1: 0.5, 0.2: 1, 0.4: 0.5 + math.sqrt(0.125), 0.6: 0.5, 0.8: 0.5 - math.sqrt(0.125), 1: 0}),
    (Schedule("cosine", warmup=0.0, floor=0.5), {0: 1, 0.5: 0.75, 1: 0.5}),
    (Schedule("constant", warmup=0.5), {0: 0.001, 0.25: 0.5, 0.5: 1, 0.75: 1, 1: 1}),
]
SHAPES = [s for s, _ in CASES] + [Schedule(shape, warmup=0.13, floor=0.05) for shape in ("constant", "linear", "cosine", "wsd")]


@pytest.mark.parametrize("schedule, points", CASES, ids=lambda x: str(x) if isinstance(x, Schedule) else "")
def test_values_at_points_computed_by_hand(schedule, points):
    for progress, factor in points.items():
        assert schedule(progress) == pytest.approx(factor, abs=1e-9), progress


@pytest.mark.parametrize("schedule", SHAPES, ids=str)
def test_the_factor_rises_over_the_warm_up_falls_after_and_never_jumps(schedule):
    n = 10_000
    factors = [schedule(i / n) for i in range(n + 1)]
    top = round(schedule.warmup * n)
    assert all(a <= b for a, b in pairwise(factors[: top + 1]))
    assert all(a >= b for a, b in pairwise(factors[top:]))
    assert factors[top] == pytest.approx(1.0)
    assert max(abs(a - b) for a, b in pairwise(factors)) < 0.01
    assert 0 < factors[0] and min(factors[top:]) == factors[-1] and max(factors) <= 1 + 1e-12


@pytest.mark.parametrize("schedule", SHAPES, ids=str)
def test_outside_the_run_it_is_the_value_at_the_edge(schedule):
    assert schedule(-0.5) == schedule(0) and schedule(1.5) == schedule(1)


def test_the_first_step_of_any_run_moves():
    """Progress is 0 in the first step; a factor of 0 would waste it, and a run of one step would learn nothing."""
    assert all(s(0.0) > 0 for s in SHAPES)
