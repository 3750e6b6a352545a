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
AGAIN = 0.2  # seconds after which the exception is raised anew in code that swallowed it


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
    try:
        return Outcome(limited(function, seconds))
    except (Exception, SystemExit, TimeIsUp) as error:  # KeyboardInterrupt is the person's, and goes on
        return Outcome(error=error)


def call_async(functions: list[Callable[[], Awaitable[Any]]], seconds: list[float], at_once: int) -> list[Outcome]:
    """Async functions, at most `at_once` of them running at a time, each with its own limit from when it starts."""
    if not functions:
        return []
    outcomes: list[Outcome | None] = [None] * len(functions)

    async def all_of_them() -> None:
        room = asyncio.Semaphore(at_once)

        async def one(number: int) -> None:
            async with room:
                try:
                    outcomes[number] = Outcome(await asyncio.wait_for(functions[number](), seconds[number]))
                except TimeoutError as error:
                    outcomes[number] = Outcome(error=error if error.args else TimeIsUp())
                except (Exception, SystemExit, TimeIsUp) as error:
                    outcomes[number] = Outcome(error=error)

        await asyncio.gather(*map(one, range(len(functions))))

    # A coroutine that blocks (time.sleep) stops the whole loop, limits included: the loop itself has one, too.
    rounds = -(-len(functions) // at_once)
    whole = call(lambda: asyncio.run(all_of_them()), max(seconds) * rounds + 1.0)
    unfinished = Outcome(error=whole.error or TimeIsUp())
    return [outcome or unfinished for outcome in outcomes]


def limited(function: Callable[[], T], seconds: float) -> T:
    """function() within `seconds`, else TimeIsUp (or Stuck)."""
    on_main = threading.current_thread() is threading.main_thread()
    if on_main and hasattr(signal, "setitimer") and not _loop_is_running():
        return _by_signal(function, seconds)
    return _by_thread(function, seconds)


def _loop_is_running() -> bool:
    """Whether this thread is inside an event loop (a notebook): another cannot be run in it."""
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        return True
    return False


def _by_signal(function: Callable[[], T], seconds: float) -> T:
    with _alarm(seconds) as armed:
        try:
            return function()
        finally:
            armed.clear()  # from here on the bell is not heard: nothing below may be interrupted


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[set[str]]:
    """SIGALRM raises TimeIsUp while the given set is not empty.  A timer that was running before runs on afterwards."""
    armed = {"armed"}

    def ring(number: int, frame: Any) -> None:
        if armed:
            raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    started = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield armed
    finally:
        armed.clear()
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)


def _by_thread(function: Callable[[], T], seconds: float) -> T:
    outcome = Outcome(error=TimeIsUp())

    def run() -> None:
        nonlocal outcome
        try:
            outcome = Outcome(function())
        except BaseException as error:
            outcome = Outcome(error=error)

    thread = threading.Thread(target=run, name="pellucid reward", daemon=True)
    thread.start()
    thread.join(seconds)
    for _ in range(10):
        if not thread.is_alive():
            break
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeIsUp))
        thread.join(AGAIN)
    if thread.is_alive():
        raise Stuck(thread)
    if outcome.error is not None:
        raise outcome.error
    value: T = outcome.value
    return value
