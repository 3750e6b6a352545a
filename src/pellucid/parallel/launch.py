"""Processes of ours on this machine: started, connected, watched, ended.

    processes = Processes("pellucid.engine.worker", 2, links=[(0, 1)])
    processes[0].send({"do": "open", ...})

Each runs `python -m MODULE` and gets the number of an open socket, no name or port that others could reach: over it come
messages (parallel/wire.py), first which other sockets it has (its links to others). Ctrl-C reaches only the process
that started them: they end when told to, or when their socket closes because that process died.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pellucid.errors import BadInput, PellucidError
from pellucid.parallel.wire import Channel, Gone, pair

PATIENCE = 10.0
"""Seconds that processes get to end by themselves."""


class RankDied(PellucidError):
    """One of the processes of a model has ended, so that the others cannot go on."""


class Processes:
    """A sequence of channels, one to each.  links: pairs of processes that are connected with each other.  threads: of each, by
    default the cores that there are, shared out.  folder: private to them, for meeting (see `parallel.group.join`); it goes with them."""

    def __init__(self, module: str, count: int, links: Sequence[tuple[int, int]] = (), threads: int | None = None):
        if os.name != "posix":
            raise BadInput("several processes are not possible on this system", "they share sockets as POSIX systems do", "use one process")
        self.count = count
        self.folder = Path(tempfile.mkdtemp(prefix="pellucid-"))  # mode 0700
        threads = threads or max(1, cores() // count)
        ours, theirs = zip(*(pair() for _ in range(count)), strict=True)
        ends: list[dict[int, Any]] = [{} for _ in range(count)]
        for a, b in links:
            ends[a][b], ends[b][a] = pair()
        self.channels = [Channel(sock) for sock in ours]
        self.running: list[subprocess.Popen[bytes]] = []
        try:
            for i in range(count):
                sockets = [theirs[i], *ends[i].values()]
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
                self.running.append(subprocess.Popen(
                    [sys.executable, "-m", module, str(theirs[i].fileno())], env=environment, stdin=subprocess.DEVNULL,
                    pass_fds=[s.fileno() for s in sockets], start_new_session=True))
                self.channels[i].send({"rank": i, "count": count, "threads": threads, "folder": str(self.folder),
                                       "links": {str(j): s.fileno() for j, s in ends[i].items()}})
        finally:
            for sock in (*theirs, *(s for links_of in ends for s in links_of.values())):
                sock.close()  # the processes have theirs
        self._end = weakref.finalize(self, end, self.running, self.channels, self.folder)  # at the latest when the interpreter ends

    def __getitem__(self, rank: int) -> Channel:
        return self.channels[rank]

    def __len__(self) -> int:
        return self.count

    def close(self) -> None:
        """They are told to stop, and made to after `PATIENCE` seconds. Nothing where it was done; waits where another thread is at it."""
        self._end()
        for process in self.running:
            process.wait()

    def kill(self) -> None:
        """At once: one of them has died, and others may wait for it for ever."""
        for process in self.running:
            process.kill()
        self._end()

    @property
    def alive(self) -> bool:
        return self._end.alive and all(process.poll() is None for process in self.running)

    def died(self) -> RankDied:
        """Which of them ended, and how; the first of those that did not end well."""
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and not any(process.poll() for process in self.running):
            time.sleep(0.01)
        codes = [process.poll() for process in self.running]
        ended = [(i, code) for i, code in enumerate(codes) if code] or [(i, code) for i, code in enumerate(codes) if code is not None]
        ended.sort(key=lambda found: found[1] != -9 and found[1] != -11)  # those that were killed went first
        if not ended:
            return RankDied("a process of the model has closed its connection")
        rank, code = ended[0]
        return RankDied(f"process {rank} of {self.count} has ended", f"signal {-code}" if code < 0 else f"exit code {code}",
                        "see what it printed above; a killed process may have run out of memory")


def end(running: list[subprocess.Popen[bytes]], channels: list[Channel], folder: Path) -> None:
    for channel in channels:
        with contextlib.suppress(Gone):
            channel.send({"do": "stop"})
    deadline = time.monotonic() + PATIENCE
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        if process.poll() is None:
            process.kill()
            process.wait()
    for channel in channels:
        channel.close()
    shutil.rmtree(folder, ignore_errors=True)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
