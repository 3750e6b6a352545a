"""The C++ kernels as Python calls them: which variant runs here and why, and the structures that they read.

    choose_native().value.product(matrix, x)     y = x W^T + b
    choose_native().value.step(...)              see engine/native_step.py

`PELLUCID_NATIVE=0` turns them off; `PELLUCID_NATIVE=avx512` (avx2, base) takes that variant. Structures have the same fields, in the
same order, as in products.h and step.h; whoever fills one keeps the tensors that it points into alive.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.errors import PellucidError
from pellucid.ops.native import build
from pellucid.runtime import Choice

F32, BF16, INT8, INT4 = range(4)
BLOCK = 64  # rows of packed weights that lie side by side
FAULTS = {1: "there is no memory for the step", 2: "a token lies outside of the vocabulary", 3: "a position lies outside of the context",
          4: "a slot lies outside of the cache"}


class Matrix(ctypes.Structure):
    """kept: the tensors that it points into."""

    kept: tuple[Tensor | None, ...] = ()
    _fields_ = [("weight", c_void_p), ("scale", c_void_p), ("sums", c_void_p), ("bias", c_void_p),
                ("n", c_int64), ("k", c_int64), ("kind", c_int64), ("bias_half", c_int64)]


class Layer(ctypes.Structure):
    _fields_ = [*((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
                *((name, c_void_p) for name in ("norm1", "norm2", "q_norm", "k_norm", "cos", "sin", "keys", "values")),
                *((name, c_int64) for name in ("heads", "kv_heads", "head_dim", "turned", "window", "hidden", "slot_stride", "head_stride", "group")),
                ("eps", c_double), ("qk_eps", c_double)]


class Step(ctypes.Structure):
    _fields_ = [("layers", POINTER(Layer)), ("embedding", c_void_p), ("norm", c_void_p),
                *((name, c_int64) for name in ("count", "dim", "vocab", "half", "half_cache")), ("eps", c_double),
                *((name, c_void_p) for name in ("tokens", "positions", "request")),
                ("into", POINTER(c_void_p)), ("slots", POINTER(c_void_p)),
                *((name, c_int64) for name in ("M", "groups", "requests", "longest", "places", "table")),
                ("hidden", c_void_p)]


class Library:
    """variant: avx512, avx2 or base."""

    def __init__(self, path: Path, variant: str | None = None):
        self.c = ctypes.CDLL(str(path))
        self.c.pellucid_variant.restype = c_char_p
        self.c.pellucid_product.argtypes = [c_void_p, c_void_p, c_int64, c_int, c_int, c_void_p]
        self.c.pellucid_step.argtypes = [c_void_p, c_int]
        self.variant = self.use(variant)

    def use(self, variant: str | None) -> str:
        """The first variant that this processor runs, or the one that is asked for. Errors: LookupError."""
        i = 0
        while name := self.c.pellucid_variant(i):
            if variant in (None, name.decode()) and self.c.pellucid_use(i) == 0:
                return name.decode()
            i += 1
        raise LookupError(f"this processor has no variant {variant!r}")

    def product(self, matrix: Matrix, x: Tensor, whole: bool = False) -> Tensor:
        """x (M, K) float32 -> (M, N) float32.  whole: x holds whole numbers in -127..127, which are taken as they are."""
        if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != matrix.k or x.device.type != "cpu":
            raise TypeError(f"the product takes float32 (M, {matrix.k}) on the CPU, not {x.dtype} {tuple(x.shape)} on {x.device}")
        x = x.contiguous()
        y = torch.empty(len(x), matrix.n, dtype=torch.float32, device="cpu")  # whatever the defaults are
        if len(x):
            check(self.c.pellucid_product(ctypes.byref(matrix), x.data_ptr(), len(x), torch.get_num_threads(), int(whole), y.data_ptr()))
        return y

    def step(self, step: Step) -> None:
        """Reads and writes what `step` points to. PellucidError, and nothing written, where an index lies outside."""
        check(self.c.pellucid_step(ctypes.byref(step), torch.get_num_threads()))


def check(fault: int) -> None:
    if fault:
        raise PellucidError("the C++ kernels refused a step", FAULTS.get(fault, f"fault {fault}"))


@cache
def choose_native() -> Choice:
    """The `Library`, or None, and why."""
    asked = os.environ.get("PELLUCID_NATIVE", "")
    if asked == "0":
        return Choice(None, "C++ kernels turned off by PELLUCID_NATIVE=0")
    if sys.byteorder != "little" or os.name != "posix":
        return Choice(None, "C++ kernels need a little-endian POSIX system")
    try:
        library = Library(build.find_or_build(), asked or None)
    except (OSError, LookupError) as error:
        return Choice(None, f"no C++ kernels: {error}")
    return Choice(library, f"C++ kernels, compiled for {library.variant}")


# --- weights in the form that the kernels read -----------------------------------------------------------------------------------


def plain(weight: Tensor, bias: Tensor | None) -> Matrix:
    """weight (N, K) float32 or bfloat16, contiguous: read where it lies, so that changes of it are seen."""
    kind = {torch.float32: F32, torch.bfloat16: BF16}[weight.dtype]
    matrix = Matrix(weight.data_ptr(), None, None, None if bias is None else bias.data_ptr(), *weight.shape, kind,
                    int(bias is not None and bias.dtype == torch.bfloat16))
    matrix.kept = (weight, bias)
    return matrix


class Packed:
    """Weights in the kernels' own order, and the structure that points to them."""

    def __init__(self, weight: Tensor, scale: Tensor | None, sums: Tensor | None, shape: tuple[int, int], kind: int):
        self.weight, self.scale, self.sums, self.shape = weight, scale, sums, shape
        self.kind = kind
        self.matrix = self.with_bias(None)

    def with_bias(self, bias: Tensor | None) -> Matrix:
        """bias (N,) float32"""
        parts = (self.weight, self.scale, self.sums, bias)
        matrix = Matrix(*(None if t is None else t.data_ptr() for t in parts), *self.shape, self.kind, 0)
        matrix.kept = parts
        return matrix


def pack_int8(codes: Tensor, scale: Tensor) -> Packed:
    """codes (N, K) int8 in -127..127, scale (N,) -> (N / 64, K / 4, 64, 4), filled up with zeros."""
    N, K = codes.shape
    whole = torch.nn.functional.pad(codes, (0, -K % 4, 0, -N % BLOCK))
    weight = whole.view(-1, BLOCK, whole.shape[1] // 4, 4).transpose(1, 2).contiguous()
    return Packed(weight, torch.nn.functional.pad(scale.float(), (0, -N % BLOCK)), whole.sum(1, dtype=torch.int32), (N, K), INT8)


def unpack_int8(packed: Packed) -> tuple[Tensor, Tensor]:
    (N, K), weight, scale = packed.shape, packed.weight, packed.scale
    assert scale is not None
    return weight.transpose(1, 2).flatten(2).flatten(0, 1)[:N, :K].contiguous(), scale[:N].clone()


def pack_int4(codes: Tensor, scale: Tensor) -> Packed:
    """codes (N, K) uint8 in 0..15, scale (N, K / 32) bfloat16 -> (N / 64, K / 32, 1152 bytes): see int4_tile in products.h."""
    N, K = codes.shape
    whole = torch.nn.functional.pad(codes, (0, 0, 0, -N % BLOCK), value=8).view(-1, BLOCK, K // 32, 2, 4, 4)
    halves: Any = whole.permute(3, 0, 2, 4, 1, 5)  # (2, blocks, groups, 4, BLOCK, 4)
    scales = torch.nn.functional.pad(scale.bfloat16(), (0, 0, 0, -N % BLOCK)).view(-1, BLOCK, K // 32).transpose(1, 2).contiguous()
    body = (halves[0] | (halves[1] << 4)).flatten(2)
    return Packed(torch.cat((scales.view(torch.uint8), body), 2), None, None, (N, K), INT4)


def unpack_int4(packed: Packed) -> tuple[Tensor, Tensor]:
    N, weight = packed.shape[0], packed.weight
    scales = weight[..., : 2 * BLOCK].contiguous().view(torch.bfloat16).transpose(1, 2).flatten(0, 1)[:N]
    body = weight[..., 2 * BLOCK :].unflatten(2, (4, BLOCK, 4))
    whole = torch.stack((body & 15, body >> 4)).permute(1, 4, 2, 0, 3, 5)  # (blocks, BLOCK, groups, 2, 4, 4)
    return whole.flatten(2).flatten(0, 1)[:N].contiguous(), scales.contiguous()
