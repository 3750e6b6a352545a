"""The order by dynamic programming against every order, and what it is to the scheduler."""

from __future__ import annotations

import itertools
import random

import pytest

from pellucid.engine.hash_chain import HashChain
from pellucid.engine.ordering import WINDOW, Planned, fewest_tokens
from pellucid.engine.params import SamplingParams
from pellucid.engine.planning import common
from pellucid.engine.radix_tree import RadixTree
from pellucid.engine.request import Request
from pellucid.engine.scheduler import Scheduler


def tokens_of(order, prompts, hits, room):
    """The docstring's model, told as a story."""
    total, admitted = 0, []
    for b in order:
        p = prompts[b]
        saved = min(common(admitted[-1], p), len(p) - 1) if admitted else 0
        if total + len(p) <= room:
            saved = max(saved, min(hits[b], len(p) - 1), *(min(common(a, p), len(p) - 1) for a in admitted), 0)
        total += len(p) - saved
        admitted.append(p)
    return total


def made_up(rng, n):
    stems = [[rng.randrange(3) for _ in range(rng.randrange(2, 9))] for _ in range(3)]
    prompts = [rng.choice(stems) + [rng.randrange(3) for _ in range(rng.randrange(1, 5))] for _ in range(n)]
    return prompts, [rng.choice([0, 0, rng.randrange(len(p) + 1)]) for p in prompts]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("room", [0, 15, 30, 1000])
def test_no_order_computes_fewer(seed, room):
    prompts, hits = made_up(random.Random(seed), 5)
    order, least = fewest_tokens(prompts, hits, room)
    assert sorted(order) == list(range(5))
    assert least == tokens_of(order, prompts, hits, room)
    assert least == min(tokens_of(other, prompts, hits, room) for other in itertools.permutations(range(5)))


def test_no_and_one_prompt():
    assert fewest_tokens([], [], 10) == ([], 0)
    assert fewest_tokens([[1, 2, 3]], [3], 10) == ([0], 1)  # the last token is always computed


def test_what_the_cache_holds_comes_first_where_room_is_short():
    """The second prompt's hit is lost if the first, which shares nothing, is admitted before it."""
    prompts, hits = [[9] * 20, [1] * 20], [0, 16]
    assert fewest_tokens(prompts, hits, room=25) == ([1, 0], 24)
    assert fewest_tokens(prompts, hits, room=100)[1] == 24


def waiting_of(*prompts, priority=0):
    return [Request(list(p), SamplingParams(max_tokens=2), number=i, priority=priority) for i, p in enumerate(prompts)]


def test_priority_first_and_nobody_waits_for_more_than_a_window():
    cache = HashChain(3, 1)  # room for one path: only the prompt just before helps
    low = waiting_of([1, 1], priority=1)
    crowd = waiting_of(*([i % 2, i % 2, i] for i in range(WINDOW + 5)))
    order = list(Planned()(low + crowd, cache))
    assert order[-1] is low[0] and len(order) == WINDOW + 6
    assert set(order[:WINDOW]) == set(crowd[:WINDOW]) and order[WINDOW:-1] == crowd[WINDOW:]
    stems = [r.tokens[0] for r in order[:WINDOW]]
    assert len(list(itertools.groupby(stems))) == 2  # those that share a stem stand together


@pytest.mark.parametrize("priorities", [[0], [0, 0, 0, -1]])
def test_a_stream_that_shares_a_stem_does_not_starve_one_that_shares_nothing(priorities):
    """The cache holds little more than the stem: whenever it is planned, the other costs least when it comes last."""
    planned, cache, numbers = Planned(), HashChain(12, 1), itertools.count(1)

    def next_one(priority=0):
        n = next(numbers)
        return Request([1] * 8 + [n], SamplingParams(max_tokens=2), number=n, priority=priority)

    other = Request([9] * 8, SamplingParams(max_tokens=2), number=0)
    waiting, later = [other, *(next_one() for _ in range(WINDOW + 2))], 0
    for turn in range(10 * WINDOW):
        first = next(iter(planned(waiting, cache)))
        if first is other:
            break
        later += first.priority == 0
        waiting.remove(first)
        waiting.append(next_one(priorities[turn % len(priorities)]))
    assert 0 < later < WINDOW and first is other


def test_who_has_left_is_forgotten():
    planned, cache = Planned(), HashChain(100, 1)
    crowd = waiting_of([1, 2], [3, 4], [1, 5])
    first = list(planned(crowd, cache))
    rest = [r for r in crowd if r is not first[0]]
    assert set(planned(rest, cache)) == set(rest)
    assert list(planned([], cache)) == []


@pytest.mark.parametrize("make", [lambda: HashChain(60, 2), lambda: RadixTree(120)])
def test_every_request_ends(make):
    rng, cache = random.Random(1), make()
    scheduler = Scheduler(cache, budget=16, places=3, order=Planned())
    left = 40
    while left or scheduler.waiting or scheduler.running:
        if left and rng.random() < 0.6:
            stem = [rng.randrange(2)] * 8
            scheduler.add(Request(stem + [rng.randrange(3) for _ in range(4)], SamplingParams(max_tokens=3)))
            left -= 1
        plan = scheduler.plan()
        drawn = [p.request for p in plan.parts if p.samples]
        for r in drawn:
            r.tokens.append(rng.randrange(3))
        scheduler.done(plan)
        for r in drawn:
            if len(r.output) == 3:
                scheduler.finish(r, "length")
        cache.check()
    assert cache.available() == cache.blocks
