"""An engine whose work is done by other processes: the same face, for `LLM`, `AsyncLLM` and the server.

    fleet = Fleet("runs/grow/model", Layout(tp=2), spec, tokenizer, EngineConfig())
    fleet.add(request)
    while fleet.busy:
        for request, tokens in fleet.step(): ...

The processes (engine/worker.py) hold weights and caches; this one holds the requests, gives each to an engine, and writes what
comes back into them. It computes nothing and waits in no collective: when a process dies it sees that, ends the others, and
everybody who waits hears it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pellucid import events
from pellucid.engine.adapters import Adapter
from pellucid.engine.config import EngineConfig, drafts_of
from pellucid.engine.core import Engine, EngineStep
from pellucid.engine.layout import Layout
from pellucid.engine.opening import bits_to_run
from pellucid.engine.prefix_cache import NoReuse
from pellucid.engine.request import Request, State
from pellucid.engine.routing import Router
from pellucid.engine.scheduler import Scheduler
from pellucid.engine.served import message_of
from pellucid.engine.shared_adapters import AdapterDesk
from pellucid.engine.stopping import StopTexts
from pellucid.errors import BadInput
from pellucid.messages import add, say
from pellucid.models.hub import blank, local_folder
from pellucid.nn import DecoderSpec
from pellucid.parallel import Gone, Processes, RankDied, Slice, check_groups
from pellucid.parallel.wire import Garbled
from pellucid.quant import bits_named
from pellucid.runtime import choose_device
from pellucid.tokenizers import Tokenizer

add({
    "fleet.ready": ("process {rank}: {weights} MiB of weights ({read} MiB read), {cache} bytes of cache a token, peak memory {peak}, {seconds} s",
                    "进程 {rank}：权重 {weights} MiB（读取 {read} MiB），每词元缓存 {cache} 字节，内存峰值 {peak}，{seconds} 秒"),
})


@dataclass
class ProcessReady(events.Event):
    """A process of a model is ready.  weights, read: bytes that it holds, and that it read.  peak: of its memory.  cache: bytes that a
    token takes in its cache."""

    kind = "process_ready"
    rank: int
    weights: int
    read: int
    cache: float
    peak: int | None
    seconds: float

    def __str__(self) -> str:
        peak = "-" if self.peak is None else f"{self.peak / 2**20:,.0f} MiB"
        return say("fleet.ready", rank=self.rank, weights=f"{self.weights / 2**20:,.1f}", read=f"{self.read / 2**20:,.1f}", cache=f"{self.cache:,.0f}",
                   peak=peak, seconds=f"{self.seconds:.1f}")


class Figures:
    """What is known of the caches of all engines together; as a cache, for those who look at one."""

    def __init__(self, blocks: int, size: int):
        self.blocks, self.size = blocks, size
        self.free = blocks

    def available(self) -> int:
        return self.free

    @property
    def references(self) -> list[int]:
        """How many are in use, not which."""
        return [1] * (self.blocks - self.free) + [0] * self.free


class Fleet(Engine):
    """model: folder or Hub id.  spec: of the whole model.  draft: folder or Hub id of a model that proposes, and `same` as in `DraftModel`.
    processes: that run already, and go on afterwards."""

    def __init__(self, model: str | os.PathLike[str], layout: Layout, spec: DecoderSpec, tokenizer: Tokenizer, config: EngineConfig | None = None, *,
                 dtype: str = "float32", device: str = "cpu", allow_missing: bool = False, quantize: str | None = None,
                 draft: str | os.PathLike[str] | None = None, same: int | None = None, processes: Processes | None = None, threads: int | None = None):
        layout.check(spec)
        self.layout, self.config, self.tokenizer = layout, config or EngineConfig(), tokenizer
        self.model: Any = blank(spec)  # without memory: for those who ask what it is
        refuse_what_is_not_shared(self.model, local_folder(model), layout, device, quantize)
        self.drafts = drafts_of(self.config, draft is not None)
        self.eos, self.stop, self.grammars = set(tokenizer.eos_ids), StopTexts(tokenizer), None
        self.own = processes is None
        self.processes = processes or Processes("pellucid.engine.worker", layout.processes, layout.links, threads)
        self.heard: queue.SimpleQueue[tuple[int, dict[str, Any] | None]] = queue.SimpleQueue()
        self.adapters = AdapterDesk(self._send_leads, len(layout.leads), self._gone)
        self.dead: RankDied | None = None
        self.closing = False
        self.on_death: Callable[[RankDied], None] | None = None
        self.numbers = itertools.count()
        self.requests: dict[int, tuple[Request, int]] = {}  # number -> the request, the place of its engine
        self.number_of: dict[Request, int] = {}
        self.router = Router(len(layout.entries))
        self.latest: dict[int, dict[str, Any]] = {}  # of each engine
        self.early: list[dict[str, Any]] = []  # tokens that came before those in front of them
        self.steps = 0
        job = {"do": "open", "model": os.fspath(model), "layout": asdict(layout), "config": asdict(self.config), "dtype": dtype,
               "device": device, "allow_missing": allow_missing, "quantize": quantize,
               "draft": None if draft is None else os.fspath(draft), "same": same}
        for rank in range(layout.processes):
            self._send(rank, job)
            threading.Thread(target=self._listen, args=(rank,), daemon=True, name=f"rank {rank}").start()
        self._opened()

    # --- the processes --------------------------------------------------------------------------------------------------

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        try:
            self.processes[rank].send(message)
        except Gone:
            raise self._bury() from None

    def _send_leads(self, message: dict[str, Any]) -> None:
        for rank in self.layout.leads:
            self._send(rank, message)

    def _gone(self) -> RankDied:
        return RankDied("the engine was closed") if self.closing else self._bury()

    def _listen(self, rank: int) -> None:
        """A thread: what one process says is taken from it at once, so that it never waits for us."""
        with contextlib.suppress(Gone, Garbled):
            while True:
                message = self.processes[rank].receive()[0]
                if "adapter" in message:  # who loads it is another thread
                    self.adapters.heard(message)
                    continue
                self.heard.put((rank, message))
                if "closed" in message:
                    return
        self.heard.put((rank, None))
        self.adapters.died()
        if not self.closing and self.on_death is not None:
            self.on_death(self._bury())

    def _bury(self) -> RankDied:
        """One has died: the others end."""
        if self.dead is None:
            self.dead = self.processes.died()
            self.processes.kill()
        return self.dead

    def _hear(self, block: bool = True) -> tuple[int, dict[str, Any]]:
        rank, message = self.heard.get(block)
        if message is None:
            raise self._bury()
        if "failed" in message and "given" not in message:
            failed = message["failed"]
            self.heard.put((rank, None))
            self.dead = self.dead or RankDied(f"process {rank}: {failed['what']}", failed["why"], failed["next"])
            self.processes.kill()
            raise self.dead
        return rank, message

    def _opened(self) -> None:
        ready: dict[int, dict[str, Any]] = {}
        failed: list[dict[str, str]] = []
        for _ in range(self.layout.processes):
            rank, message = self.heard.get()
            if message is None:
                raise self._bury()
            if "failed" in message:
                failed.append(message["failed"])
                break
            ready[rank] = message["opened"]
        if failed:
            self.closing = True
            self.processes.kill()
            raise BadInput(failed[0]["what"], failed[0]["why"], failed[0]["next"])
        self.ready = [ready[rank] for rank in sorted(ready)]
        for r in self.ready:
            events.emit(told := ProcessReady(r["rank"], r["weights"], r["read"], r["cache_bytes_per_token"], r["peak"], r["seconds"]))
            events.note(str(told))
        leads = [ready[rank] for rank in self.layout.leads]
        self.cache: Any = Figures(sum(r["blocks"] for r in leads), leads[0]["size"])
        self.totals = dict.fromkeys((name for r in leads for name in r["totals"]), 0)
        first, c = leads[0], self.config
        like = NoReuse(min(r["blocks"] for r in leads), first["size"], tuple(first["windows"]), first["stride"])
        self.scheduler = Scheduler(like, budget=c.budget, places=c.running, chunk=c.chunk, context=self.model.spec.limit)

    def close(self) -> None:
        """Everything ends; nothing where it was done."""
        if self.closing:
            return
        self.closing = True
        self.adapters.died()
        if self.dead is None and not self.own:
            self._send_leads({"do": "close"})
            closed = 0
            while closed < self.layout.processes:
                _, message = self.heard.get()
                if message is None:
                    raise self._bury()
                closed += "closed" in message
        if self.own:
            self.processes.close()

    # --- the face of an engine --------------------------------------------------------------------------------------------

    def add(self, request: Request, behind: Request | None = None) -> None:
        self._living()
        self.check(request)
        known = None if behind is None else self.number_of.get(behind)
        place = self.router.choose(request)
        if known is not None:  # samples of a prompt stay together
            self.router.leave(request, place)
            place = self.requests[known][1]
            self.router.loads[place] += request.limit
            self.router.counts[place] += 1
        number = next(self.numbers)
        request.number = number
        self.requests[number], self.number_of[request] = (request, place), number
        self.adapters.begins(request)
        self.scheduler.waiting.append(request)
        self._send(self.layout.entries[place], {"do": "add", "number": number, "behind": known, **message_of(request)})

    def check(self, request: Request) -> None:
        super().check(request)
        if request.adapter is not None and request.adapter.number < 0:
            raise BadInput(f"the adapter {request.adapter.name} is in this process alone", "others compute the answers", "load it with load_adapter")

    def load_adapter(self, path: str | os.PathLike[str], name: str = "") -> Adapter:
        """From any thread; see `read_adapter`."""
        self._living()
        return self.adapters.load(path, name)

    def drop_adapter(self, adapter: Adapter) -> None:
        """Requests under way end with it; its memory is free then."""
        if self.dead is None:
            self.adapters.drop(adapter)

    def cancel(self, request: Request) -> None:
        number = self.number_of.get(request)
        if number is None:
            if request.state is not State.FINISHED:
                request.state, request.finish_reason = State.FINISHED, "cancelled"
            return
        place = self.requests[number][1]
        self._leave(request, "cancelled")
        if self.dead is None:
            self._send(self.layout.entries[place], {"do": "cancel", "number": number})

    def step(self) -> list[tuple[Request, list[int]]]:
        """Engines that step together make one step; of the others the next answers are taken. Each request stands there once, with all
        its new tokens: its `finish_reason` is the last message's, so that the first of two would look like the end."""
        self._living()
        given: list[tuple[Request, list[int]]] = []
        if self.layout.together:
            self._send_leads({"do": "step"})
            waiting = set(self.layout.leads)
            while waiting:
                rank, message = self._hear()
                given += self._take(rank, message)
                if "step" in message:
                    waiting.discard(rank)
            return once_each(given)
        given += self._take(*self._hear())
        with contextlib.suppress(queue.Empty):
            while True:
                given += self._take(*self._hear(block=False))
        return once_each(given)

    def snapshot(self) -> dict[str, Any]:
        def row(r: Request) -> dict[str, Any]:
            return {"number": r.number, "state": r.state.value, "prompt": len(r.prompt), "computed": max(0, len(r.tokens) - 1) if r.generated else 0,
                    "known": len(r.tokens), "hit": r.hit, "preemptions": r.preemptions, "priority": r.priority, "namespace": r.namespace, "blocks": []}
        return {"running": [row(r) for r in self.scheduler.running], "waiting": [row(r) for r in self.scheduler.waiting],
                "available": self.cache.available(), "blocks": self.cache.blocks, "block": self.cache.size, "totals": dict(self.totals),
                "processes": self.ready}

    def _living(self) -> None:
        if self.dead is not None:
            raise self.dead

    def _leave(self, request: Request, reason: str) -> None:
        number = self.number_of.pop(request)
        self.router.leave(request, self.requests.pop(number)[1])
        self.adapters.ends(request)
        for some in (self.scheduler.waiting, self.scheduler.running):
            if request in some:
                some.remove(request)
        request.state, request.finish_reason = State.FINISHED, reason

    def _take(self, rank: int, message: dict[str, Any]) -> list[tuple[Request, list[int]]]:
        """What an engine said, into the requests. Those that were cancelled meanwhile are not known any more."""
        if "refused" in message:
            known = self.requests.get(message["refused"])
            if known is None:
                return []
            events.note(f"a request was refused: {message['what']}", "warning")
            known[0].fault = "refused"
            self._leave(known[0], "error")
            return [(known[0], [])]
        for number in message.get("running", ()):
            if (known := self.requests.get(number)) is not None and known[0].state is State.WAITING:
                self._start(known[0])
        given = []
        self.early += message.get("step", ())
        for row in sorted(self.early, key=lambda row: row["at"]):
            if (known := self.requests.get(row["number"])) is None:
                self.early.remove(row)
            elif row["at"] == known[0].generated:  # else what comes before it is on its way from another process
                self.early.remove(row)
                given.append(self._received(known[0], row))
        self._count(rank, message)
        return given

    def _received(self, r: Request, row: dict[str, Any]) -> tuple[Request, list[int]]:
        if r.state is State.WAITING:
            self._start(r)
        r.tokens += row["tokens"]
        r.computed, r.hit, r.preemptions = len(r.tokens) - 1, max(r.hit, row["hit"]), max(r.preemptions, row["preemptions"])
        r.logprobs += row.get("logprobs", ())
        r.tops += [[(token, logprob) for token, logprob in top] for top in row.get("tops", ())]
        r.prompt_logprobs += row.get("prompt_logprobs", ())
        r.prompt_tops += [[(token, logprob) for token, logprob in top] for top in row.get("prompt_tops", ())]
        if row["reason"]:
            r.fault = row["fault"]
            self._leave(r, row["reason"])
        return r, row["tokens"]

    def _start(self, r: Request) -> None:
        r.state = State.RUNNING
        self.scheduler.waiting.remove(r)
        self.scheduler.running.append(r)

    def _count(self, rank: int, message: dict[str, Any]) -> None:
        if "totals" not in message:
            return
        self.latest[rank] = message
        self.totals = {name: sum(m["totals"].get(name, 0) for m in self.latest.values()) for name in self.totals}
        used = sum(r["blocks"] - self.latest[r["rank"]]["available"] for r in self.ready if r["rank"] in self.latest)
        self.cache.free = self.cache.blocks - used
        if record := message.get("record"):
            self.steps += 1
            names = {f.name for f in fields(EngineStep)}
            record = {name: value for name, value in record.items() if name in names}
            record |= {"running": len(self.scheduler.running), "waiting": len(self.scheduler.waiting), "available": self.cache.free,
                       "blocks": self.cache.blocks, "step": self.steps}
            events.emit(EngineStep(**record))


def once_each(given: list[tuple[Request, list[int]]]) -> list[tuple[Request, list[int]]]:
    merged: dict[Request, list[int]] = {}
    for request, tokens in given:
        merged.setdefault(request, []).extend(tokens)
    return list(merged.items())


def refuse_what_is_not_shared(model: Any, folder: Path, layout: Layout, device: str, quantize: str | None) -> None:
    """BadInput for what cannot be spread so.  model: on the meta device."""
    bits = bits_to_run(folder, bits_named(quantize), device)
    if layout.kind not in ("tensor", "attention"):
        return
    if bits is None and choose_device(device).value.type == "cuda" and torch.cuda.device_count() < layout.processes:
        raise BadInput(f"{layout.processes} processes and {torch.cuda.device_count()} GPU(s)", "each of them needs one of its own",
                       f"use at most {torch.cuda.device_count()}, or --device cpu")
    if bits == 4:
        check_groups(model, Slice(0, *layout.sharing))
