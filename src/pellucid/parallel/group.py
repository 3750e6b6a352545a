"""A group of processes, and what it computes together: a thin, typed face of `torch.distributed`.

gloo carries tensors on CPUs, nccl on GPUs. Without gradients: this is what serving needs.
Legend: W processes, n rows of one of them, D width.
"""

from __future__ import annotations

import os
import platform
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

LONG = timedelta(days=1000)
"""How long a process waits for the others. Who waits for ever is ended by the process that started them all: it sees who died."""

ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the same by their new names
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Group:
    """rank: of this process among `size`.  group: of torch.distributed; None: all of its processes."""

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None):
        self.rank, self.size, self.group = rank, size, group

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each. In place where x is contiguous."""
        if self.size == 1:
            return x
        x = x.contiguous()
        dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """The largest of all processes, number by number. In place where x is contiguous."""
        if self.size == 1:
            return x
        x = x.contiguous()
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """x of equal shapes -> (W, *shape), in the order of ranks."""
        if self.size == 1:
            return x[None]
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        ALL_GATHER(out, x.contiguous(), group=self.group)
        return out.unflatten(0, (self.size, -1)) if x.numel() else x.expand(self.size, *x.shape)

    def sum_of_own(self, x: Tensor) -> Tensor:
        """x (W n, D) -> (n, D): of the sum over all processes, the n rows of this one (reduce-scatter)."""
        if self.size == 1:
            return x
        out = x.new_empty(len(x) // self.size, *x.shape[1:])
        REDUCE_SCATTER(out, x.contiguous(), group=self.group)
        return out

    def blocks_of(self, size: int) -> Group:
        """The group of the `size` neighbours that this process belongs to. Called by all processes."""
        if size == self.size:
            return self
        if size == 1:
            return ALONE
        mine = self
        for start in range(0, self.size, size):
            ranks = list(range(start, start + size))
            group = dist.new_group(ranks, timeout=LONG)
            if self.rank in ranks:
                mine = Group(self.rank - start, size, group)
        return mine

    def across(self, size: int) -> Group:
        """With neighbours in blocks of `size`: the group of those at the same place of each block. Called by all processes."""
        if size == 1:
            return self
        mine = self
        for place in range(size):
            ranks = list(range(place, self.size, size))
            group = dist.new_group(ranks, timeout=LONG)
            if self.rank in ranks:
                mine = Group(self.rank // size, len(ranks), group)
        return mine


ALONE = Group()


def join(rank: int, size: int, folder: Path, device: torch.device) -> Group:
    """The group of `size` processes on this machine that meet in a private folder. Sets the device of a process on GPUs."""
    loopback = {"Linux": "lo", "Darwin": "lo0"}.get(platform.system())
    if loopback:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback  # nobody from outside can take part, whatever is set for training on several machines
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    store = dist.FileStore(str(folder / "meeting"), size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONG)
    return Group(rank, size)
