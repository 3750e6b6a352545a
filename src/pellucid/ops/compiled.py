"""Whether the compiled kernels of `ops.jit` run here, and why not where they do not."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
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
        return _start_numba()
    except Exception as error:  # a broken installation, no folder to keep kernels in, ...: the twins run, and the reason is shown
        return Choice(False, f"numba cannot be used ({type(error).__name__}: {str(error).splitlines()[0]}); "
                             "pip install 'pellucid[fast]' brings it, NUMBA_CACHE_DIR names a folder for its kernels")


def _start_numba() -> Choice:
    import numba

    config: Any = numba.config
    if config.DISABLE_JIT:
        return Choice(False, "turned off by NUMBA_DISABLE_JIT")
    config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # OpenMP: the threads that PyTorch has already
    threads = torch.get_num_threads()
    same_threads()
    torch.set_num_threads(threads)  # numba's first call has set OpenMP's number to all cores
    if numba.threading_layer() == "workqueue":
        return Choice(False, "numba found neither OpenMP nor TBB: its own threads do not bear two callers at once")
    with kernel_cache():
        for name in ("train", "decode", "draw", "experts"):
            importlib.import_module(f"pellucid.ops.jit.{name}")
    return Choice(True, f"numba {numba.__version__} compiles the CPU kernels")


@contextlib.contextmanager
def kernel_cache() -> Iterator[None]:
    """Kernels defined inside are kept in a folder named after the text of all of them: numba itself looks only at the file
    of a kernel, and would go on with old code when another one that it calls has changed."""
    import numba

    config: Any = numba.config
    before = config.CACHE_DIR
    folder = Path(__file__).parent / "jit"
    text = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    if not before and os.access(folder, os.W_OK):
        config.CACHE_DIR = str(folder / "__pycache__" / f"kernels-{hashlib.sha256(text).hexdigest()[:12]}")
    try:
        yield
    finally:
        config.CACHE_DIR = before


def same_threads(most: int = 2**31) -> None:
    """As many threads for the kernels that this Python thread calls as PyTorch has now, at most so many."""
    import numba

    config: Any = numba.config
    threads = min(torch.get_num_threads(), config.NUMBA_NUM_THREADS, most)
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
