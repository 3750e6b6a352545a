"""Whether the compiled kernels of `ops.jit` run here, and why not where they do not."""

from __future__ import annotations

import os
from functools import cache

import torch

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
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    return Choice(True, f"numba {numba.__version__} compiles the CPU kernels")
