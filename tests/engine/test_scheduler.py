"""Scheduler and prefix caches by random schedules: no block leaked or shared while written, every request ends."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.engine.hash_chain import HashChain
from pellucid.engine.ordering import Planned
from pellucid.engine.orders import Fair, first_come, longest_hit
from pellucid.engine.pace import Pace
from pellucid.engine.params import SamplingParams
from pellucid.engine.planning import depth_first
from pellucid.engine.prefix_cache import NoReuse, held
from pellucid.engine.radix_tree import RadixTree
from pellucid.engine.request import GONE, Request, State
from pellucid.engine.scheduler import Scheduler
from pellucid.errors import BadInput

ORDERS = (lambda: first_come, lambda: longest_hit, lambda: depth_first, Fair, Planned)
CACHES = {
    "none": NoReuse, "chain": HashChain, "radix": RadixTree, "radix-cost": lambda blocks, size: RadixTree(blocks, size, "cost"),
    "none, window": lambda blocks, size: NoReuse(blocks, size, windows=(5,)),
    "none, windows": lambda blocks, size: NoReuse(blocks, size, windows=(3, None, 6)),
    "chain, window": lambda blocks, size: HashChain(blocks, size, windows=(4,)),
    "chain, windows": lambda blocks, size: HashChain(blocks, size, windows=(3, 3, None)),
    "radix, window": lambda blocks, size: strided(RadixTree(blocks, size, windows=(4,))),
    "radix, windows": lambda blocks, size: strided(RadixTree(blocks, size, windows=(3, None, 6), half_life=3)),
    "radix-cost, windows": lambda blocks, size: RadixTree(blocks, size, "cost", half_life=5, windows=(None, 5)),
}


def strided(tree: RadixTree) -> RadixTree:
    """At once, not some tokens at a time: gives more to go wrong in these small caches."""
    tree.stride = 1
    return tree


class Machine:
    """Computes what the scheduler plans: writes each token into its slot, and checks that what it reads is what it should be."""

    def __init__(self, scheduler: Scheduler, drafts: int = 0):
        self.s, self.drafts = scheduler, drafts
        self.slots: dict[tuple[int, int], tuple] = {}  # (block, place) -> group, and the whole prefix that the entry stands for
        self.host: dict[Request, dict] = {}
        self.groups = list(enumerate(scheduler.cache.windows))

    def place(self, table: list[int], i: int) -> tuple[int, int]:
        size = self.s.cache.size
        assert table[i // size] != GONE, "a block is used that was given back"
        return table[i // size], i % size

    def needed(self, tables: list[list[int]], tokens: int):
        """(group, token, place) of what layers still read behind so many tokens."""
        return [(g, i, self.place(tables[g], i)) for g, window in self.groups
                for i in range(0 if window is None else max(0, tokens + 1 - window), tokens)]

    def propose(self) -> None:
        """Guesses behind those that are one token behind: each is right two times of three."""
        for r in self.s.running if self.drafts else ():
            if r.behind == 1 and not r.drafts:
                r.drafts = min(self.drafts, r.params.max_tokens - r.generated - 1)
                for i in range(r.drafts):
                    r.tokens.append((sum(r.tokens) + (len(r.tokens) + i) % 3 // 2) % 7)

    def stand(self, r: Request) -> None:
        """The next token, and as many guesses before it as are right. It depends on the tokens only."""
        guesses = r.tokens[len(r.tokens) - r.drafts :]
        del r.tokens[len(r.tokens) - r.drafts :]
        r.drafts = 0
        for guess in (*guesses, None):
            r.tokens.append(sum(r.tokens) % 7)
            if r.tokens[-1] != guess:
                return

    def score(self, r: Request, start: int, count: int) -> None:
        """Log-probabilities of the prompt's tokens, each once and none left out."""
        if r.params.prompt_logprobs is not None:
            assert start <= len(r.prompt_logprobs) or len(r.prompt_logprobs) == len(r.prompt) - 1, "tokens of the prompt were never scored"
            r.prompt_logprobs += [float(i) for i in range(len(r.prompt_logprobs), min(start + count, len(r.prompt) - 1))]

    def step(self) -> list[Request]:
        self.propose()
        plan, size = self.s.plan(), self.s.cache.size
        assert plan.tokens <= self.s.budget and len(self.s.running) <= self.s.places
        for r, tables in plan.swapped_out:
            self.host[r] = {(g, i): self.slots.get(place) for g, i, place in self.needed(tables, r.computed)}
        for r, tables in plan.swapped_in:
            old = self.host.pop(r)
            self.slots |= {place: old[g, i] for g, i, place in self.needed(tables, r.computed)}
        new = [(g, p.request, i) for p in plan.parts for g, _ in self.groups for i in range(p.start, p.start + p.count)]
        writes = [self.place(r.tables[g], i) for g, r, i in new]
        assert len(set(writes)) == len(writes), "two requests write into one place"
        for block, _ in writes:
            assert self.s.cache.references[block] == 1, "a block is written that others read"
        for part in plan.parts:
            r = part.request
            assert part.count >= 1 and part.start == r.computed
            for g, i, place in self.needed(r.tables, part.start):
                assert self.slots.get(place) == (g, r.namespace, *r.tokens[: i + 1]), "it reads somebody else's cache"
            for (_, window), table in zip(self.groups, r.tables, strict=True):
                most = part.start + part.count if window is None else window - 1 + part.count
                assert len(table) - table.count(GONE) <= -(-most // size) + self.s.cache.stride, "a window holds more than it reads"
        for (g, r, i), place in zip(new, writes, strict=True):
            self.slots[place] = (g, r.namespace, *r.tokens[: i + 1])
        for p in plan.parts:
            self.score(p.request, p.start, p.count)
        done = [p.request for p in plan.parts if p.samples]
        for r in done:
            self.stand(r)
        if self.s.pace:
            self.s.pace.observe([(p.start, p.count) for p in plan.parts], 0.01 + 0.001 * plan.tokens)
        self.s.done(plan)
        for r in done:
            if len(r.output) == r.params.max_tokens:
                self.s.finish(r, "length")
        self.s.cache.check()
        used = {b for r in self.s.running for b in held(r.tables)}
        assert all(len(table) == len(r.tables[0]) for r in self.s.running for table in r.tables)
        assert self.s.cache.available() + len(used) == self.s.cache.blocks, "a block is leaked"
        return done

    def finish_all(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.s.running and not self.s.waiting:
                return
            self.step()
        raise AssertionError("requests that never end")


def made(kind: str, blocks: int, size: int):
    """A cache of so many blocks for each group of layers."""
    return CACHES[kind](blocks * len(CACHES[kind](1, 1).windows), size)


def outputs(requests, **options) -> list[list[int]]:
    cache = made(options.pop("cache"), options.pop("blocks"), options.pop("size"))
    machine = Machine(Scheduler(cache, **options))
    for r in requests:
        machine.s.add(r)
    machine.finish_all()
    return [r.output for r in requests]


def request(prompt, new=3, **fields) -> Request:
    return Request(list(prompt), SamplingParams(max_tokens=new), **fields)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_schedules(data):
    rng = random.Random(data.draw(st.integers(0, 2**20)))
    size = data.draw(st.sampled_from([1, 2, 4]))
    kind, swap = data.draw(st.sampled_from(sorted(CACHES))), data.draw(st.booleans())
    blocks = data.draw(st.integers(16, 40)) * 4 // size
    machine = Machine(Scheduler(made(kind, blocks, size), budget=data.draw(st.integers(1, 24)), places=data.draw(st.integers(1, 6)),
                                chunk=data.draw(st.sampled_from([None, 1, 3])), swap=swap,
                                order=data.draw(st.sampled_from(ORDERS))(), pace=data.draw(st.sampled_from([None, Pace(0.02), Pace(1e-6)]))),
                      drafts=data.draw(st.sampled_from([0, 0, 2, 5])))
    stems = [[rng.randrange(7) for _ in range(rng.randrange(1, 20))] for _ in range(3)]
    alive: list[Request] = []
    for _ in range(60):
        action = rng.random()
        if action < 0.35:
            r = request(rng.choice(stems) + [rng.randrange(7) for _ in range(rng.randrange(0, 8))], rng.randrange(1, 12),
                        namespace=rng.choice("ab"), priority=rng.randrange(2))
            if rng.random() < 0.2:
                r.params = replace(r.params, prompt_logprobs=0)
            try:
                machine.s.add(r)
                alive.append(r)
            except BadInput:
                assert machine.s._most_blocks(r.limit) > machine.s.cache.blocks
        elif action < 0.42 and alive:
            machine.s.finish(rng.choice(alive), "cancelled")
            machine.s.cache.check()
        elif action < 0.45:
            cache = machine.s.cache
            cache.release(cache.allocate(rng.randrange(cache.available() + 1)))  # whatever is available can be had
            cache.check()
        elif action < 0.47 and machine.s.running:  # its logits are no numbers
            lost = rng.choice(machine.s.running)
            lost.fault = "not_numbers"
            machine.s.finish(lost, "error")
            machine.s.cache.check()
        else:
            machine.step()
    machine.finish_all()
    assert machine.s.cache.available() == machine.s.cache.blocks and all(r.state is State.FINISHED for r in alive)
    for r in alive:
        if r.finish_reason == "length":
            want = list(r.prompt)
            for _ in range(r.params.max_tokens):
                want.append(sum(want) % 7)
            assert r.tokens == want
            assert r.params.prompt_logprobs is None or r.prompt_logprobs == list(range(len(r.prompt) - 1))


@pytest.mark.parametrize("cache", CACHES)
def test_whoever_is_scheduled_how_the_tokens_are_the_same(cache):
    prompts = [[1, 2, 3, 4, 5, 6, 0, 1], [1, 2, 3, 4, 5, 6, 0, 1], [1, 2, 3], [5]]
    alone = [outputs([request(p, 9)], cache="none", blocks=40, size=2)[0] for p in prompts]
    for options in ({"budget": 1}, {"budget": 7, "blocks": 12}, {"chunk": 2, "blocks": 10, "swap": True}, {"places": 1}):
        assert outputs([request(p, 9) for p in prompts], cache=cache, **{"blocks": 40, "size": 2, **options}) == alone


@pytest.mark.parametrize("cache", ["chain", "radix"])
def test_a_prompt_that_is_wholly_cached_still_computes_one_token(cache):
    machine = Machine(Scheduler(CACHES[cache](20, 2)))
    for hit in (0, 6):
        r = request([1, 2, 3, 4, 5, 6, 0, 1], 1)
        machine.s.add(r)
        machine.finish_all()
        assert r.hit == hit and r.output == [1]


def test_hits_are_exact_to_the_block_and_to_the_token():
    for kind, size, hits in (("chain", 4, 4), ("radix", 1, 6)):
        machine = Machine(Scheduler(CACHES[kind](40, size)))
        for tail, hit in (([7, 8], 0), ([9, 9], hits)):
            r = request([1, 2, 3, 4, 5, 6, *tail], 1)
            machine.s.add(r)
            machine.finish_all()
            assert r.hit == hit


@pytest.mark.parametrize("cache", ["chain", "radix"])
def test_namespaces_do_not_share(cache):
    machine = Machine(Scheduler(CACHES[cache](40, 1)))
    for namespace, hit in (("a", 0), ("b", 0), ("a", 4), ("b", 4)):
        r = request([1, 2, 3, 4, 5], 1, namespace=namespace)
        machine.s.add(r)
        machine.finish_all()
        assert r.hit == hit


def test_turns_of_a_conversation_hit_what_was_generated():
    machine = Machine(Scheduler(RadixTree(60, 1)))
    first = request([1, 2, 3], 5)
    machine.s.add(first)
    machine.finish_all()
    second = request([*first.tokens, 4], 2)
    machine.s.add(second)
    machine.finish_all()
    assert second.hit == len(first.tokens) - 1  # the last token of an answer is never computed


def test_the_chain_is_eaten_from_its_leaf_and_the_oldest_goes_first():
    cache = HashChain(6, 1)
    machine = Machine(Scheduler(cache))
    old, new = request([1, 2, 3], 1), request([4, 5, 6], 1)
    for r in (old, new):
        machine.s.add(r)
        machine.finish_all()
    cache.release(cache.allocate(1))
    assert len(cache.match(request([1, 2, 3]))) == 2 and len(cache.match(request([4, 5, 6]))) == 3


def test_blocks_that_hold_nothing_are_given_away_first():
    cache = HashChain(3, 1)
    machine = Machine(Scheduler(cache))
    machine.s.add(request([1, 2], 1))
    machine.finish_all()
    for _ in range(3):
        cache.release(cache.allocate(1))
    assert len(cache.match(request([1, 2, 3]))) == 2


def test_cost_keeps_what_is_asked_for_and_dear():
    tree = RadixTree(8, 1, "cost", half_life=4)
    machine = Machine(Scheduler(tree))
    for prompt in ([1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]):  # the first was hit once, the second is newer
        machine.s.add(request(prompt, 1))
        machine.finish_all()
    tree.release(tree.allocate(4))
    assert len(tree.match(request([1, 2, 3, 4]))) == 4 and not tree.match(request([5, 6, 7, 8]))
    lru = RadixTree(8, 1)
    machine = Machine(Scheduler(lru))
    for prompt in ([1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]):
        machine.s.add(request(prompt, 1))
        machine.finish_all()
    lru.release(lru.allocate(4))
    assert not lru.match(request([1, 2, 3, 4])) and len(lru.match(request([5, 6, 7, 8]))) == 4


def test_what_can_never_run_is_refused():
    s = Scheduler(HashChain(4, 4), context=32)
    for prompt, new, says in (([1] * 12, 5, "5 blocks"), ([1] * 30, 3, "context of 32"), ([], 3, "empty")):
        with pytest.raises(BadInput, match=says):
            s.add(request(prompt, new))
    s.add(request([1] * 12, 4))


def test_low_priority_gives_way():
    machine = Machine(Scheduler(NoReuse(8, 1), budget=8))
    low, high = request([1, 2, 3], 4, priority=1), request([4, 5, 6], 4)
    machine.s.add(low)
    machine.step()
    machine.s.add(high)
    machine.finish_all()
    assert low.preemptions >= 1 and high.preemptions == 0
