"""The radix tree by itself: who is evicted against a search over all leaves, what layers with a window leave in it, whose hits count."""

import random

import pytest
from test_scheduler import Machine, request
from test_window_cache import served

from pellucid.engine.hash_chain import HashChain
from pellucid.engine.prefix_cache import first_needed, held
from pellucid.engine.radix_tree import Node, RadixTree
from pellucid.engine.request import GONE, Request, State
from pellucid.engine.scheduler import Scheduler


def worth(tree: RadixTree, node: Node) -> float:
    """As the literature has it: the chance that it is asked for, halved with every half-life, times the work for one of its tokens."""
    if tree.policy == "lru":
        return float(node.used)
    chance = (1 + node.hits) * 0.5 ** ((tree.clock - node.used) / tree.half_life)
    return chance * (1 + tree.attention * (node.depth + len(node.tokens) / 2))


@pytest.mark.parametrize("policy", ["lru", "cost"])
@pytest.mark.parametrize("seed", range(3))
def test_the_leaf_of_least_worth_goes_first(policy, seed):
    """One block after the other is taken from a tree that grows, forks and is read; before each, all leaves are compared."""
    rng = random.Random(seed)
    tree = RadixTree(160, 1, policy, half_life=7.0, attention=0.05)
    machine, taken = Machine(Scheduler(tree, budget=9, places=4)), 0
    stems = [[rng.randrange(4) for _ in range(rng.randrange(1, 12))] for _ in range(5)]
    for _ in range(250):
        if rng.random() < 0.5 and len(machine.s.waiting) < 5:
            machine.s.add(request(rng.choice(stems) + [rng.randrange(4) for _ in range(rng.randrange(6))], rng.randrange(1, 9)))
        machine.step()
        for _ in range(rng.randrange(3)):
            leaves = [n for n in tree.nodes() if not n.children and tree.references[n.blocks[-1]] == 1]
            if not leaves:
                continue
            least = min(worth(tree, n) for n in leaves)
            could = {n.blocks[-1] for n in leaves if worth(tree, n) <= least * (1 + 1e-9)}
            tree.release(tree.allocate(len(tree.free)))  # nothing is evicted for what is free
            tree._evict(1)
            assert tree.free[-1] in could
            tree.check()
            taken += 1
    assert taken > 150
    machine.finish_all()
    assert tree.available() == tree.blocks


@pytest.mark.parametrize("windows", [(None,), (4,), (3, None, 6), (2, 5)])
@pytest.mark.parametrize("size", [1, 2])
def test_everything_that_is_available_can_be_had(windows, size):
    """At any moment, whoever runs: what is counted as idle can be given away, and the requests go on undisturbed."""
    rng = random.Random(len(windows) + size)
    for turn in range(6):
        tree = RadixTree(60 * len(windows), size, "lru" if turn % 2 else "cost", windows=windows, half_life=3)
        tree.stride = 1 + turn % 2
        machine, alive = Machine(Scheduler(tree, budget=7, places=4, swap=turn % 3 == 0)), []
        for _ in range(60):
            if rng.random() < 0.5 and len(machine.s.waiting) < 4:
                alive.append(request([rng.randrange(2)] * rng.randrange(1, 9) + [rng.randrange(3) for _ in range(rng.randrange(5))], rng.randrange(1, 14)))
                machine.s.add(alive[-1])
            machine.step()
            if rng.random() < 0.3:
                tree.release(tree.allocate(rng.randrange(tree.available() + 1)))
                tree.check()
            if rng.random() < 0.05 and machine.s.running:  # its logits are no numbers
                lost = rng.choice(machine.s.running)
                lost.fault = "not_numbers"
                machine.s.finish(lost, "error")
                tree.check()
        machine.finish_all()
        assert all(r.state is State.FINISHED for r in alive)
        tree.release(tree.allocate(tree.blocks))
        tree.check()
        assert not tree.roots


def found(cache, tokens, most=None) -> list[tuple[int, ...]]:
    return cache.match(request(tokens), most)


def test_a_hit_of_the_tree_shrinks_to_where_the_window_is_there():
    """Window 3: a prefix of n tokens needs the entries of tokens n - 2 and n - 1."""
    tree = RadixTree(40, 1, windows=(None, 3))
    served(tree, list(range(10, 20)), new=3)
    rows = found(tree, [*range(10, 20), 5])
    assert len(rows) == 10 and [row[1] for row in rows[:8]] == [GONE] * 8 and all(full != GONE for full, _ in rows)
    assert rows[9][1] != GONE != rows[8][1] and len(found(tree, [*range(10, 17), 5])) == 7
    node = next(tree.nodes())
    assert node.tokens == list(range(10, 20)), "it ends with the prompt"
    for i in (8, 3):
        tree._leave(node.tables[1][i])
        node.tables[1][i] = GONE
    assert len(found(tree, [*range(10, 20), 5])) == 8 and len(found(tree, [*range(10, 15), 5])) == 3
    assert len(found(tree, [*range(10, 20), 5], most=5)) == 3 and len(found(tree, range(10, 13))) == 3
    again = served(tree, list(range(10, 20)), new=1)
    assert again.hit == 8 and len(found(tree, [*range(10, 20), 5])) == 10, "what was lost is there again"
    tree.check()


def test_what_no_window_reads_goes_first_and_hits_at_the_ends_of_prompts_stay():
    """A cache that six talks fill: their ends are still found when nearly all of the windows' blocks were given away."""
    tree = RadixTree(180, 1, windows=(None, 4, 4, 4))
    tree.stride = 1
    talks = [[10 + i, *range(20, 38)] for i in range(6)]
    for talk in talks:
        served(tree, talk)
        assert tree.check() is None
    assert [len(found(tree, [*talk, 5])) for talk in talks] == [19] * 6
    held = [sum(b != GONE for node in tree.nodes() for b in node.tables[g]) for g in range(4)]
    assert held[0] == 6 * 19 and sum(held) < 0.5 * 4 * 6 * 19
    whole = RadixTree(180, 1, windows=(None,) * 4)  # all layers keep all tokens
    for talk in talks:
        served(whole, talk)
    assert [len(found(whole, [*talk, 5])) == 19 for talk in talks] == [False] * 4 + [True] * 2


def test_the_end_of_a_prompt_is_found_when_the_answer_is_left_out():
    """Thoughts are not in the next turn: it goes on from the prompt's end, whose window is kept like that of the answer's end."""
    tree = RadixTree(100, 1, windows=(None, 4))
    r = served(tree, list(range(10, 30)), new=12)
    ends = sorted(node.depth + len(node.tokens) for node in tree.nodes())
    assert ends == [20, 31]
    tree._evict(tree.idle - 31 - 6)  # all but the whole path, and what windows read at two ends
    tree.check()
    assert len(found(tree, [*range(10, 30), 5])) == 20 and len(found(tree, [*r.tokens, 5])) == 31
    assert len(found(tree, [*range(10, 28), 5])) < 18


def test_a_long_answer_makes_one_node_and_holds_no_more_than_its_windows_and_what_is_idle():
    tree = RadixTree(700, 1, windows=(None, 8))
    machine = Machine(Scheduler(tree, budget=16))
    r = request([1, 2, 3, 4, 5], 300)
    machine.s.add(r)
    while r.state is not State.FINISHED:
        machine.step()
        assert len(r.tables or [[], []]) == 2 and (not r.tables[0] or len(r.tables[1]) - r.tables[1].count(GONE) <= 8 + tree.stride)
    assert len(list(tree.nodes())) == 2 and tree.available() == 700


def test_who_fills_the_tree_with_its_own_chunks_has_not_hit_it():
    """A prompt in many chunks is no sign that it will be asked for again; another request is."""
    tree = RadixTree(100, 1)
    for hits in range(3):
        served(tree, list(range(10, 50)), new=4)  # chunks of 2
        node = next(node for node in tree.nodes() if node.depth == 0)
        assert (node.hits, len(node.tokens)) == (hits, 40)


def test_the_tree_finds_what_the_chain_finds():
    """Single tokens, the same requests, room enough: hits are the same, whatever the windows."""
    for windows in ((None,), (5,), (None, 3, 7)):
        rng = random.Random(3)
        stems = [[rng.randrange(5) for _ in range(12)] for _ in range(3)]
        asked = [([*rng.choice(stems)[: rng.randrange(4, 13)], rng.randrange(5)], rng.randrange(1, 12)) for _ in range(30)]
        hits = []
        for cache in (HashChain(3000, 1, windows=windows), RadixTree(3000, 1, windows=windows)):
            hits.append([served(cache, list(tokens), new).hit for tokens, new in asked])
        assert hits[0] == hits[1] and sum(hits[0]) > 100


def test_blocks_behind_a_window_are_given_back_some_at_a_time():
    tree = RadixTree(200, 1, windows=(5, None))
    machine, back = Machine(Scheduler(tree, budget=8)), []
    r = request([1, 2, 3], 80)
    machine.s.add(r)
    while r.state is not State.FINISHED:
        before = r.tables[0].count(GONE) if r.tables[0] else 0
        machine.step()
        if r.tables[0] and r.tables[0].count(GONE) != before:
            back.append(r.tables[0].count(GONE) - before)
            assert r.tables[0].count(GONE) == first_needed(5, r.computed)
    assert back and set(back) == {tree.stride}


def standing(tree: RadixTree, tokens: list[int], prompt: int | None = None) -> Request:
    """A request that has computed and published these, and holds all their blocks."""
    r = request(tokens[:prompt])
    r.tokens, r.computed = list(tokens), len(tokens)
    r.tables = [tree.allocate(len(tokens) // tree.size) for _ in tree.windows]
    tree.publish(r)
    return r


def gone(tree: RadixTree, r: Request) -> None:
    tree.release(held(r.tables))


def test_who_was_in_use_when_its_turn_came_has_another_one():
    """A request that is swapped out leaves without a word to the tree."""
    tree = RadixTree(20, 1)
    old = standing(tree, [1, 2, 3])
    gone(tree, standing(tree, [5, 6, 7]))
    tree._evict(1)
    assert len(found(tree, [1, 2, 3])) == 3 and len(found(tree, [5, 6, 7])) == 2, "the older one is in use"
    gone(tree, old)
    gone(tree, standing(tree, [8, 9]))
    tree._evict(1)
    assert len(found(tree, [1, 2, 3])) == 2 and len(found(tree, [5, 6, 7])) == 2
    last = standing(tree, [1, 2])
    tree._evict(tree.idle)
    gone(tree, last)
    tree.release(tree.allocate(20))
    tree.check()
    assert not tree.roots and not tree.aside


def test_when_nothing_else_is_left_those_in_use_are_looked_at_again():
    tree = RadixTree(20, 1)
    old = standing(tree, [1, 2, 3])
    gone(tree, standing(tree, [5, 6, 7]))
    tree._evict(3)
    assert len(found(tree, [1, 2, 3])) == 3 and not found(tree, [5, 6, 7]) and not tree.queue
    gone(tree, old)
    tree._evict(2)
    assert len(found(tree, [1, 2, 3])) == 1
    tree.check()


def test_a_prompts_end_is_a_nodes_end_also_where_a_chunk_runs_over_it():
    """As when a request that gave way is computed again, its answer with it."""
    tree = RadixTree(40, 2, windows=(None, 4))
    gone(tree, standing(tree, list(range(10, 19)), prompt=5))
    assert [(node.depth, node.tokens) for node in tree.nodes()] == [(0, [10, 11, 12, 13]), (4, [14, 15, 16, 17])]


def test_what_requests_read_stays_in_the_tree():
    tree = RadixTree(60, 1, windows=(None, 3))
    reader = standing(tree, list(range(10, 20)))
    other = standing(tree, list(range(30, 40)))
    tree.release(reader.tables[1][:8])
    reader.tables[1][:8] = [GONE] * 8
    gone(tree, other)
    tree._evict(tree.idle)
    tree.check()
    assert len(found(tree, [*range(10, 20), 5])) == 10 and not found(tree, range(30, 40))
    assert tree.available() == 60 - len(held(reader.tables))


def test_a_leaf_never_ends_in_what_was_given_back():
    """Blocks of 4 and a window of 3: of 7 tokens the first block is behind it, the second is not full."""
    tree = RadixTree(10, 4, windows=(3,))
    r = request(range(10, 17))
    r.computed, r.tables = 7, [[GONE, *tree.allocate(1)]]
    tree.publish(r)
    tree.check()
    assert not tree.roots
