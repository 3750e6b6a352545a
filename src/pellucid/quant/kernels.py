"""The integer products under INT8 layers: ONE seam, and a probe that chooses behind it.

A kernel multiplies whole numbers held in float32 by int8 weights, exactly, and scales the columns:

    product(a (M, K) in -limit..limit, W) -> (a @ codes^T) * scale  (M, N) float32;  codes (N, K) int8, scale (N,)

`native` is C++ of our own (ops/native), where it could be compiled; it also rounds the activations. `fbgemm` is the fastest in
PyTorch on x86 (its operator is meant for fixed activation scales; ours are folded into `a`
beforehand, so its own scale is 1). Its AVX2 form adds pairs of 8-bit products in 16 bits, which saturate silently:
the probe multiplies extreme values and takes 7-bit activations there. `int_mm` runs wherever PyTorch does.
The packed weights of fbgemm are made through quantized tensors, which a future PyTorch will drop (its issue 184982):
the probe finds that too.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pellucid.errors import BadInput
from pellucid.ops.native.library import choose_native, pack_int8, unpack_int8
from pellucid.runtime import Choice


def vectors() -> None:
    """RuntimeError where there are no C++ kernels, or none that know this processor's products of bytes: PyTorch's are faster then."""
    choice = choose_native()
    if choice.value is None or choice.value.variant == "base":
        raise RuntimeError(choice.reason)


@dataclass(frozen=True)
class Native:
    """The C++ kernels: u8 x s8 products with AVX-512, s8 x s8 without."""

    limit: int = 127
    name: str = "native"

    def pack(self, codes: Tensor, scale: Tensor) -> Any:
        vectors()
        return pack_int8(codes, scale)

    def unpack(self, packed: Any) -> tuple[Tensor, Tensor]:
        return unpack_int8(packed)

    def product(self, a: Tensor, packed: Any) -> Tensor:
        return choose_native().value.product(packed.matrix, a, whole=True)  # type: ignore[no-any-return]

    def by_token(self, x: Tensor, packed: Any) -> Tensor:
        """x (M, K) float32 of any scale: each row rounded by a factor of its own, inside the kernel."""
        return choose_native().value.product(packed.matrix, x)  # type: ignore[no-any-return]

    def dynamic(self, x: Tensor, packed: Any) -> Tensor:
        """One factor for the whole tensor."""
        factor = self.limit / x.abs().amax().clamp_min(1e-30)
        return self.product((x * factor).round_(), packed).div_(factor)


@dataclass(frozen=True)
class Fbgemm:
    """u8 x s8 products of the fbgemm library; the activations' zero lies at `limit + 1`."""

    limit: int = 127
    name: str = "fbgemm"

    def pack(self, codes: Tensor, scale: Tensor) -> Any:
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*quantized tensor creation.*", category=UserWarning)
            whole = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(whole, None)

    def unpack(self, packed: Any) -> tuple[Tensor, Tensor]:
        whole, _ = torch.ops.quantized.linear_unpack(packed)
        return whole.int_repr(), whole.q_per_channel_scales().float()

    def product(self, a: Tensor, packed: Any) -> Tensor:
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default(a, 1.0, self.limit + 1, packed)

    def dynamic(self, x: Tensor, packed: Any) -> Tensor:
        """x (M, K) of any scale: quantized inside the operator, one scale and zero point for the whole tensor."""
        return torch.ops.quantized.linear_dynamic.default(x, packed, self.limit < 127)


@dataclass(frozen=True)
class IntMM:
    """`torch._int_mm`: s8 x s8 -> int32."""

    limit: int = 127
    name: str = "int_mm"

    def pack(self, codes: Tensor, scale: Tensor) -> Any:
        if codes.shape[1] == 1:  # PyTorch 2.13 reads such a transposed column wrongly
            raise BadInput("int_mm cannot multiply matrices of one column", next="leave this layer in float32")
        return codes.contiguous(), scale.clone()

    def unpack(self, packed: Any) -> tuple[Tensor, Tensor]:
        return packed

    def product(self, a: Tensor, packed: Any) -> Tensor:
        codes, scale = packed
        return torch._int_mm(a.to(torch.int8), codes.mT).float().mul_(scale)

    def dynamic(self, x: Tensor, packed: Any) -> Tensor:
        raise BadInput("one activation scale a tensor needs the fbgemm kernel", "this machine uses int_mm",
                       'use activations="token"')


Kernel = Native | Fbgemm | IntMM
CANDIDATES: tuple[Kernel, ...] = (Native(), Fbgemm(), Fbgemm(63), IntMM())  # fastest first


@cache
def choose_kernel(name: str = "auto") -> Choice:
    """The first kernel that computes exactly on this machine (of those called `name`), and why not an earlier one."""
    known = ["auto", *dict.fromkeys(k.name for k in CANDIDATES)]
    if name not in known:
        raise BadInput(f"unknown INT8 kernel {name!r}", next=f"one of {', '.join(known)}")
    passed_over: list[str] = []
    for kernel in CANDIDATES:
        if name not in ("auto", kernel.name):
            continue
        bits = 8 if kernel.limit == 127 else 7
        fault = fault_of(kernel)
        if fault is None:
            return Choice(kernel, "; ".join([*passed_over, f"{kernel.name} with {bits}-bit activations computes exactly"]))
        passed_over.append(f"{kernel.name} with {bits}-bit activations: {fault}")
    raise BadInput(f"the INT8 kernel {name!r} does not work here", "; ".join(passed_over), "use the kernel auto")


def fault_of(kernel: Kernel) -> str | None:
    """What is wrong with `kernel` on this machine; None where all probes come out exactly."""
    K, N = 70, 19  # neither a multiple of a vector's width
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=generator)
    codes[:2] = torch.tensor([127, -127], dtype=torch.int8)[:, None]  # rows of extremes: partial sums as large as can be
    scale = torch.full((N,), 0.5)
    a = torch.randint(-kernel.limit, kernel.limit + 1, (5, K), generator=generator).float()
    a[:2] = torch.tensor([kernel.limit, -kernel.limit])[:, None]
    try:
        packed = kernel.pack(codes, scale)
        found, (codes_back, scale_back) = kernel.product(a, packed), kernel.unpack(packed)
    except (AttributeError, RuntimeError) as error:  # an operator that this build lacks, or has for other machines
        return f"not here ({str(error).splitlines()[0][:80]})"
    if not torch.equal(found, (a.int() @ codes.int().mT).float() * 0.5):
        return "its sums overflow on this processor"
    return None if torch.equal(codes_back, codes) and torch.equal(scale_back, scale) else "it does not keep the weights"
