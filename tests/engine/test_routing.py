"""Which engine a request goes to: even loads, prefixes that draw, and spill where they would fill one engine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.engine.routing import Router


def request(prompt, tokens=16, namespace=""):
    return Request(list(prompt), SamplingParams(max_tokens=tokens), namespace=namespace)


def test_without_common_prefixes_the_emptiest_is_chosen_by_tokens():
    router = Router(3)
    big, small = request(range(500)), [request([i]) for i in range(4)]
    assert router.choose(big) == 0
    assert [router.choose(r) for r in small] == [1, 2, 1, 2]
    router.leave(big, 0)
    assert router.choose(request([9])) == 0


def test_a_prefix_draws_its_requests_until_the_engine_is_much_fuller():
    router = Router(2, stride=8, slack=200)
    common = list(range(64))
    first = [router.choose(request([*common, i])) for i in range(2)]
    assert first == [0, 0]  # 162 tokens, and the other has none
    rest = [router.choose(request([*common, i])) for i in range(2, 30)]
    assert 1 in rest and router.loads[1] > 0  # it spilled; from there on the other has the prefix too
    assert max(router.loads) <= 2 * min(router.loads) + 200 + 81


def test_the_longest_known_prefix_decides_and_namespaces_are_apart():
    router = Router(2, stride=4, slack=10_000)
    short, long = [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]
    assert router.choose(request([*short, 0])) == 0
    assert router.choose(request([7] * 40)) == 1
    router.seen[list(router._keys(request(long)))[-1]] = 1  # as if the longer one had been computed there
    assert router.choose(request([*short, 9, 9, 9])) == 0 and router.choose(request([*long, 3])) == 1
    assert list(router._keys(request(long, namespace="a"))) != list(router._keys(request(long)))


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=60), st.integers(1, 5))
def test_loads_are_what_has_not_left(sizes, places):
    router, running = Router(places, stride=16), []
    for i, (length, tokens, family) in enumerate(sizes):
        r = request([family] * length, tokens)
        running.append((r, router.choose(r)))
        if i % 3 == 2:
            router.leave(*running.pop(0))
        loads = [0] * places
        for r, place in running:
            loads[place] += r.limit
        assert router.loads == loads and sum(router.counts) == len(running)


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("pellucid.engine.routing.REMEMBERED", 10)
    router = Router(2, stride=2)
    for i in range(30):
        router.choose(request([i, i, i, i]))
    assert len(router.seen) == 10


@pytest.mark.parametrize("places", [1, 4])
def test_even_loads_of_even_requests(places):
    router = Router(places)
    for i in range(8 * places):
        router.choose(request([i] * 20))
    assert router.counts == [8] * places
