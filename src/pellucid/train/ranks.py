"""Several processes as one run: each does its share of a step, and all hold the same weights after it.

    torchrun --nproc-per-node 2 -m pellucid align grpo ...        or        pellucid align grpo ... --processes 2

Every process reads the same weights and draws the same data from the seed; a step's micro-batches (and a rollout's problems) are dealt
out in turn, gradients are summed, and every process takes the same optimizer step. A share is already divided by the count of the
WHOLE step (`Stepper`), so that a sum of gradients is all that it takes: N processes compute what one computes, but for the order
of additions. Clocks and Ctrl-C are agreed on, and one process writes files. What goes between processes is tensors and JSON.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pellucid.errors import PellucidError
from pellucid.nn.experts import Router

T = TypeVar("T")
BUCKET = 2**23  # numbers that are summed in one message


class Ranks:
    """This process among those of a run. `ALONE`: the only one; nothing is sent then."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None):
        self.rank, self.size, self.group = rank, size, group
        self._time = time.monotonic()

    def apart(self) -> Ranks:
        """The same processes with a channel of their own, for what is told beside the step. All of them ask for it."""
        return self if self.size == 1 else Ranks(self.rank, self.size, dist.new_group(backend="gloo"))

    @property
    def first(self) -> bool:
        """The one that writes files."""
        return self.rank == 0

    # --- shares -------------------------------------------------------------------------------------------------------

    def mine(self, things: Iterable[T]) -> Iterator[T]:
        """Every `size`-th of them, from this rank on."""
        return itertools.islice(things, self.rank, None, self.size)

    def rows(self, total: int, most: int | None = None) -> int:
        """Size of a micro-batch: at most `most`, and small enough that every process gets one."""
        return max(1, min(most or total, -(-total // self.size)))

    # --- what all of them get -------------------------------------------------------------------------------------------

    def gathered(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in their order."""
        if self.size == 1:
            return [value]
        body = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(n) for n in self._all(torch.tensor([len(body)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(body)] = body
        return [json.loads(bytes(part[:n].tolist())) for part, n in zip(self._all(padded), sizes)]

    def dealt(self, parts: Sequence[Sequence[T]]) -> list[T]:
        """The inverse of `mine`, from the parts of all processes."""
        return [x for group in itertools.zip_longest(*parts, fillvalue=_NOTHING) for x in group if x is not _NOTHING]

    def cat(self, x: Tensor) -> Tensor:
        """(m, ...) of every process, one behind the other, on the CPU where there are several."""
        if self.size == 1:
            return x
        sizes = [int(n) for n in self._all(torch.tensor([x.shape[0]]))]
        padded = x.new_zeros((max(sizes), *x.shape[1:]), device="cpu")
        padded[: x.shape[0]] = x.cpu()
        return torch.cat([part[:n] for part, n in zip(self._all(padded), sizes)])

    def merged(self, x: Tensor) -> Tensor:
        """Of tensors that hold numbers at different places and NaN elsewhere: all of these numbers."""
        if self.size == 1:
            return x
        known = ~x.isnan()
        both = torch.stack([torch.where(known, x, 0.0), known.to(x.dtype)]).cpu()
        self._sum(both)
        return torch.where(both[1] > 0, both[0], torch.nan).to(x.device)

    def agree(self, asked: bool = False) -> bool:
        """Whether any process asks (to stop); from here on the clock of all shows the first one's time."""
        if self.size == 1:
            return asked
        told = torch.tensor([time.monotonic() if self.first else 0.0, float(asked)], dtype=torch.float64)
        self._sum(told)
        self._time = float(told[0])
        return bool(told[1])

    def clock(self) -> float:
        """Seconds. Of several processes the time that they last agreed on: none may believe that the run is over before the others."""
        return time.monotonic() if self.size == 1 else self._time

    # --- a step -------------------------------------------------------------------------------------------------------

    def sum_gradients(self, model: nn.Module, loss: float) -> float:
        """Gradients of all processes are added, and returned is the sum of their losses.

        A parameter that no process has a gradient of keeps none (an optimizer leaves it alone); where one has, the others add 0.
        """
        if self.size == 1:
            return loss
        trained = [p for p in model.parameters() if p.requires_grad]
        told = torch.tensor([loss, *(float(p.grad is not None) for p in trained)], dtype=torch.float64)
        self._sum(told)
        total, *counts = told.tolist()
        kept = [p for p, count in zip(trained, counts) if count]
        for p in kept:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for part in _buckets([p.grad for p in kept if p.grad is not None]):
            flat = torch.cat([g.flatten() for g in part])
            self._sum(flat)
            for g, new in zip(part, flat.split([g.numel() for g in part])):
                g.copy_(new.view_as(g))
        self._sum_loads(model)
        return total

    def _sum_loads(self, model: nn.Module) -> None:
        """Of routers that are balanced without a loss: how many tokens each expert got, in all processes."""
        for router in (m for m in model.modules() if isinstance(m, Router)):
            if (bias := router.select_bias) is not None:
                router.load = torch.zeros_like(bias) if router.load is None else router.load.to(bias.dtype)
                self._sum(router.load)

    # --- messages -----------------------------------------------------------------------------------------------------

    def _all(self, x: Tensor) -> list[Tensor]:
        """Tensors of one shape from every process."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with _clearly():
            dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts

    def _sum(self, x: Tensor) -> None:
        """In place."""
        with _clearly():
            dist.all_reduce(x, group=self.group)


ALONE = Ranks()
_NOTHING: Any = object()


@contextlib.contextmanager
def _clearly() -> Iterator[None]:
    """A broken connection means that another process ended: its own message says why."""
    try:
        yield
    except RuntimeError as error:
        raise PellucidError("another process of this run has ended", str(error).split("\n")[0][:200],
                            "see what it said; the last checkpoint is intact") from error


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype and device together, up to BUCKET numbers."""
    for _, alike in itertools.groupby(gradients, key=lambda g: (g.dtype, g.device)):
        part: list[Tensor] = []
        for g in alike:
            if part and sum(x.numel() for x in part) + g.numel() > BUCKET:
                yield part
                part = []
            part.append(g)
        yield part


def several() -> bool:
    """Whether this process was started as one of several (by torchrun or --processes)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def joined() -> Ranks:
    """The processes that torchrun or --processes started, connected; where there is one only, `ALONE`."""
    if not several():
        return ALONE
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)  # its threads must not outlive the interpreter
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    ranks.agree()
    return ranks
