"""LoRA adapters of an engine of several processes: each process reads the file, and keeps what belongs to its part of the model.

    driver -> leads       load_adapter (number, path, name), drop_adapter (number)
    lead   -> followers   the same; of a step's requests they are told the numbers
    back                  adapter: the number, and why it was refused, if it was

A name is given out when all processes have it. It is taken back when no request has it any more: until then the driver waits.
"""

from __future__ import annotations

import itertools
import os
import queue
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pellucid.engine.adapters import Adapter, read_adapter
from pellucid.engine.request import Request
from pellucid.errors import BadInput, PellucidError
from pellucid.models.hub import local_folder
from pellucid.nn import Decoder
from pellucid.parallel import Channel, in_three


class AdapterDesk:
    """The driver's side. An adapter has no matrices here.  tell: sends a message to all leads, of which there are so many.  gone: the error
    to raise where a process has died."""

    def __init__(self, tell: Callable[[dict[str, Any]], object], leads: int, gone: Callable[[], PellucidError]):
        self.tell, self.leads, self.gone = tell, leads, gone
        self.answers: dict[int, queue.SimpleQueue[dict[str, Any] | None]] = {}  # of those that are being loaded
        self.users: Counter[int] = Counter()  # requests
        self.leaving: set[int] = set()
        self._numbers = itertools.count()

    def load(self, path: str | os.PathLike[str], name: str = "") -> Adapter:
        """From any thread; returns when all processes have it. BadInput where one of them has refused it."""
        folder, number = local_folder(path, weights=False), next(self._numbers)
        came = self.answers[number] = queue.SimpleQueue()
        try:
            self.tell({"do": "load_adapter", "number": number, "path": os.fspath(folder.resolve()), "name": name})
            answers = [came.get() for _ in range(self.leads)]
        finally:
            del self.answers[number]
        if None in answers:
            raise self.gone()
        for answer in answers:
            if answer is not None and "what" in answer:
                self.tell({"do": "drop_adapter", "number": number})
                raise BadInput(answer["what"], answer["why"], answer["next"])
        return Adapter(name or folder.name, {}, number)

    def heard(self, answer: dict[str, Any]) -> None:
        if (waiting := self.answers.get(answer["adapter"])) is not None:
            waiting.put(answer)

    def died(self) -> None:
        for waiting in list(self.answers.values()):
            waiting.put(None)

    def drop(self, adapter: Adapter) -> None:
        """In the engine's thread, as what follows. Requests under way end with it."""
        self.leaving.add(adapter.number)
        self._settle(adapter.number)

    def begins(self, request: Request) -> None:
        if request.adapter is not None:
            self.users[request.adapter.number] += 1

    def ends(self, request: Request) -> None:
        if request.adapter is not None:
            self.users[request.adapter.number] -= 1
            self._settle(request.adapter.number)

    def _settle(self, number: int) -> None:
        if number in self.leaving and not self.users[number]:
            self.tell({"do": "drop_adapter", "number": number})


class AdapterTable:
    """A process's side.  others: that hold parts of the same model, and hear of each."""

    def __init__(self, model: Decoder, others: Sequence[Channel] = ()):
        self.model, self.others = model, others
        self.known: dict[int, Adapter] = {}

    def load(self, number: int, path: str, name: str) -> dict[str, Any]:
        """The answer. Others read the file meanwhile."""
        for other in self.others:
            other.send({"do": "load_adapter", "number": number, "path": path, "name": name})
        answer: dict[str, Any] = {"adapter": number}
        try:
            self.known[number] = replace(read_adapter(Path(path), self.model, name), number=number)
        except Exception as error:  # whatever is wrong with the file, the engine lives on
            answer |= in_three(error)
        for other in self.others:
            answer = other.receive()[0] | answer
        return answer

    def drop(self, number: int) -> None:
        """Who runs with it has it still."""
        self.known.pop(number, None)
        for other in self.others:
            other.send({"do": "drop_adapter", "number": number})

    def of(self, number: int | None) -> Adapter | None:
        if number is None:
            return None
        if number not in self.known:
            raise BadInput("its adapter was unloaded before the request began", next="load the adapter again")
        return self.known[number]
