"""Calling functions that people wrote, under a time limit: a value or a clear outcome, and no thread left behind.

On the main thread of a POSIX system the limit is an interval timer whose signal raises inside the function: it stops
loops, sleeps, waiting sockets and Python's own regular expressions, and needs no thread.  Elsewhere the function runs in
a thread of its own that gets the exception when the time is over; only code that stays inside one call of a C library
does not see it, and is then left to end by itself (`Stuck`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
AGAIN = 0.2  # seconds between two looks at the clock; also after which code that swallowed the exception gets it anew


class TimeIsUp(BaseException):
    """Raised inside a function whose time is over.  No `Exception`: `except Exception` in the function must not eat it."""


class Stuck(Exception):
    """A thread could not be stopped."""

    def __init__(self, thread: threading.Thread):
        super().__init__("it is inside a call of a C library and cannot be stopped")
        self.thread = thread


@dataclass
class Outcome:
    """What became of a call: `value`, or `error` (TimeIsUp where the time was over)."""

    value: Any = None
    error: BaseException | None = None

    @property
    def timed_out(self) -> bool:
        return isinstance(self.error, (TimeIsUp, Stuck))


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives something to await: a coroutine function, or an object whose `__call__` is one."""
    call = getattr(type(function), "__call__", None)  # noqa: B004 - the method itself is looked at
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def call(function: Callable[[], Any], seconds: float) -> Outcome:
    """A plain function under a time limit."""
    end = time.monotonic() + seconds
    return _outcome(function, lambda: end)


def call_async(functions: list[Callable[[], Awaitable[Any]]], seconds: list[float], at_once: int,
               kinds: list[str] | None = None, patience: int = 3) -> list[Outcome]:
    """Async functions, at most `at_once` of them running at a time, each with its own limit from when it starts.

    kinds: which belong together; after `patience` timeouts of one kind in a row (or as many as run at a time), the others
    of its kind are not tried: they count as timeouts at once.
    """
    outcomes: list[Outcome | None] = [None] * len(functions)
    ends: dict[int, float] = {}  # of those that are running
    kinds = kinds or list(map(str, range(len(functions))))
    in_a_row = dict.fromkeys(kinds, 0)

    async def one(number: int, room: asyncio.Semaphore) -> None:
        async with room:
            if in_a_row[kinds[number]] >= max(patience, at_once):
                outcomes[number] = Outcome(error=TimeIsUp())
                return
            ends[number] = time.monotonic() + seconds[number]
            task = asyncio.ensure_future(functions[number]())
            await asyncio.wait({task}, timeout=seconds[number])
            del ends[number]
            if not task.done():
                task.cancel()  # and not waited for: it may refuse
                setattr(task, "_log_destroy_pending", False)  # noqa: B010 - what became of it is told by the outcome
                outcomes[number] = Outcome(error=TimeIsUp())
                in_a_row[kinds[number]] += 1
                return
            in_a_row[kinds[number]] = 0
            if task.cancelled():
                outcomes[number] = Outcome(error=asyncio.CancelledError("it cancelled itself"))
            else:
                error = task.exception()
                outcomes[number] = Outcome(error=error) if error else Outcome(task.result())

    async def all_of_them() -> None:
        room = asyncio.Semaphore(at_once)
        await asyncio.gather(*(one(number, room) for number in range(len(functions))))

    last = time.monotonic()

    def until() -> float:
        """A coroutine that blocks (time.sleep) stops the whole loop, limits included: so the loop has one, too.  It is
        over when a limit was not heeded for a second, or when everything is done and the loop does not end."""
        nonlocal last
        last = min(list(ends.values()), default=last if None not in outcomes else time.monotonic())
        return last + 1.0

    whole = _outcome(lambda: asyncio.run(all_of_them()), until) if functions else Outcome()
    lost = Outcome(error=whole.error or TimeIsUp())
    return [outcome or lost for outcome in outcomes]


def _outcome(function: Callable[[], Any], until: Callable[[], float]) -> Outcome:
    try:
        return Outcome(limited(function, until))
    except (Exception, SystemExit, TimeIsUp) as error:  # KeyboardInterrupt is the person's, and goes on
        return Outcome(error=error)


def limited(function: Callable[[], T], until: Callable[[], float]) -> T:
    """function(), stopped by TimeIsUp (or Stuck) when the monotonic clock has passed `until()`, which may move."""
    on_main = threading.current_thread() is threading.main_thread()
    if on_main and hasattr(signal, "setitimer") and not _loop_is_running():
        with _alarm(until) as armed:
            try:
                return function()
            finally:
                armed.clear()  # from here on the bell is not heard: nothing below may be interrupted
    return _by_thread(function, until)


def _loop_is_running() -> bool:
    """Whether this thread is inside an event loop (a notebook): another cannot be run in it."""
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        return True
    return False


@contextlib.contextmanager
def _alarm(until: Callable[[], float]) -> Iterator[set[str]]:
    """SIGALRM raises TimeIsUp past `until()` while the given set is not empty.  A timer that ran before runs on after."""
    armed = {"armed"}

    def ring(number: int, frame: Any) -> None:
        if armed and time.monotonic() >= until():
            raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    started = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, max(min(until() - started, AGAIN), 1e-3), AGAIN)
    try:
        yield armed
    finally:
        armed.clear()
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)


def _by_thread(function: Callable[[], T], until: Callable[[], float]) -> T:
    outcome = Outcome(error=TimeIsUp())

    def run() -> None:
        nonlocal outcome
        try:
            outcome = Outcome(function())
        except BaseException as error:
            outcome = Outcome(error=error)

    thread = threading.Thread(target=run, name="pellucid reward", daemon=True)
    thread.start()
    tries = 10
    while thread.is_alive() and tries:
        thread.join(max(min(until() - time.monotonic(), AGAIN), 1e-3))
        if thread.is_alive() and time.monotonic() >= until():
            tries -= 1
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeIsUp))
            thread.join(AGAIN)
    if thread.is_alive():
        raise Stuck(thread)
    if outcome.error is not None:
        raise outcome.error
    value: T = outcome.value
    return value
