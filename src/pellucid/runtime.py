"""Device, dtype, threads, seeds: every automatic choice carries its reason.

Nothing is probed at import: call `choose(...)` (or one of its parts), print `choice.reason`, and go on.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import re
import time
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

from pellucid.errors import BadInput
from pellucid.messages import Text, add, both, pick, three_parts

if TYPE_CHECKING:
    import torch

add({
    "runtime.asked": ("asked for", "由用户指定"),
    "runtime.gpu": ("found {name}", "找到 {name}"),
    "runtime.no_gpu": ("no CUDA GPU found", "没有找到 CUDA GPU"),
    "runtime.cores": ("{count} usable cores", "可用核心 {count} 个"),
    "runtime.bf16": ("GPU with bf16", "GPU 支持 bf16"),
    "runtime.no_bf16": ("GPU without bf16", "GPU 不支持 bf16"),
    "runtime.dtype": ("measured bf16 {fast:.0f}, fp32 {slow:.0f} GFLOP/s at width {dim}",
                      "宽度 {dim} 时实测 bf16 {fast:.0f}、fp32 {slow:.0f} GFLOP/s"),
    "error.device": ("the device {name!r} cannot be used", "设备 {name!r} 不可用"),
    "error.device.why": ("PyTorch says: {text}", "PyTorch 报告：{text}"),
    "error.device.next": ("use cpu, cuda or auto", "可用 cpu、cuda 或 auto"),
    "error.cuda": ("device cuda was asked for", "指定了设备 cuda"),
    "error.cuda.why": ("this machine shows no CUDA GPU to PyTorch", "PyTorch 在本机找不到 CUDA GPU"),
    "error.cuda.next": ("use --device cpu", "请用 --device cpu"),
    "error.seed": ("--seed {asked} is not possible", "--seed {asked} 不可行"),
    "error.seed.next": ("give a whole number of at most 63 bits", "请用不超过 63 位的整数"),
    "error.threads": ("--threads {asked} is not possible", "--threads {asked} 不可行"),
    "error.threads.next": ("give 1 or more", "至少为 1"),
})


@dataclass(frozen=True)
class Choice:
    """A resolved setting and why it was chosen; `text` is the reason in both languages, where it has them."""

    value: Any
    reason: str
    text: Text | None = field(default=None, compare=False)

    @classmethod
    def because(cls, value: Any, text: Text) -> Choice:
        return cls(value, pick(*text), text)

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


def choose_device(name: str = "auto") -> Choice:
    """A CUDA GPU where there is one, else the CPU; or what was asked for. Errors: BadInput for what this machine cannot compute on."""
    import torch

    if name != "auto":
        try:
            device = torch.device(name)
            if device.type == "cuda" and not torch.cuda.is_available():
                raise BadInput(*three_parts("error.cuda"))
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, ImportError) as error:  # the last two: PyTorch was built without it
            first = re.split(r"\n|\. ", str(error))[0]
            raise BadInput(*three_parts("error.device", name=name, text=first)) from error
        return Choice.because(device, both("runtime.asked"))
    if torch.cuda.is_available():
        return Choice.because(torch.device("cuda"), both("runtime.gpu", name=torch.cuda.get_device_name()))
    return Choice.because(torch.device("cpu"), both("runtime.no_gpu"))


DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16"}


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """'float32' | 'fp32' | 'bfloat16' | 'bf16' | 'float16' (or a dtype) -> torch.dtype."""
    import torch

    if isinstance(name, torch.dtype):
        return name
    if not isinstance(name, str) or name not in DTYPES:
        raise BadInput(f"unknown dtype {name!r}", next=f"one of {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[name])


def choose_threads(asked: int | None = None) -> Choice:
    """Threads for PyTorch's kernels: what was asked for, else the cores this process may use."""
    import torch

    if asked is not None and asked < 1:
        raise BadInput(*three_parts("error.threads", asked=asked))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    choice = Choice.because(asked or usable, both("runtime.asked") if asked else both("runtime.cores", count=usable))
    torch.set_num_threads(choice.value)
    return choice


def spin_briefly() -> None:
    """Have OpenMP's waiting threads sleep after some 10 microseconds. Call before torch is imported; what the user has set stays.

    By default GNU's OpenMP (in PyTorch's CPU wheels) spins for milliseconds at the end of every operator. Alone on the
    machine that costs nothing; beside another busy process it takes the very core that the slower thread needs:
    sampling at batch 128 fell to a sixth there, and to a third with this bound. Quiet machines: no difference seen.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def ask_for_large_pages() -> None:
    """Have PyTorch put what takes 2 MB and more into pages of that size. Call before torch is imported; what the user has set stays.

    For serving: a token reads every weight once, and with pages of 4 KB two threads got 23 GB/s of bfloat16, with these 32. Not for
    training, whose activations come and go.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def choose_dtype(dim: int, device: torch.device, seconds: float = 0.15) -> Choice:
    """bfloat16 or float32 for the matrix products of a model of width `dim`, by a short measurement."""
    import torch

    if device.type == "cuda":
        ok = torch.cuda.is_bf16_supported()
        return Choice.because(torch.bfloat16 if ok else torch.float32, both("runtime.bf16" if ok else "runtime.no_bf16"))
    speed = {d: matmul_gflops(2048, dim, 3 * dim, d, seconds / 2) for d in (torch.float32, torch.bfloat16)}
    fast, slow = speed[torch.bfloat16], speed[torch.float32]
    reason = both("runtime.dtype", fast=fast, slow=slow, dim=dim)
    # bf16 pays for casts around every product: it must be clearly faster to win.
    return Choice.because(torch.bfloat16 if fast > 1.3 * slow else torch.float32, reason)


def matmul_gflops(rows: int, inner: int, cols: int, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Measured GFLOP/s of (rows, inner) @ (cols, inner)^T on the CPU: the best of repeated runs."""
    import torch

    a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(cols, inner, dtype=dtype)
    return 2 * rows * inner * cols / best_seconds(lambda: torch.nn.functional.linear(a, b), seconds) / 1e9


def read_bandwidth_gbs(megabytes: int = 256, seconds: float = 0.2) -> float:
    """Measured read bandwidth (GB/s): the sum of a float32 array larger than the caches."""
    import torch

    x = torch.ones(megabytes * 2**18)
    return x.numel() * 4 / best_seconds(x.sum, seconds) / 1e9


def best_seconds(call: Any, budget: float) -> float:
    """Shortest time of one `call()`, repeated for about `budget` seconds after a warm-up."""
    call()
    best, end = float("inf"), time.perf_counter() + budget
    while True:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() >= end:
            return best


def seed_everything(seed: int) -> None:
    """Python's and PyTorch's global generators. Library code prefers explicit `torch.Generator`s. Errors: BadInput for a seed
    that PyTorch's generators cannot take."""
    import torch

    if not -(2**63) <= seed < 2**63:
        raise BadInput(*three_parts("error.seed", asked=seed))
    random.seed(seed)
    torch.manual_seed(seed)


def peak_memory_bytes() -> int | None:
    """Largest resident size of this process (bytes) since the last `reset_peak_memory`, or since it began; None where
    the system does not tell."""
    if (peak := _status("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def resident_bytes() -> int | None:
    """Memory that this process holds now."""
    return _status("VmRSS")


def reset_peak_memory() -> bool:
    """Let the peak begin again at what is held now; False where only Linux's `clear_refs` could (then it stays the
    peak of the whole process). What was freed is first given back to the system: it is no need of what comes next."""
    release_memory()
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        return False
    return True


@cache
def keep_freed_memory() -> bool:
    """Have the C library keep freed blocks (up to 32 MiB each) for the next tensor instead of giving them back at once.

    glibc returns a large block to the system and gets it again, page by page, at the next operator: some 20,000 page
    faults in a training step of a million parameters, a seventh of its time. The process's memory stays near its peak
    until `release_memory`. For loops that run the same step again and again; False where it is not glibc on Linux.
    """
    import ctypes

    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    library = ctypes.CDLL(None)
    return bool(library.mallopt(m_mmap_threshold, 2**25)) and bool(library.mallopt(m_trim_threshold, 2**30))


def release_memory() -> None:
    """Collect cycles, and have the C library (glibc keeps what is freed) hand its free pages back."""
    import ctypes
    import gc

    gc.collect()
    if platform.system() == "Linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def forget_pages(address: int, size: int) -> None:
    """Tell the kernel that bytes which were read from a mapped file are not needed again: their whole pages leave this
    process's memory (and would be read again if touched). Nothing happens where there is no such call."""
    import ctypes
    import mmap

    page = mmap.PAGESIZE
    start, stop = -(-address // page) * page, (address + size) // page * page
    if platform.system() == "Linux" and stop > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def available_memory_bytes() -> int | None:
    """What this process may still take: the machine's available memory, or less where a control group sets a limit.
    None where the system does not tell."""
    free = _kib("/proc/meminfo", "MemAvailable")
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            room = _whole_number(f"/sys/fs/cgroup/{limit}") - _whole_number(f"/sys/fs/cgroup/{used}")
            free = room if free is None else min(free, max(room, 0))
    return free


def _whole_number(path: str) -> int:
    with open(path, encoding="ascii") as f:
        return int(f.read())


def _status(name: str) -> int | None:
    return _kib("/proc/self/status", name)


def _kib(path: str, name: str) -> int | None:
    """The line `name: 123 kB` of one of Linux's files, in bytes."""
    try:
        with open(path, encoding="utf-8") as f:
            return next((int(line.split()[1]) * 1024 for line in f if line.startswith(f"{name}:")), None)
    except OSError:
        return None


def machine_card() -> dict[str, Any]:
    """What a figure needs beside it: CPU, cores, system, Python and torch versions. No host name, no paths."""
    import torch

    import pellucid

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "numba": _version("numba") if os.environ.get("PELLUCID_JIT") != "0" else None,  # compiles the CPU kernels
        "pellucid": pellucid.__version__,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
