"""Handing prompts over: full decode sides hold back, broken transfers are refused and leave nothing, cancelled ones free both sides.

The two sides run here in threads of one process, so that their insides can be looked at.
"""

from __future__ import annotations

import threading
import time

import pytest
import torch

from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.disaggregation import WINDOW, Decode, Prefill
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.engine.served import message_of
from pellucid.engine.shared_adapters import AdapterTable
from pellucid.engine.worker import warm_up
from pellucid.nn import GDN, MLA, MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.parallel import Channel
from pellucid.parallel.wire import pair

SPEC = DecoderSpec(60, 32, (Layer(Attn(4, 2, 8, Rope(8)), MLP(48)), Layer(MLA(4, None, 16, 8, 8, Rope(8)), MLP(48)),
                            Layer(GDN(2, 4, 8, 8), MLP(48)), Layer(Attn(4, 2, 8, Rope(8), window=6), MLP(48))), context=128)


class Sides:
    """Both sides, and what they tell the driver."""

    def __init__(self, model: Decoder, config: EngineConfig, decode: EngineConfig | None = None):
        self.drivers, self.ends, links = [], [], pair()
        self.sides = []
        for kind, cfg, link in ((Prefill, config, links[0]), (Decode, decode or config, links[1])):
            ours, theirs = pair()
            engine = Engine(model, [], cfg)
            warm_up(engine)
            self.drivers.append(Channel(ours))
            self.sides.append(kind(engine, Channel(theirs), False, {1: Channel(link)}, AdapterTable(model)))
        self.prefill, self.decode = self.sides
        self.told: dict[int, list] = {}
        self.refused: list[dict] = []
        self.threads = [threading.Thread(target=side.loop, daemon=True) for side in self.sides]
        self.listeners = [threading.Thread(target=self.listen, args=(d,), daemon=True) for d in self.drivers]
        for thread in (*self.threads, *self.listeners):
            thread.start()

    def listen(self, driver):
        while True:
            try:
                message = driver.receive()[0]
            except Exception:
                return
            if "refused" in message:
                self.refused.append(message)
            for row in message.get("step", ()):
                self.told.setdefault(row["number"], []).append(row)

    def add(self, number, request):
        self.drivers[0].send({"do": "add", "number": number, "behind": None, **message_of(request)})

    def tokens(self, number):
        return [t for row in sorted(self.told.get(number, ()), key=lambda row: row["at"]) for t in row["tokens"]]

    def done(self, number):
        return any(row["reason"] for row in self.told.get(number, ()))

    def until(self, condition, seconds=30):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and all(t.is_alive() for t in self.threads)
            time.sleep(0.002)

    @property
    def idle(self):
        return all(not s.engine.busy and s.engine.cache.available() == s.engine.cache.blocks and not s.requests for s in self.sides) and (
            not self.prefill.outbox and not self.decode.coming and not self.decode.engine.runner.swapped)

    def close(self):
        for driver in self.drivers:
            driver.send({"do": "close"})
        for thread in self.threads:
            thread.join(10)
        assert not any(t.is_alive() for t in self.threads)


@pytest.fixture(scope="module")
def model():
    model = init_weights(Decoder(SPEC), seed=3)
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model.eval()


@pytest.fixture
def sides(model):
    made = []

    def make(*configs):
        made.append(Sides(model, *configs))
        return made[-1]

    yield make
    for s in made:
        s.close()


def requests(count=10):
    generator = torch.Generator().manual_seed(2)
    return [Request(torch.randint(0, 60, (5 + 3 * i,), generator=generator).tolist(), SamplingParams(max_tokens=8 + i, temperature=0.6), seed=i)
            for i in range(count)]


def answers(model, asked):
    engine = Engine(model, [], EngineConfig(cache_tokens=2000))
    for r in asked:
        engine.add(r)
    while engine.busy:
        engine.step()
    return [r.output for r in asked]


CONFIG = EngineConfig(cache_tokens=400, block=4)


def test_layers_of_every_kind_go_over(model, sides):
    """Keys and values, latents, states of linear attention, windows; sampled tokens, with seeds."""
    both, asked = sides(CONFIG), requests()
    for i, r in enumerate(asked):
        both.add(i, r)
    both.until(lambda: all(both.done(i) for i in range(len(asked))))
    assert [both.tokens(i) for i in range(len(asked))] == answers(model, asked)
    both.until(lambda: both.idle)
    assert both.prefill.engine.totals["computed_tokens"] == sum(len(r.prompt) for r in asked)
    assert both.decode.engine.totals["computed_tokens"] == sum(r.params.max_tokens - 1 for r in asked)  # no prompt was computed again


def test_a_full_decode_side_holds_back_the_prefill_side(model, sides):
    """It has room for about two requests: the others wait, a few of them there, a few here, and nothing more is computed."""
    both = sides(EngineConfig(cache_tokens=400, block=4, budget=20), EngineConfig(cache_tokens=64, block=4))
    hold = threading.Event()
    step = both.decode.engine.step
    both.decode.engine.step = lambda: (hold.wait(30), step())[1]
    asked = [Request([i + 1] * 20, SamplingParams(max_tokens=6), seed=i) for i in range(16)]
    for i, r in enumerate(asked):
        both.add(i, r)
    both.until(lambda: len(both.prefill.outbox) >= WINDOW)
    time.sleep(0.1)
    computed = both.prefill.engine.totals["computed_tokens"]
    time.sleep(0.1)
    assert both.prefill.engine.totals["computed_tokens"] == computed < 20 * len(asked) and both.prefill.engine.busy
    assert both.prefill.granted == 0 and len(both.decode.coming) <= WINDOW
    hold.set()
    both.until(lambda: all(both.done(i) for i in range(len(asked))))
    assert [both.tokens(i) for i in range(len(asked))] == answers(model, asked)
    both.until(lambda: both.idle and both.prefill.granted == WINDOW)


@pytest.mark.parametrize("delay", [0, 0.005, 0.02, 0.05, 0.1])
def test_cancelling_wherever_it_is_frees_both_sides(delay, model, sides):
    both, asked = sides(EngineConfig(cache_tokens=200, block=4, budget=16), EngineConfig(cache_tokens=96, block=4)), requests()
    for i, r in enumerate(asked):
        both.add(i, r)
    time.sleep(delay)
    for i in range(0, len(asked), 2):
        both.drivers[0].send({"do": "cancel", "number": i})
    both.until(lambda: all(both.done(i) for i in range(1, len(asked), 2)))
    assert [both.tokens(i) for i in range(1, len(asked), 2)] == answers(model, requests())[1::2]
    both.until(lambda: both.idle and both.prefill.granted == WINDOW)


def test_a_request_that_was_handed_over_is_cancelled_where_it_is(model, sides):
    both, go = sides(CONFIG), threading.Event()
    step = both.decode.engine.step
    both.decode.engine.step = lambda: (go.wait(30), step())[1]
    both.add(0, Request([1, 2, 3], SamplingParams(max_tokens=100)))
    both.add(1, Request([4, 5, 6], SamplingParams(max_tokens=4)))
    both.until(lambda: {0, 1} & set(both.decode.requests))
    both.until(lambda: not both.prefill.requests and not both.prefill.outbox)
    both.drivers[0].send({"do": "cancel", "number": 0})
    both.until(lambda: both.prefill.driver.ready() is False)  # it has heard it, and passed it on
    time.sleep(0.05)
    go.set()
    both.until(lambda: both.done(1))
    both.until(lambda: both.idle and both.prefill.granted == WINDOW)
    assert not both.done(0) and len(both.tokens(0)) < 20


def test_a_transfer_that_does_not_fit_is_refused_and_leaves_nothing(model, sides):
    both = sides(CONFIG)
    hold = {}
    pack = both.prefill.packed

    def packed(r, number):
        body, tensors = pack(r, number)
        hold[number] = True
        if number == 0:
            tensors[0] = tensors[0][:-1]  # a token short
        if number == 1:
            tensors[1] = tensors[1].double()
        if number == 2:
            tensors = tensors[:-1]
        if number == 3:
            body = {**body, "states": [[], [], [], []]}
        if number == 4:
            body = {**body, "tokens": body["tokens"] - 1}
        if number == 5:
            body = {**body, "output": []}
        return body, tensors

    both.prefill.packed = packed
    asked = requests(8)
    for i, r in enumerate(asked):
        both.add(i, r)
    both.until(lambda: all(both.done(i) for i in (6, 7)) and len(both.refused) == 6)
    assert sorted(message["refused"] for message in both.refused) == [0, 1, 2, 3, 4, 5] and all(m["what"] for m in both.refused)
    assert [both.tokens(i) for i in (6, 7)] == answers(model, asked)[6:]
    both.until(lambda: both.idle and both.prefill.granted == WINDOW)


def test_what_ends_with_its_first_token_is_not_handed_over(model, sides):
    both = sides(CONFIG)
    both.add(0, Request([1, 2, 3], SamplingParams(max_tokens=1)))
    both.until(lambda: both.done(0))
    both.until(lambda: both.idle)
    assert len(both.tokens(0)) == 1 and both.decode.engine.steps <= 2  # those of warming up
