"""Whether the compiled kernels of `ops.jit` run here, and why not where they do not."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pellucid.runtime import Choice


@cache
def choose_jit() -> Choice:
    """True: kernels compiled by numba; False: PyTorch's operators, which compute the same. `PELLUCID_JIT=0` turns it off."""
    if os.environ.get("PELLUCID_JIT") == "0":
        return Choice(False, "turned off by PELLUCID_JIT=0")
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
