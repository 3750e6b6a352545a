"""`--processes N`: the same command in N processes that are one run (train/ranks.py); torchrun starts them as well.

Only the first one shows and writes anything. Ctrl-C reaches the command that was typed, which tells each of them once; a process that
fails ends the others.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NoReturn

from pellucid.errors import BadInput

PATIENCE = 10.0  # seconds that the others get to end by themselves when one has failed


def started_by_others() -> bool:
    """Whether this process is one of several already."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """The one that shows and writes; also a process that is alone."""
    return not started_by_others() or os.environ.get("RANK", "0") == "0"


def threads_here(asked: int | None) -> int | None:
    """Of each process: what was asked for, else its part of the cores; None: it is alone."""
    if asked is not None or not started_by_others():
        return asked
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, usable // here)


def check(config: Any, verb: str = "this command") -> None:
    """Errors: BadInput where several processes were started for a command that they cannot share."""
    if started_by_others() and not hasattr(config, "processes"):
        raise BadInput(f"{verb} runs in one process", f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: each would do all of it, into the same folder",
                       "start it without torchrun")


def leave(code: int) -> NoReturn:
    """Ends a process that is one of several, its files written and its connections closed, without taking the interpreter apart: once
    a finished run ended with SIGABRT there, when threads of libraries were still on their way out."""
    atexit._run_exitfuncs()  # closes the connections (train/ranks.py)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(code)


def start(command: list[str], count: int) -> int:
    """`pellucid COMMAND` in `count` processes on this machine; the exit code of the run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: Any) -> None:
        for p in running:
            p.send_signal(number)

    old = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for rank in range(count):  # in sessions of their own: the terminal's Ctrl-C comes through us, once
            running.append(subprocess.Popen([sys.executable, "-m", "pellucid", *command], start_new_session=True,
                                            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        return _watched(running)
    finally:
        for p in running:
            if p.poll() is None:
                p.kill()
        for number, handler in old.items():
            signal.signal(number, handler)


def _watched(running: list[subprocess.Popen[bytes]]) -> int:
    """Waits for all; when one has failed, the others get `PATIENCE` seconds. The first failure is the run's."""
    code, limit = 0, float("inf")
    while any(p.poll() is None for p in running) and time.monotonic() < limit:
        if not code and (codes := [p.returncode for p in running if p.returncode]):
            code, limit = codes[0], time.monotonic() + PATIENCE if codes[0] != 130 else float("inf")
        time.sleep(0.05)
    code = code or next((p.returncode for p in running if p.returncode), 0)
    return 128 - code if code < 0 else code
