"""Work beside this thread, such as the samples of the next step while this one is learned.

    work = Beside(lambda check: sample(...), device)    it begins at once
    ...                                                 something else
    samples = work.result()                             what it gave, or the error that it raised

What it emits reaches readers in `result`, in this thread: none of them is called from two threads. `abandon` ends it early, if it
calls `check` now and then.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch

from pellucid import events

T = TypeVar("T")
PATIENCE = 2.0  # seconds that abandoned work gets to end


class Abandoned(BaseException):
    """Ends work that nobody waits for any more."""


class Beside(Generic[T]):
    """`work(check)` in a thread of its own; on a GPU also in a stream of its own, behind what this thread has asked for so far."""

    def __init__(self, work: Callable[[Callable[[], None]], T], device: torch.device):
        self.device, self._work = device, work
        self._given: T
        self._error: BaseException | None = None
        self._told: list[events.Event] = []
        self._halt = threading.Event()
        self._begun = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._run, name="pellucid beside", daemon=True)
        self._thread.start()

    def result(self) -> T:
        self._thread.join()
        for event in self._told:
            events.emit(event)
        self._told = []
        if self._error is not None:
            raise self._error
        return self._given

    def abandon(self, seconds: float | None = PATIENCE) -> bool:
        """Whether it has ended by then. What is inside a long call of a reward function is left behind, and ends with the process."""
        self._halt.set()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _check(self) -> None:
        if self._halt.is_set():
            raise Abandoned

    def _run(self) -> None:
        with events.held() as self._told:
            try:
                with self._stream():
                    self._given = self._work(self._check)
            except BaseException as error:  # told where the result is asked for
                self._error = error

    @contextlib.contextmanager
    def _stream(self) -> Iterator[Any]:
        if self._begun is None:
            yield
            return
        with torch.cuda.device(self.device):  # a thread begins with the first GPU
            stream = torch.cuda.Stream()
            stream.wait_event(self._begun)
            with torch.cuda.stream(stream):
                yield
            stream.synchronize()
