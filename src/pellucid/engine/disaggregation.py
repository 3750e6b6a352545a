"""Prefill and decode in two processes: long prompts then never stand between two tokens of a running answer.

    driver -> prefill: add          prefill computes the prompt and draws the first token (told to the driver at once)
    prefill -> decode: transfer     what the prompt left in the cache, as in swapping: entries of its tokens, constant states
    decode -> prefill: taken        the request has blocks there; the next may come
    decode -> driver: step          the tokens behind the first

A transfer is one message (parallel/wire.py): the request as JSON, then the tensors; shapes are checked before anything is
written. In the decode engine the request waits like one that was swapped out, and is admitted when there are blocks for it.
At most `WINDOW` transfers wait there and as many in the prefill process, which then computes no further prompts: it keeps
its blocks only until the entries are copied. Draws depend on a request's seed and its count of tokens alone, so that the answer
is the one that a single engine gives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pellucid.engine.paged_cache import Saved
from pellucid.engine.prefix_cache import first_needed
from pellucid.engine.request import Request, State
from pellucid.engine.served import Served, message_of, request_of
from pellucid.errors import BadInput
from pellucid.parallel import Channel, in_three

WINDOW = 4
"""Transfers that may wait for blocks."""


class Prefill(Served):
    """Computes prompts, and hands them on."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        (self.decode,) = self.links.values()
        self.outbox: deque[tuple[int, dict[str, Any], list[Tensor]]] = deque()
        self.granted = WINDOW
        self.handlers |= {"taken": lambda _: self.send(1)}

    @property
    def sources(self) -> Sequence[Channel]:
        return (self.decode,)

    @property
    def working(self) -> bool:
        return super().working and len(self.outbox) < WINDOW

    def answer(self, given: list[tuple[Request, list[int]]]) -> None:
        moving = {r: self.number_of[r] for r, _ in given if r.state is not State.FINISHED and r in self.number_of}
        super().answer(given)  # the first tokens
        for r, number in moving.items():
            self.outbox.append((number, *self.packed(r, number)))
            self.engine.cancel(r)  # its prompt can still be found in the prefix cache
            self.drop(r)
        if moving:
            super().answer([])  # their blocks are free
        self.send(0)

    def packed(self, r: Request, number: int) -> tuple[dict[str, Any], list[Tensor]]:
        runner = self.engine.runner
        saved = runner.pages.copy_out(r.tables, r.computed, runner.place_of.get(r))
        tensors = [t for layer in saved.entries for t in layer] + [t for layer in saved.states for t in layer.values()]
        return {"do": "transfer", "number": number, "tokens": saved.tokens, "output": r.output, "states": [list(layer) for layer in saved.states],
                "scored": [r.prompt_logprobs, r.prompt_tops], **message_of(r)}, tensors

    def send(self, more: int) -> None:
        self.granted += more
        while self.granted and self.outbox:
            self.granted -= 1
            _, body, tensors = self.outbox.popleft()
            self.decode.send(body, tensors)

    def cancel(self, message: dict[str, Any]) -> None:
        number = message["number"]
        if number in self.requests:
            super().cancel(message)
            return
        here = [item for item in self.outbox if item[0] == number]
        for item in here:
            self.outbox.remove(item)
        if not here:
            self.decode.send({"do": "cancel", "number": number})  # behind the transfer, on the same way


class Decode(Served):
    """Goes on with what it is handed."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        (self.prefill,) = self.links.values()
        self.coming: list[Request] = []  # that wait for blocks

    @property
    def sources(self) -> Sequence[Channel]:
        return (self.prefill,)

    def hear(self, channel: Channel) -> None:
        message, tensors = channel.receive()
        if message["do"] != "transfer":
            self.handlers[message["do"]](message)
            return
        try:
            self.accept(message, tensors)
        except BadInput as error:
            self.prefill.send({"do": "taken"})
            self.driver.send({"refused": message["number"], **in_three(error)})

    def accept(self, message: dict[str, Any], tensors: list[Tensor]) -> None:
        """BadInput where the tensors are not those of a prompt of this model, or the request could never run here."""
        r, runner = request_of(message, self.adapters), self.engine.runner
        saved = self.unpacked(message, tensors)
        if saved.tokens != len(r.prompt) or len(message["output"]) != 1:
            raise BadInput(f"a transfer of {saved.tokens} tokens for a prompt of {len(r.prompt)}")
        self.engine.check(r)
        r.tokens += message["output"]
        if r.constraint is not None:
            r.constraint.accept(message["output"][0])
        r.computed, r.state = saved.tokens, State.SWAPPED
        r.prompt_logprobs, r.prompt_tops = message["scored"]  # told by the other side
        self.told[r] = len(r.prompt_logprobs)
        self.engine.ahead.note(r)
        self.engine.scheduler.add(r)
        runner.swapped[r] = saved
        self.keep(message["number"], r)
        self.coming.append(r)

    def unpacked(self, message: dict[str, Any], tensors: list[Tensor]) -> Saved:
        pages, tokens, left = self.engine.runner.pages, message["tokens"], list(tensors)
        like = pages.copy_out([[0]] * len(pages.groups), 0, 0)  # of no token: what shapes there are
        counts = [len(layer) for layer in like.entries]
        names = message["states"]
        if len(tensors) != sum(counts) + sum(map(len, names)) or [list(layer) for layer in like.states] != names:
            raise BadInput(f"a transfer of {len(tensors)} tensors", f"this model keeps {sum(counts)} of tokens and {sum(map(len, like.states))} states")
        entries = [[left.pop(0) for _ in layer] for layer in like.entries]
        states = [{name: left.pop(0) for name in layer} for layer in like.states]
        starts = [first_needed(group.window, tokens) // pages.size * pages.size for group in pages.groups]  # windows keep their last tokens
        pairs: list[tuple[Tensor, Tensor, int | None]] = [
            (a, b, tokens - starts[pages.group_of[i]]) for i, both in enumerate(zip(like.entries, entries, strict=True))
            for a, b in zip(*both, strict=True)]
        pairs += [(mine[name], theirs[name], None) for mine, theirs in zip(like.states, states, strict=True) for name in mine]
        for a, b, rows in pairs:
            must = a.shape if rows is None else (rows, *a.shape[1:])
            if b.dtype != a.dtype or tuple(b.shape) != tuple(must):
                raise BadInput(f"a transferred tensor is {tuple(b.shape)} {b.dtype}", f"it must be {tuple(must)} {a.dtype}")
        return Saved(tokens, entries, states)

    def step(self) -> None:
        super().step()
        self.acknowledge()

    def cancel(self, message: dict[str, Any]) -> None:
        super().cancel(message)
        self.acknowledge()

    def acknowledge(self) -> None:
        """For each that waits no longer, the next may come."""
        for r in [r for r in self.coming if r.state is not State.SWAPPED]:
            self.coming.remove(r)
            self.prefill.send({"do": "taken"})


ROLES: list[type[Served]] = [Prefill, Decode]
