"""Triton itself, where it is installed: PyTorch's CUDA builds bring it, its CPU builds do not.

`PELLUCID_TRITON=interpret` runs the kernels on the CPU by Triton's interpreter, program by program in numpy: to prove them
without a GPU, never for speed. It acts when Triton is first imported. `PELLUCID_TRITON=0` turns the kernels off; `compile`
only has Triton imported where there is no GPU, for compiling ahead of time.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from pellucid.runtime import Choice

ASKED = os.environ.get("PELLUCID_TRITON", "")
if ASKED == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"

triton: Any = None
tl: Any = None
if ASKED in ("interpret", "compile") or torch.cuda.is_available():  # it takes half a second to import
    with contextlib.suppress(ImportError):  # not an `import`: what brings it is PyTorch
        triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"

wait_for_last: Any = None
let_next_begin: Any = None
if triton is not None:
    with contextlib.suppress(ImportError, AttributeError):
        _hopper: Any = importlib.import_module("triton.language.extra.cuda")
        wait_for_last, let_next_begin = _hopper.gdc_wait, _hopper.gdc_launch_dependents


def jit(kernel: Callable[..., Any]) -> Any:
    """Triton's decorator; without Triton the kernel stays text that nobody may call."""
    return kernel if triton is None else triton.jit(kernel)


@cache
def choose_triton(device: torch.device) -> Choice:
    """Whether the kernels run for tensors of this device, with the reason."""
    if ASKED == "0":
        return Choice(False, "turned off by PELLUCID_TRITON=0")
    if device.type == "cpu" and ASKED != "interpret":
        return Choice(False, "Triton's kernels are for a GPU")
    if triton is None:
        return Choice(False, "Triton is not installed (PyTorch's CUDA builds bring it)")
    if device.type == "cpu":
        return Choice(True, f"Triton {triton.__version__} interprets its kernels, as PELLUCID_TRITON=interpret asks")
    if device.type != "cuda" or INTERPRETED:
        return Choice(False, f"Triton compiles nothing for {device.type}" if device.type != "cuda" else "TRITON_INTERPRET is set")
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return Choice(False, f"{torch.cuda.get_device_name(device)} is older than what the kernels are compiled for (compute capability 8.0)")
    return Choice(True, f"Triton {triton.__version__} compiles the kernels for {torch.cuda.get_device_name(device)}")


@cache
def early(device: torch.device) -> dict[str, bool]:
    """Options of a launch: whether the kernel may begin while the one before it still runs (programmatic dependent launch, from Hopper
    on). Until `wait_for_last` it reads nothing that another kernel writes: weights are on their way by then, and the memory never rests."""
    if device.type != "cuda" or torch.version.hip is not None or wait_for_last is None or torch.cuda.get_device_capability(device) < (9, 0):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


def wider(n: int, least: int = 16) -> int:
    """The next power of two: what a tile's side must be."""
    return max(least, 1 << (n - 1).bit_length())
