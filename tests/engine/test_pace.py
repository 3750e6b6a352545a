"""A bound on a step's time: learned from steps, kept by chunks, never at the price of standing still."""

from __future__ import annotations

import random

import pytest

from pellucid.engine.hash_chain import HashChain
from pellucid.engine.pace import FIRST, LEAST, Pace, solved
from pellucid.engine.params import SamplingParams
from pellucid.engine.planning import StepCost, best_chunks
from pellucid.engine.request import Request
from pellucid.engine.scheduler import Scheduler

MACHINE = StepCost(0.004, 0.0002, 1e-7)


def taken(parts):
    return MACHINE.alpha + sum(MACHINE.of(start, start + count) - MACHINE.alpha for start, count in parts)


def learned(cap, noise=0.0):
    pace, rng = Pace(cap), random.Random(0)
    for _ in range(60):
        parts = [(rng.randrange(2000), rng.choice([1, 1, 1, 30, 200])) for _ in range(rng.randrange(1, 6))]
        pace.observe(parts, taken(parts) * rng.uniform(1 - noise, 1 + noise))
    return pace


def test_the_cost_of_a_step_is_learned():
    cost = learned(0.05).cost
    assert (cost.alpha, cost.beta, cost.gamma) == pytest.approx((MACHINE.alpha, MACHINE.beta, MACHINE.gamma), rel=1e-3)
    rough = learned(0.05, noise=0.1).cost
    assert rough.of(500, 700) == pytest.approx(MACHINE.of(500, 700), rel=0.1)


def test_a_machine_that_slows_down_is_noticed():
    pace = learned(0.05)
    for _ in range(200):
        pace.observe([(100, 200), (50, 1)], 3 * taken([(100, 200), (50, 1)]))
    assert pace.cost.of(100, 300) == pytest.approx(3 * MACHINE.of(100, 300), rel=0.05)


def test_no_coefficient_is_negative():
    assert min(solved([[4.0, 10.0, 0.0], [10.0, 30.0, 0.0], [0.0, 0.0, 0.0]], [1.0, 1.0, 0.0])) == 0.0


def test_before_enough_was_seen_nothing_is_predicted():
    pace = Pace(1e-9)
    for _ in range(FIRST - 1):
        pace.observe([(0, 100)], 1.0)
    pace.begin([])
    assert pace.largest(0, 500) == 500
    pace.observe([(0, 100)], 1.0)
    pace.begin([])
    assert pace.largest(0, 500) == LEAST


@pytest.mark.parametrize("cap", [0.01, 0.02, 0.05])
def test_chunks_under_the_cap_are_the_exact_plan(cap):
    pace, length, start, chunks = learned(cap), 400, 0, []
    while start < length:
        pace.begin([])
        chunks.append(pace.largest(start, length - start))
        start += chunks[-1]
    assert len(chunks) == len(best_chunks(length, pace.cost, cap))


def test_who_writes_comes_before_prompts_and_prompts_share_what_is_left():
    pace = learned(0.05)
    pace.begin([(400, 1)] * 20)
    first = pace.largest(0, 1000)
    pace.take(0, first)
    parts = [(400, 1)] * 20 + [(0, first)]
    assert taken(parts) <= 0.05 * 1.001 < taken([*parts[:-1], (0, first + 2)])
    assert pace.largest(0, 1000) in (0, 1)  # a second prompt waits for the next step
    pace.begin([(400, 1)] * 500)  # no time left at all: the first prompt moves all the same
    assert pace.largest(0, 1000) == LEAST
    pace.take(0, LEAST)
    assert pace.largest(0, 1000) == 0


def steps_of(pace, arrivals):
    """Plays a scheduler by the machine's clock: (parts, seconds) of each step."""
    scheduler = Scheduler(HashChain(4000, 4), budget=2048, places=32, pace=pace)
    steps, number = [], 0
    while number < len(arrivals) or scheduler.waiting or scheduler.running:
        if number < len(arrivals) and len(steps) >= arrivals[number][0]:
            scheduler.add(Request([number] * arrivals[number][1], SamplingParams(max_tokens=40)))
            number += 1
        writing = [r for r in scheduler.running if r.writing]
        plan = scheduler.plan()
        parts = [(p.start, p.count) for p in plan.parts]
        assert set(writing) <= {p.request for p in plan.parts}  # in every step all who are writing get a token
        steps.append((plan, taken(parts)))
        if pace:
            pace.observe(parts, taken(parts))
        for request in [p.request for p in plan.parts if p.samples]:
            request.tokens.append(1)
        scheduler.done(plan)
        for request in list(scheduler.running):
            if len(request.output) == 40:
                scheduler.finish(request, "length")
    return steps


def test_running_answers_do_not_wait_for_long_prompts():
    arrivals = [(0, 20), (1, 20), (15, 1900), (16, 1500), (17, 900)]
    free, paced = steps_of(None, arrivals), steps_of(Pace(0.06), arrivals)
    assert max(seconds for _, seconds in free) > 0.3
    assert max(seconds for _, seconds in paced[FIRST:]) < 0.066
    assert sum(p.tokens for p, _ in free) == sum(p.tokens for p, _ in paced)


def test_a_prompt_as_long_as_the_budget_does_not_hold_up_who_writes():
    scheduler = Scheduler(HashChain(4000, 4), budget=64, places=8)
    long, short = Request([1] * 640, SamplingParams(max_tokens=4)), Request([2] * 4, SamplingParams(max_tokens=40))
    scheduler.add(long)
    scheduler.add(short)
    plans = []
    for _ in range(20):
        plan = scheduler.plan()
        plans.append(plan)
        for r in [p.request for p in plan.parts if p.samples]:
            r.tokens.append(1)
        scheduler.done(plan)
    began = next(i for i, plan in enumerate(plans) if any(p.request is short for p in plan.parts))
    assert all(any(p.request is short for p in plan.parts) for plan in plans[began:])
    assert all(plan.tokens <= 64 for plan in plans)
