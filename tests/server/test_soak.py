"""Thousands of requests with cancellations, disconnects and malformed bodies: memory stays bounded, nothing is left behind."""

from __future__ import annotations

import gc
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from served_models import random_llm

from pellucid import events
from pellucid.engine.config import EngineConfig
from pellucid.server import create_app
from pellucid.server.run import GRACE, Server, bind, url_of


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def one_request(client: httpx.Client, url: str, draw: random.Random) -> int:
    """A request of a random kind; its status, or 0 where the client left."""
    prompt = f"{draw.randint(0, 30)} " + "one two three four five six seven eight nine ten " * draw.randint(1, 2)  # some share a prefix
    body = {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": draw.randint(1, 60), "seed": draw.randint(0, 9)}
    kind = draw.random()
    if kind < 0.15:
        junk = draw.choice([b"{", b"", b"\xff\xfe", b'{"model": "tiny"}', b'{"model": "x", "messages": [{"role": "user", "content": "x"}]}', b"[" * 5000,
                            b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 99999}'])
        return client.post(f"{url}/v1/chat/completions", content=junk, headers={"Content-Type": "application/json"}).status_code
    if kind < 0.35:  # leaves in the middle of a stream
        with client.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True, "max_tokens": 150, "ignore_eos": True}) as answer:
            for _, _line in zip(range(draw.randint(0, 6)), answer.iter_lines()):
                pass
        return 0
    if kind < 0.45:  # hangs up while it waits
        try:
            return client.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 150, "ignore_eos": True}, timeout=0.05).status_code
        except httpx.TimeoutException:
            return 0
    if kind < 0.55:
        return client.post(f"{url}/v1/responses", json={"model": "tiny", "input": prompt, "max_output_tokens": 5}).status_code
    if kind < 0.65:
        return client.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 5, "n": 2, "logprobs": 2, "stream": True}).status_code
    return client.post(f"{url}/v1/chat/completions", json=body).status_code


def soak(count: int) -> None:
    """A small cache, so that requests wait, are preempted and evict each other's prefixes."""
    app = create_app(random_llm(), "tiny", engine=EngineConfig(running=8, cache_tokens=250, prefix="radix", swap=True), waiting=64)
    listener = bind("127.0.0.1", 0)
    server = Server(app, GRACE)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url, engine = url_of(listener), app.state.desk.registry.engines[0]
    statuses: list[int] = []
    preempted: list[int] = []

    def many(seed: int, each: int) -> list[int]:
        draw = random.Random(seed)
        with httpx.Client(timeout=60) as client:
            return [one_request(client, url, draw) for _ in range(each)]

    try:
        with events.subscribed(lambda e: preempted.append(e.preempted) if e.kind == "engine_step" else None), ThreadPoolExecutor(12) as pool:
            while not server.started:
                time.sleep(0.01)
            for warm in (True, False):
                if not warm:
                    gc.collect()
                    before = resident()
                each = 8 if warm else count // 12
                for found in pool.map(many, range(12 * warm, 12 * warm + 12), [each] * 12):
                    statuses += found
        deadline = time.monotonic() + 60
        while engine.pending or engine.engine.busy:
            assert time.monotonic() < deadline, "requests were left behind"
            time.sleep(0.01)
        gc.collect()
        grown = resident() - before
        cache = engine.engine.cache
        cache.check()
        assert cache.available() == cache.blocks and not engine._of and not engine._queued, "something was left behind"
        assert set(statuses) <= {0, 200, 400, 404, 429}, sorted(set(statuses))
        assert statuses.count(200) > count // 4 and statuses.count(0) and statuses.count(400)
        assert sum(preempted) > 0, "the cache was never short"
        assert grown < 60 << 20, f"memory grew by {grown >> 20} MiB"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def test_some_hundred_requests():
    soak(240)


@pytest.mark.slow
def test_thousands_of_requests():
    soak(5000)
