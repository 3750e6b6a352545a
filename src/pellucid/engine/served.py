"""An engine whose requests come over a socket, and whose tokens go back over it; and requests as JSON."""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from pellucid import events
from pellucid.engine.core import Engine
from pellucid.engine.params import SamplingParams, StructuredOutput
from pellucid.engine.request import Request, State
from pellucid.engine.shared_adapters import AdapterTable
from pellucid.errors import BadInput
from pellucid.parallel import Channel, Gone, in_three


class Served:
    """An engine whose requests come over a socket.  links: to other processes."""

    def __init__(self, engine: Engine, driver: Channel, together: bool, links: dict[int, Channel], adapters: AdapterTable):
        self.engine, self.driver, self.together, self.links, self.adapters = engine, driver, together, links, adapters
        self.requests: dict[int, Request] = {}
        self.number_of: dict[Request, int] = {}
        self.told: dict[Request, int] = {}  # how many of its prompt's log-probabilities
        self.record: dict[str, Any] = {}
        self.open = True
        self.handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "add": self.add, "cancel": self.cancel, "step": lambda _: self.step(), "close": self.close, "stop": self.stop,
            "load_adapter": lambda m: self.driver.send(adapters.load(m["number"], m["path"], m["name"])), "drop_adapter": lambda m: adapters.drop(m["number"])}

    def loop(self) -> None:
        with events.subscribed(self._take):
            while self.open:
                for channel in readable([self.driver, *self.sources], 0 if self.working else None):
                    self.hear(channel)
                if self.open and self.working:
                    self.step()

    @property
    def sources(self) -> Sequence[Channel]:
        """Others that something may come from at any time."""
        return ()

    @property
    def working(self) -> bool:
        """Whether it steps now without being told to."""
        return self.engine.busy and not self.together

    def hear(self, channel: Channel) -> None:
        message = channel.receive()[0]
        self.handlers[message["do"]](message)

    def add(self, message: dict[str, Any]) -> None:
        number, leader = message["number"], message["behind"]
        try:
            request = request_of(message, self.adapters)
            self.engine.add(request, self.requests.get(leader))
        except BadInput as error:
            self.driver.send({"refused": number, **in_three(error)})
            return
        self.keep(number, request)

    def keep(self, number: int, request: Request) -> None:
        self.requests[number], self.number_of[request] = request, number

    def cancel(self, message: dict[str, Any]) -> None:
        if (request := self.requests.get(message["number"])) is not None:
            self.engine.cancel(request)
            self.drop(request)

    def drop(self, request: Request) -> None:
        self.told.pop(request, None)
        self.requests.pop(self.number_of.pop(request))

    def close(self, _: dict[str, Any]) -> None:
        for request in list(self.requests.values()):
            self.engine.cancel(request)
        self.open = False

    def stop(self, _: dict[str, Any]) -> None:
        raise Gone("told to stop")

    def step(self) -> None:
        self.answer(self.engine.step())

    def answer(self, given: list[tuple[Request, list[int]]]) -> None:
        engine = self.engine
        rows = [self.row(r, tokens) for r, tokens in given if r in self.number_of]
        started = [self.number_of[r] for r in engine.scheduler.running if r in self.number_of]
        self.driver.send({"step": rows, "running": started, "totals": engine.totals, "available": engine.cache.available(),
                          "waiting": len(engine.scheduler.waiting), "record": self.record})
        self.record = {}
        for r, _ in given:
            if r.state is State.FINISHED and r in self.number_of:
                self.drop(r)

    def row(self, r: Request, tokens: list[int]) -> dict[str, Any]:
        row: dict[str, Any] = {"number": self.number_of[r], "at": r.generated - len(tokens), "tokens": tokens, "reason": r.finish_reason, "fault": r.fault,
                               "hit": r.hit, "preemptions": r.preemptions}
        if r.params.top is not None:
            known = len(r.logprobs) - len(tokens)
            row["logprobs"], row["tops"] = r.logprobs[known:], r.tops[known:]
        if r.params.prompt_logprobs is not None and self.told.get(r, 0) < len(r.prompt_logprobs):
            known = self.told.get(r, 0)
            row["prompt_logprobs"], row["prompt_tops"] = r.prompt_logprobs[known:], r.prompt_tops[known:]
            self.told[r] = len(r.prompt_logprobs)
        return row

    def _take(self, event: events.Event) -> None:
        if event.kind == "engine_step":
            self.record = event.as_dict()


def readable(channels: Sequence[Channel], seconds: float | None) -> list[Channel]:
    """Those where something has arrived; waits for one of them, or for so many seconds."""
    ready = select.select([c.sock for c in channels], [], [], seconds)[0]
    return [c for c in channels if c.sock in ready]


# --- requests as JSON -----------------------------------------------------------------------------------------------------


def message_of(request: Request) -> dict[str, Any]:
    params = asdict(request.params)
    return {"prompt": request.prompt, "params": params, "seed": request.seed, "namespace": request.namespace, "priority": request.priority,
            "adapter": None if request.adapter is None else request.adapter.number}


def request_of(message: dict[str, Any], adapters: AdapterTable) -> Request:
    """BadInput for settings that are not possible, as for any request, and where its adapter is no longer here."""
    fields = dict(message["params"])
    fields["stop"], fields["stop_token_ids"] = tuple(fields["stop"]), tuple(fields["stop_token_ids"])
    if fields["logit_bias"]:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    if fields["structured"]:
        fields["structured"] = StructuredOutput(**fields["structured"])
    return Request(list(message["prompt"]), SamplingParams(**fields), message["seed"], message["namespace"], message["priority"],
                   adapters.of(message["adapter"]))
