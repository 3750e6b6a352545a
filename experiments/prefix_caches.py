"""Prefix caches compared: chain of block hashes, radix tree with two policies of eviction, none; first come against longest hit.

    python experiments/prefix_caches.py            prints a table; --json FILE keeps it

Only the scheduler and the caches run: pure Python, no model. A trace is a list of (arrival step, tokens, tokens to generate);
generated tokens are made up, the same in every run. Traces are of four kinds that servers see:

    few-shot      40 tasks with examples of 300 tokens each, asked in random order with short questions
    chat          conversations of 6 turns, each turn with everything before it, other conversations between
    tree          a problem explored as a tree: 3 children a node, 4 levels, each child continues its parent's text
    agent         one long system prompt with tools, several users, loops of call and result

Reported for each: prompt tokens that were found in the cache (share), tokens computed in all, steps, and microseconds that
scheduler and cache took a step. The cache holds too little for everything, or there would be nothing to choose.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from pellucid.engine.hash_chain import HashChain
from pellucid.engine.ordering import Planned
from pellucid.engine.orders import first_come, longest_hit
from pellucid.engine.params import SamplingParams
from pellucid.engine.planning import depth_first
from pellucid.engine.prefix_cache import NoReuse, PrefixCache
from pellucid.engine.radix_tree import RadixTree
from pellucid.engine.request import Request
from pellucid.engine.scheduler import Scheduler

Trace = list[tuple[int, list[int], int]]


def words(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(1000) for _ in range(n)]


def few_shot(rng: random.Random) -> Trace:
    stems = [words(rng, 300) for _ in range(40)]
    return [(i // 2, rng.choice(stems) + words(rng, rng.randrange(10, 40)), 20) for i in range(400)]


def chat(rng: random.Random) -> Trace:
    system, trace = words(rng, 200), []
    for talk in range(60):
        text, at = list(system), talk * 4
        for _ in range(6):
            text = text + words(rng, rng.randrange(20, 80))
            trace.append((at, list(text), 30))
            text = text + answer(text, 30)
            at += rng.randrange(40, 160)
    return sorted(trace, key=lambda row: row[0])


def tree(rng: random.Random) -> Trace:
    trace: Trace = []
    for problem in range(12):
        level = [words(rng, 250)]
        for depth in range(4):
            trace += [(problem * 20 + depth * 60, text, 40) for text in level]
            level = [text + answer(text, 40) + words(rng, 6) for text in level for _ in range(3)]
    return sorted(trace, key=lambda row: row[0])


def agent(rng: random.Random) -> Trace:
    tools, trace = words(rng, 1200), []
    for user in range(30):
        text, at = tools + words(rng, 60), user * 5
        for _ in range(rng.randrange(3, 9)):
            trace.append((at, list(text), 25))
            text = text + answer(text, 25) + words(rng, rng.randrange(30, 200))
            at += rng.randrange(30, 60)
    return sorted(trace, key=lambda row: row[0])


def answer(text: list[int], n: int) -> list[int]:
    """What the made-up model says: a function of the text alone, as `play` generates it."""
    said = list(text)
    for _ in range(n):
        said.append((said[-1] * 31 + len(said)) % 1000)
    return said[len(text) :]


def play(trace: Trace, cache: PrefixCache, order: Any) -> dict[str, float]:
    """Runs the trace; every planned token counts as computed."""
    scheduler = Scheduler(cache, budget=256, places=16, order=order)
    waiting, step, seconds, computed, hit, prompt, finished = list(trace), 0, 0.0, 0, 0, 0, 0
    while waiting or scheduler.waiting or scheduler.running:
        while waiting and waiting[0][0] <= step:
            _, tokens, new = waiting.pop(0)
            scheduler.add(Request(list(tokens), SamplingParams(max_tokens=new)))
            prompt += len(tokens)
        start = time.perf_counter()
        plan = scheduler.plan()
        seconds += time.perf_counter() - start
        hit += sum(r.hit for r in plan.admitted if r.preemptions == 0)
        computed += plan.tokens
        done = [part.request for part in plan.parts if part.samples]
        for r in done:
            r.tokens.append((r.tokens[-1] * 31 + len(r.tokens)) % 1000)
        start = time.perf_counter()
        scheduler.done(plan)
        for r in done:
            if len(r.output) == r.params.max_tokens:
                scheduler.finish(r, "length")
                finished += 1
        seconds += time.perf_counter() - start
        step += 1
    cache.check()
    assert finished == len(trace)
    return {"hit": round(hit / prompt, 4), "computed": computed, "steps": step, "microseconds": round(1e6 * seconds / step, 1)}


CACHES = {
    "none": lambda tokens: NoReuse(tokens // 16, 16), "chain, blocks of 16": lambda tokens: HashChain(tokens // 16, 16),
    "chain, tokens": lambda tokens: HashChain(tokens, 1), "radix, lru": lambda tokens: RadixTree(tokens),
    "radix, cost": lambda tokens: RadixTree(tokens, policy="cost"),
}
ORDERS = {"first come": lambda: first_come, "longest hit": lambda: longest_hit, "depth first": lambda: depth_first, "planned": Planned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6000, help="room of the cache")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    rows = []
    for kind in (few_shot, chat, tree, agent):
        trace = kind(random.Random(0))
        for name, make in CACHES.items():
            for how, order in ORDERS.items() if name != "none" else [("first come", lambda: first_come)]:
                rows.append({"trace": kind.__name__, "cache": name, "order": how} | play(trace, make(chosen.tokens), order()))
                print("{trace:9} {cache:20} {order:12} hit {hit:6.1%}  computed {computed:8,}  steps {steps:6}  {microseconds:8.1f} us".format(**rows[-1]), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps({"experiment": "prefix_caches", "tokens": chosen.tokens, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
