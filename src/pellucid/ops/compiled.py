"""Whether the compiled kernels of `ops.jit` run here, and why not where they do not."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pellucid.runtime import Choice

_FORKED: list[bool] = []  # not empty in a child process whose parent ran kernels: numba would end it


@cache
def choose_jit() -> Choice:
    """True: kernels compiled by numba; False: PyTorch's operators, which compute the same. `PELLUCID_JIT=0` turns it off."""
    if os.environ.get("PELLUCID_JIT") == "0":
        return Choice(False, "turned off by PELLUCID_JIT=0")
    if _FORKED:
        return Choice(False, "a forked process: OpenMP's threads stayed with its parent")
    try:
        import numba
    except ImportError as error:
        return Choice(False, f"{error}: install pellucid[fast] for compiled CPU kernels")
    config: Any = numba.config
    config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # OpenMP: the threads that PyTorch has already
    threads = torch.get_num_threads()
    same_threads()
    torch.set_num_threads(threads)  # numba's first call has set OpenMP's number to all cores
    if numba.threading_layer() == "workqueue":
        return Choice(False, "numba found neither OpenMP nor TBB: its own threads do not bear two callers at once")
    return Choice(True, f"numba {numba.__version__} compiles the CPU kernels")


def same_threads() -> None:
    """As many threads for the kernels that this Python thread calls as PyTorch has now."""
    import numba

    config: Any = numba.config
    threads = min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != threads:
        numba.set_num_threads(threads)


def jit_serves(*tensors: Tensor) -> bool:
    """Whether kernels take these tensors: on a CPU, all float32 or all bfloat16, none of them empty."""
    dtype = tensors[0].dtype
    if dtype is not torch.float32 and dtype is not torch.bfloat16:
        return False
    if any(t.device.type != "cpu" or t.dtype is not dtype or not t.numel() for t in tensors) or not choose_jit().value:
        return False
    same_threads()
    return True


def _after_fork() -> None:
    if choose_jit.cache_info().currsize and choose_jit().value:
        _FORKED.append(True)
        choose_jit.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
