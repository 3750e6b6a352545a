"""Priorities and fairness: who overtakes, who gives way, who waits at most how long."""

import random

import pytest
from test_scheduler import Machine, request

from pellucid.engine import orders
from pellucid.engine.hash_chain import HashChain
from pellucid.engine.orders import Fair, first_come, longest_hit
from pellucid.engine.prefix_cache import NoReuse
from pellucid.engine.radix_tree import RadixTree
from pellucid.engine.request import State
from pellucid.engine.scheduler import Scheduler


def machine(blocks: int = 200, **options) -> Machine:
    return Machine(Scheduler(NoReuse(blocks, 1), **options))


def unfairness(order, seed: int, places: int = 3) -> int:
    """Two namespaces that always have somebody waiting, one of which asks for far more: by how much the tokens that they were
    served come to differ."""
    rng, served, most = random.Random(seed), {"a": 0, "b": 0}, 0
    m = machine(places=places, order=order, budget=8)
    done = m.s.done

    def counted(plan):
        for part in plan.parts:
            served[part.request.namespace] += part.count
        done(plan)

    m.s.done = counted
    for _ in range(60):
        m.s.add(request([1] * rng.randrange(4, 7), rng.randrange(3, 7), namespace="a"))
    for _ in range(400):
        waiting = [r.namespace for r in m.s.waiting]
        if waiting.count("a") < 30:
            m.s.add(request([1] * rng.randrange(4, 7), rng.randrange(3, 7), namespace="a"))
        for _ in range(4 - waiting.count("b")):
            m.s.add(request([2] * rng.randrange(1, 4), rng.randrange(1, 3), namespace="b"))
        m.step()
        most = max(most, abs(served["a"] - served["b"]))
    return most


@pytest.mark.parametrize("seed", range(3))
def test_fair_bounds_how_far_two_come_apart(seed):
    """By what all places hold; first come, first served lets the greedy one run away."""
    assert unfairness(Fair(), seed) <= 3 * 12
    assert unfairness(first_come, seed) > 3 * 12


def test_who_comes_late_does_not_make_others_wait_for_the_past():
    """A was served for long, alone; B comes with a queue that never ends: A goes on to be served."""
    m = machine(places=1, order=Fair())
    for _ in range(40):
        m.s.add(request([1, 2], 9, namespace="a"))
    for _ in range(200):
        m.step()
    left = [r for r in m.s.waiting if r.namespace == "a"]
    for _ in range(60):
        m.s.add(request([3, 4], 9, namespace="b"))
    for _ in range(60):
        m.step()
    done = sum(r not in m.s.waiting for r in left)
    assert 2 <= done <= 4, "about every second place"


def test_who_comes_back_is_not_owed_the_time_away():
    m = machine(places=1, order=Fair())
    m.s.add(request([3, 4], 2, namespace="b"))
    for _ in range(30):
        m.s.add(request([1, 2], 9, namespace="a"))
    for _ in range(100):
        m.step()
    assert m.s.order.served["a"] > 80 and m.s.order.served["b"] == 3
    for _ in range(10):
        m.s.add(request([3, 4], 9, namespace="b"))
    m.step()
    assert m.s.order.served["b"] >= 80


def test_namespaces_that_are_gone_are_forgotten(monkeypatch):
    """Every request may have a salt of its own: neither the order nor the tree keeps something for each that ever came."""
    monkeypatch.setattr(orders, "REMEMBERED", 20)
    m = machine(places=2, order=Fair())
    for i in range(200):
        m.s.add(request([1, 2, 3], 2, namespace=f"salt {i}"))
        m.step()
    assert len(m.s.order.served) <= 30
    tree = RadixTree(40, 1)
    for i in range(200):
        r = request([1, 2, 3, 4], 2, namespace=f"salt {i}")
        assert not tree.match(r)
        r.tables, r.computed = [tree.allocate(4)], 4
        tree.publish(r)
        tree.release(r.blocks)
        tree.check()
    assert len(tree.roots) <= 11 and all(root.children for root in tree.roots.values())


def test_a_request_of_priority_overtakes_those_who_wait():
    for order in (first_come, longest_hit, Fair()):
        m = machine(places=1, order=order)
        low = [request([i, 1], 3, priority=2) for i in range(4)]
        for r in low:
            m.s.add(r)
        m.step()
        high = request([9, 9], 3, priority=1)
        m.s.add(high)
        while high.state is not State.FINISHED:
            m.step()
        assert [r.state for r in low] == [State.FINISHED] + [State.WAITING] * 3


def test_the_lowest_and_then_the_latest_gives_way():
    m = machine(blocks=12, budget=12)
    middle, low, early, late = (request([i] * 2, 6, priority=p) for i, p in enumerate((1, 2, 0, 0)))
    for r in (middle, low, early, late):
        m.s.add(r)
        m.step()
    gone = []
    for _ in range(40):
        before = {r: r.preemptions for r in (middle, low, early, late)}
        m.step()
        gone += [r for r in before if r.preemptions > before[r]]
    assert gone[0] is low and early not in gone, "a request of higher priority gave way"
    assert gone.index(middle) < gone.index(late) if late in gone else True


def test_within_a_priority_the_latest_gives_way_and_comes_back_first():
    m = machine(blocks=10, budget=10)
    first, second, third = (request([i] * 2, 5) for i in range(3))
    for r in (first, second, third):
        m.s.add(r)
    while not third.preemptions:
        m.step()
        assert not first.preemptions and (not second.preemptions or third.preemptions)
    fourth = request([7] * 2, 5)
    m.s.add(fourth)
    while third.state is State.WAITING:
        m.step()
        assert fourth.state is State.WAITING, "it overtook one that came before"
    m.finish_all()


@pytest.mark.parametrize("order", [first_come, Fair()], ids=["first-come", "fair"])
def test_a_large_request_is_not_starved_by_small_ones(order):
    """Nobody behind it is admitted while it finds no room, so that room comes."""
    m = machine(blocks=20, budget=30, order=order)
    for i in range(3):
        m.s.add(request([i] * 3, 3))
    m.step()
    large = request([5] * 18, 2)
    m.s.add(large)
    for _ in range(30):
        m.s.add(request([6] * 3, 3))
        m.step()
        if large.state is not State.WAITING:
            break
    assert large.state is not State.WAITING


def test_every_running_request_that_writes_moves_in_every_step():
    """A long prompt beside it is cut; its budget is what is left."""
    m = machine(blocks=400, budget=6)
    writing = [request([i], 60) for i in range(3)]
    for r in writing:
        m.s.add(r)
    m.step()
    long = request([7] * 90, 1)
    m.s.add(long)
    while long.state is not State.FINISHED:
        before = [r.generated for r in writing]
        m.step()
        assert [r.generated for r in writing] == [n + 1 for n in before]


@pytest.mark.parametrize("budget", [3, 6, 8, 9, 24])
def test_guesses_take_no_tokens_of_those_who_write(budget):
    """Six write, with three guesses each: each gets its token, and guesses what is left of the step. (The first ones' guesses would take
    all of it, step after step.)"""
    m = machine(blocks=400, budget=24)
    some = [request([i, 1], 40) for i in range(6)]
    for r in some:
        m.s.add(r)
    m.step()
    m.s.budget, m.drafts = budget, 3
    for _ in range(5):
        before = [r.generated for r in some]
        m.step()
        moved = [r.generated > n for r, n in zip(some, before, strict=True)]
        assert sum(moved) == min(6, budget) and moved[: sum(moved)] == [True] * sum(moved)


def test_guesses_take_no_blocks_of_others():
    """A cache that both fill to the last block without guesses, which are all wrong: nobody has to give way."""
    m = machine(blocks=10, budget=20)

    def wrong():
        for r in m.s.running:
            if r.behind == 1 and not r.drafts:
                r.drafts = min(5, r.params.max_tokens - r.generated - 1)
                r.tokens += [(sum(r.tokens) + 1) % 7] * r.drafts

    m.propose = wrong
    both = [request([i, 1], new) for i, new in enumerate((8, 4))]
    for r in both:
        m.s.add(r)
    m.finish_all()
    assert [r.preemptions for r in both] == [0, 0]


def test_the_longest_hit_goes_first():
    m = Machine(Scheduler(HashChain(60, 1), places=1, order=longest_hit))
    m.s.add(request([1, 2, 3, 4], 1))
    m.finish_all()
    short, long, none = request([1, 2, 9, 9], 1), request([1, 2, 3, 9], 1), request([8, 8, 8, 8], 1)
    for r in (none, short, long):
        m.s.add(r)
    m.step()
    assert long.state is State.FINISHED and none.state is short.state is State.WAITING
    m.step()
    assert short.state is State.FINISHED and none.state is State.WAITING
