"""CUDA C++ at run time: compiled by NVRTC and launched through the driver, both of which PyTorch's CUDA builds bring or need anyway."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@cache
def nvrtc() -> ctypes.CDLL | None:
    """The compiler's library, if there is one."""
    major = (torch.version.cuda or "13").split(".")[0]
    name = f"libnvrtc.so.{major}"
    places = [Path(torch.__file__).parent / "lib"]
    found = importlib.util.find_spec("nvidia")
    for root in found.submodule_search_locations or () if found else ():
        places += Path(root).glob("*/lib")
    for place in (name, *(str(p / name) for p in places)):
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    return None


def compiled(source: str, options: Sequence[str]) -> bytes:
    """A cubin; RuntimeError with the compiler's words where it finds a fault."""
    library = nvrtc()
    assert library is not None
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    given = [o.encode() for o in options]
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    try:
        status = library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        if status:
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC: {log.value.decode()}")
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


class Kernel:
    """One kernel of a cubin, loaded for the current device."""

    def __init__(self, cubin: bytes, name: str, shared: int):
        self.driver, self.shared = ctypes.CDLL("libcuda.so.1"), shared
        self.module, self.function, self.cubin = ctypes.c_void_p(), ctypes.c_void_p(), cubin
        self._check(self.driver.cuModuleLoadData(ctypes.byref(self.module), cubin))
        self._check(self.driver.cuModuleGetFunction(ctypes.byref(self.function), self.module, name.encode()))
        self._check(self.driver.cuFuncSetAttribute(self.function, SHARED, shared))

    def __call__(self, programs: int, threads: int, given: Sequence[Tensor | int | float]) -> None:
        """Launched with all programs there at once (a cooperative launch), on PyTorch's current stream. Tensors are given as where they
        lie, whole numbers as int, others as float."""
        values: list[Any] = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int(x) if isinstance(x, int) else ctypes.c_float(x)
                             for x in given]
        places = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(self.driver.cuLaunchCooperativeKernel(self.function, programs, 1, 1, threads, 1, 1, self.shared, stream, places))

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"CUDA: {(text.value or b'unknown error').decode()} ({status})")
