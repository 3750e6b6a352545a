"""Plans against exhaustive search, and the claims of their docstrings."""

import itertools
import random

import pytest

from pellucid.engine.hash_chain import HashChain
from pellucid.engine.params import SamplingParams
from pellucid.engine.planning import (
    StepCost,
    best_chunks,
    best_order,
    computed_tokens,
    depth_first,
    greedy_chunks,
)
from pellucid.engine.request import Request
from pellucid.errors import BadInput

COST = StepCost(0.01, 0.001, 0.00002)


def seconds(chunks, cost):
    ends = list(itertools.accumulate(chunks, initial=0))
    return sum(cost.of(a, b) for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize(("length", "cap"), [(1, 0.05), (9, 0.0145), (13, 0.016), (14, 0.0125), (12, 1.0)])
def test_chunks_are_the_best_of_all_cuts(length, cap):
    every = []
    for marks in itertools.product([0, 1], repeat=length - 1):
        ends = [0, *(i + 1 for i, m in enumerate(marks) if m), length]
        chunks = [b - a for a, b in itertools.pairwise(ends)]
        if all(c == 1 or COST.of(a, b) <= cap for c, (a, b) in zip(chunks, itertools.pairwise(ends), strict=True)):
            every.append(seconds(chunks, COST))
    for plan in (best_chunks(length, COST, cap), greedy_chunks(length, COST, cap)):
        assert sum(plan) == length and seconds(plan, COST) == pytest.approx(min(every), abs=1e-12)


def test_later_chunks_are_smaller_and_stay_under_the_cap():
    plan = greedy_chunks(3000, COST, 0.3)
    ends = list(itertools.accumulate(plan, initial=0))
    assert plan == sorted(plan, reverse=True)[: len(plan) - 1] + plan[-1:] and len(plan) > 5
    assert all(COST.of(a, b) <= 0.3 for a, b in itertools.pairwise(ends))


def test_coefficients_are_recovered_from_timings():
    rng = random.Random(0)
    spans = [(a := rng.randrange(500), a + rng.randrange(1, 300)) for _ in range(40)]
    found = StepCost.fitted([(a, b, COST.of(a, b) * rng.uniform(0.99, 1.01)) for a, b in spans])
    assert found.alpha == pytest.approx(0.01, rel=0.5) and found.gamma == pytest.approx(0.00002, rel=0.05)
    assert found.of(100, 300) == pytest.approx(COST.of(100, 300), rel=0.02)


def tree_of_prompts(rng, n):
    stems = [[rng.randrange(4) for _ in range(rng.randrange(2, 9))] for _ in range(3)]
    return [rng.choice(stems) + [rng.randrange(3) for _ in range(rng.randrange(1, 5))] for _ in range(n)]


@pytest.mark.parametrize("seed", range(6))
def test_the_best_order_and_depth_first_compute_each_edge_once(seed):
    prompts = tree_of_prompts(random.Random(seed), 6)
    best = best_order(prompts)
    assert sorted(best) == list(range(6))
    least = min(computed_tokens(order) for order in itertools.permutations(prompts))
    assert computed_tokens([prompts[i] for i in best]) == least
    requests = [Request(p, SamplingParams(), number=i) for i, p in enumerate(prompts)]
    assert computed_tokens([r.prompt for r in depth_first(requests, HashChain(1, 1))]) <= least + sum(p in prompts[:i] for i, p in enumerate(prompts))


def test_priority_comes_before_prefixes_and_too_many_are_refused():
    requests = [Request([1, 2], SamplingParams(), number=0, priority=1), Request([5], SamplingParams(), number=1)]
    assert [r.number for r in depth_first(requests, HashChain(1, 1))] == [1, 0]
    with pytest.raises(BadInput, match="too many"):
        best_order([[1]] * 16)
