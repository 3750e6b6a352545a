"""One of the processes of a model: `python -m pellucid.engine.worker SOCKET`, started by `engine.fleet`.

What it is told (JSON over the socket, see parallel/wire.py), and what it answers:

    open    a model, its layout, the engine's settings      opened: memory, cache, seconds     or failed: what, why, next
    load_adapter, drop_adapter  see engine/shared_adapters.py
    add     a request                                       refused: where it could never run
    cancel  a request by its number
    step    (engines that step together)                    step: tokens by request, figures, the record of the step
    close   the engine                                      closed
    stop    the process

An engine that steps by itself does so while it has work, and answers after every step. It never reads what it is sent as code.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pellucid.engine import disaggregation
from pellucid.engine.config import EngineConfig, choose_room, codes_for, groups_for
from pellucid.engine.core import Engine
from pellucid.engine.dp_attention import SharingLead, SharingRunner
from pellucid.engine.layout import Layout
from pellucid.engine.opening import bits_to_run, open_draft, open_model
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.engine.runner import Runner
from pellucid.engine.served import Served
from pellucid.engine.shared_adapters import AdapterTable
from pellucid.engine.tensor_parallel import Follower, LeadRunner
from pellucid.errors import BadInput
from pellucid.models.hub import local_folder
from pellucid.nn import Decoder
from pellucid.parallel import Channel, Gone, Group, Slice, in_three, load_part
from pellucid.parallel.group import join
from pellucid.quant import bits_named, held_bytes
from pellucid.runtime import choose_device, dtype_of, peak_memory_bytes
from pellucid.tokenizers import Tokenizer

GRACE = 3.0
"""Seconds before a failed collective is told: where a neighbour has died, whoever started us ends this process meanwhile, and knows why."""


class Worker:
    """What this process is, whatever model it has."""

    def __init__(self, driver: Channel):
        self.driver = driver
        hello = driver.receive()[0]
        self.rank, self.count, self.folder = int(hello["rank"]), int(hello["count"]), Path(hello["folder"])
        self.links = {int(rank): Channel(socket.socket(fileno=fd)) for rank, fd in hello["links"].items()}
        self.world: Group | None = None
        self.groups: dict[int, Group] = {}  # size -> of neighbours; -size -> across blocks of them
        torch.set_num_threads(hello["threads"])

    def run(self) -> None:
        while (message := self.driver.receive()[0])["do"] != "stop":
            if message["do"] == "open":
                self.open(message)

    def open(self, job: dict[str, Any]) -> None:
        """A model from beginning to end. What is wrong with it is told; the process is there for another one."""
        began = time.perf_counter()
        try:
            serve = self.prepare(job)
        except (BadInput, MemoryError) as error:
            self.driver.send({"failed": in_three(error)})
            return
        serve(began)
        self.driver.send({"closed": True})

    def prepare(self, job: dict[str, Any]) -> Callable[[float], None]:
        layout, config, folder = Layout(**job["layout"]), EngineConfig(**job["config"]), local_folder(job["model"])
        bits = bits_to_run(folder, bits_named(job["quantize"]), job["device"])
        device = self.device("cpu" if bits else job["device"])
        make: dict[str, Any] = {}
        if layout.kind in ("tensor", "attention"):
            size, mixers = layout.sharing
            group = self.neighbours(size, device)
            mixing = group if mixers is None else self.neighbours(mixers, device)
            model: Decoder
            model, read = load_part(folder, Slice(group.rank, size, mixers), group, dtype_of(job["dtype"]), device, bits, config.proposer == "mtp", mixing)
            if layout.together:
                make = {"group": self.across(layout.tp, device), "within": mixing}
        else:
            model = open_model(folder, job["dtype"], str(device), job["allow_missing"], bits)
            read = held_bytes(model)
        about = {"rank": self.rank, "read": read, "weights": held_bytes(model)}
        if self.rank not in layout.leads:
            return partial(self.follow, model, config, self.links[self.rank // layout.tp * layout.tp], about, make)
        runner: Callable[..., Runner] = partial(SharingRunner if make else Runner, **make)
        if layout.tp > 1:
            runner = partial(SharingLead if make else LeadRunner, **make, others=list(self.links.values()))
        tokenizer, draft = Tokenizer.load(folder), None
        if self.rank not in layout.proposing:
            config = replace(config, drafts=0, proposer=None)
        elif job["draft"] is not None:
            draft = open_draft(job["draft"], job["dtype"], str(device), job["allow_missing"], bits_named(job["quantize"]))
        engine = Engine(model, tokenizer.eos_ids, self.roomy(model, config, layout, draft), tokenizer, draft=draft, same=job["same"], runner=runner)
        role = disaggregation.ROLES[self.rank] if layout.disaggregate else Served
        adapters = AdapterTable(model, () if layout.disaggregate else list(self.links.values()))
        return partial(self.lead, role(engine, self.driver, layout.together, self.links, adapters), about)

    def device(self, name: str) -> torch.device:
        chosen: torch.device = choose_device(name).value
        return torch.device("cuda", self.rank % torch.cuda.device_count()) if chosen.type == "cuda" else chosen

    def neighbours(self, size: int, device: torch.device) -> Group:
        """The group of this process and those beside it; the first time all processes meet."""
        if self.world is None:
            self.world = join(self.rank, self.count, self.folder, device)
        if size not in self.groups:
            self.groups[size] = self.world.blocks_of(size)
        return self.groups[size]

    def across(self, size: int, device: torch.device) -> Group:
        """The group of those at the same place of each block of `size` neighbours."""
        self.neighbours(size, device)
        assert self.world is not None
        if -size not in self.groups:
            self.groups[-size] = self.world.across(size)
        return self.groups[-size]

    def roomy(self, model: Decoder, config: EngineConfig, layout: Layout, draft: Decoder | None) -> EngineConfig:
        """Where memory decides about the cache, processes on one machine share it."""
        room = choose_room(model, config, draft).value
        limited = config.cache_tokens is None and room < config.running * model.spec.context
        if limited and not model.embed.weight.is_cuda:
            room = max(config.block, room // layout.processes)
        return replace(config, cache_tokens=room)

    def follow(self, model: Decoder, config: EngineConfig, lead: Channel, about: dict[str, Any], make: dict[str, Any], began: float) -> None:
        message = lead.receive()[0]
        groups = groups_for(model, config).value if message["apart"] else None
        kind: Callable[..., Runner] = partial(SharingRunner if make else Runner, **make)
        runner = kind(model, message["blocks"], message["size"], message["places"], codes_for(model, config), groups)
        self.driver.send({"opened": self.memory(about, runner, began)})
        follower = Follower(runner, lead)
        if isinstance(runner, SharingRunner):
            runner.adapters = follower.adapters
        follower.run()

    def lead(self, served: Served, about: dict[str, Any], began: float) -> None:
        engine = served.engine
        if isinstance(engine.runner, SharingRunner):
            engine.runner.adapters = served.adapters
        warm_up(engine)
        more = {"blocks": engine.cache.blocks, "size": engine.cache.size, "windows": engine.cache.windows, "stride": engine.cache.stride, "totals": engine.totals}
        self.driver.send({"opened": self.memory(about, engine.runner, began) | more})
        try:
            served.loop()
        finally:
            if isinstance(engine.runner, LeadRunner):
                with contextlib.suppress(Gone):
                    engine.runner.finish()

    def memory(self, about: dict[str, Any], runner: Runner, began: float) -> dict[str, Any]:
        return about | {"cache_bytes_per_token": runner.pages.bytes_per_block / runner.pages.size, "path": runner.path.value,
                        "peak": peak_memory_bytes(), "seconds": time.perf_counter() - began}


def warm_up(engine: Engine) -> None:
    """Two tokens: kernels are compiled, and states have their memory, before anybody waits. What was counted is forgotten."""
    engine.add(Request([0, 1], SamplingParams(max_tokens=2, ignore_eos=True)))
    while engine.busy:
        engine.step()
    engine.totals = dict.fromkeys(engine.totals, 0)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it decides
    driver = Channel(socket.socket(fileno=int(sys.argv[1])))
    try:
        Worker(driver).run()
    except Gone:  # the one that started it, or a neighbour: nothing is left to do
        return 0
    except BaseException as error:
        if isinstance(error, RuntimeError) and dist.is_initialized():
            time.sleep(GRACE)
        traceback.print_exc()
        with contextlib.suppress(Gone):
            driver.send({"failed": in_three(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
