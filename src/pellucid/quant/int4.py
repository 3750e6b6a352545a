"""INT4 layers: 4-bit weights with a scale for each group of 32 in a row; activations in 8 bits by groups, or in bfloat16.

    w[n, k] ~ (code[n, k] - 8) * scale[n, k // 32]         16 + 2 bytes for 32 weights: 4.5 bits a weight
    y = x W^T + bias

The scale of a group is the one of sixteen that loses least: each puts the group's largest value at another code, and what
lies outside of 0..15 is cut (the clipping search of GPTQ and AWQ, by group). Rounding is idempotent: what was rounded
comes back unchanged, because the scale it had is among the sixteen. Head and embedding stay in INT8, as OpenVINO has
it: they feel rounding most. PyTorch's product on a CPU saves memory beside INT8, and time only for one row; the C++ kernels
(ops/native) multiply integers, with activations rounded by groups: a twentieth of what rounding the weights loses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.errors import BadInput, PellucidError
from pellucid.ops.int4 import int4_decode, int4_pack, int4_unpack
from pellucid.ops.native.library import choose_native, pack_int4, unpack_int4
from pellucid.quant.kernels import vectors
from pellucid.runtime import Choice

GROUP = 32
PEAKS = (-8.0, -7.5, -8.5, -7.0, -9.0, -6.5, -6.0, -5.0, -4.0, 7.0, 7.5, 8.0, 6.5, 6.0, 5.0, 4.0)
"""Codes (less 8) that a group's largest value may get, before cutting. All whole ones from 4 on are here: see `quantize_groups`."""
ROWS = 2**21  # numbers that are searched at a time


def quantize_groups(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> codes (N, K) uint8 in 0..15, scale (N, K / group) bfloat16: least squares over PEAKS.

    After rounding the largest value of a group lies at a whole code of 4 to 8, so its scale is tried again, and loses nothing.
    """
    if weight.shape[1] % group:
        raise BadInput(f"rows of {weight.shape[1]} weights do not divide into groups of {group}", next="leave this layer in INT8")
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise PellucidError("the weights cannot be quantized", "some of them are infinite or not a number",
                            "check the training run that wrote them")
    step = max(1, ROWS // weight.shape[1])
    parts = [_search(rows.view(len(rows), -1, group)) for rows in weight.contiguous().split(step)]
    return torch.cat([codes for codes, _ in parts]).flatten(1), torch.cat([scale for _, scale in parts])


def _search(w: Tensor) -> tuple[Tensor, Tensor]:
    """w (n, G, group) -> codes (n, G, group), scale (n, G)"""
    peak = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    unit = torch.where(peak == 0, 1.0, peak)  # squares of what is very large or small would leave float32
    best = torch.full_like(peak, float("inf"))
    codes, scale = torch.zeros_like(w), torch.zeros_like(peak)
    for code in PEAKS:
        s = (peak / code).bfloat16().float()
        q = (w / torch.where(s == 0, 1.0, s)).round_().clamp_(-8, 7)
        error = (q * s).sub_(w).div_(unit).square_().sum(-1, keepdim=True)
        better = error < best
        best, scale, codes = torch.where(better, error, best), torch.where(better, s, scale), torch.where(better, q, codes)
    return codes.add_(8).to(torch.uint8), scale.squeeze(-1).bfloat16()


def int4_linear_reference(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), codes (N, K), scale (N, K / group) -> (..., N): the definition."""
    return F.linear(x.float(), int4_decode(codes, scale), bias)


@dataclass(frozen=True)
class Plain:
    """The readable twin: the file's bytes, made into numbers at each call. Slow, exact, everywhere."""

    name: str = "decode, then multiply"

    def pack(self, codes: Tensor, scale: Tensor) -> Any:
        return int4_pack(codes), scale, None

    def unpack(self, packed: Any) -> tuple[Tensor, Tensor]:
        return int4_unpack(packed[0]), packed[1]

    def product(self, x: Tensor, packed: Any) -> Tensor:
        """x (M, K) float32 -> (M, N) float32"""
        return x @ int4_decode(*self.unpack(packed)).mT


@dataclass(frozen=True)
class Int4Pack:
    """`_weight_int4pack_mm_for_cpu`: bfloat16 activations. It keeps `block` rows of W side by side, the first half of them
    in the low halves of bytes: (N / block, K, block / 2). Reading that back is how many rows of x are served: from
    `MANY` on it is faster to make the weights once and multiply as matrices.
    """

    block: int
    name: str = "int4pack"
    MANY = 24

    def pack(self, codes: Tensor, scale: Tensor) -> Any:
        N, group = len(codes), codes.shape[1] // scale.shape[1]
        whole = F.pad(codes, (0, 0, 0, -N % self.block), value=8)
        scales = F.pad(scale, (0, 0, 0, -N % self.block)).bfloat16()
        pairs = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous()  # (G, N, 2): scale, zero
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.int(), 1), pairs, (N, group)

    def unpack(self, packed: Any) -> tuple[Tensor, Tensor]:
        _, pairs, (N, _) = packed
        codes = self._codes(packed).transpose(1, 2).flatten(0, 1)[:N]
        return codes.contiguous(), pairs[:, :N, 0].mT.contiguous()

    def _codes(self, packed: Any) -> Tensor:
        """(N / block, K, block)"""
        data, pairs, (_, group) = packed
        halves = data.view(-1, len(pairs) * group, self.block // 2)
        return torch.cat((halves & 15, halves >> 4), -1)

    def product(self, x: Tensor, packed: Any) -> Tensor:
        data, pairs, (N, group) = packed
        x = x.bfloat16()
        if len(x) >= self.MANY:
            return self._many(x, packed)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, data, group, pairs).float()
        return y if y.shape[1] == N else y[:, :N].contiguous()

    def _many(self, x: Tensor, packed: Any) -> Tensor:
        _, pairs, (N, group) = packed
        codes = self._codes(packed)
        scale = pairs[..., 0].view(len(pairs), len(codes), 1, self.block).transpose(0, 1)  # (blocks, G, 1, block)
        w = codes.view(len(codes), len(pairs), group, self.block).bfloat16().sub_(8).mul_(scale).flatten(1, 2)
        return torch.matmul(x, w).transpose(0, 1).flatten(1)[:, :N].float()


@dataclass(frozen=True)
class NativeInt4:
    """The C++ kernels (ops/native): activations rounded to 8 bits by groups of 32 columns, products of integers."""

    name: str = "native"

    def pack(self, codes: Tensor, scale: Tensor) -> Any:
        vectors()
        return pack_int4(codes, scale)

    def unpack(self, packed: Any) -> tuple[Tensor, Tensor]:
        return unpack_int4(packed)

    def product(self, x: Tensor, packed: Any) -> Tensor:
        return choose_native().value.product(packed.matrix, x)  # type: ignore[no-any-return]


Kernel = NativeInt4 | Plain | Int4Pack
CANDIDATES: tuple[Kernel, ...] = (NativeInt4(), Int4Pack(64), Int4Pack(32), Plain())  # AVX-512, AVX2, everywhere


@cache
def choose_int4(group: int = GROUP) -> Choice:
    """The first kernel that computes rightly on this machine, and why not an earlier one. group: weights that share a scale."""
    passed_over: list[str] = []
    for kernel in CANDIDATES:
        if group != GROUP and isinstance(kernel, NativeInt4):
            passed_over.append(f"{kernel.name}: its groups have {GROUP} weights")
            continue
        fault = fault_of(kernel)
        if fault is None:
            return Choice(kernel, "; ".join([*passed_over, f"{kernel.name} computes 4-bit products"]))
        passed_over.append(f"{kernel}: {fault}")
    raise PellucidError("no kernel for 4-bit weights works here", "; ".join(passed_over), "use INT8 weights")


def fault_of(kernel: Kernel) -> str | None:
    """What is wrong with `kernel` on this machine; None where it keeps the weights and few and many rows come out."""
    K, N = 2 * GROUP, 83
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=generator)
    scale = 2.0 ** torch.randint(-3, 1, (N, K // GROUP), generator=generator).bfloat16()
    x = torch.randint(-2, 3, (40, K), generator=generator).float()
    try:
        packed = kernel.pack(codes, scale)
        codes_back, scale_back = kernel.unpack(packed)
        found = torch.cat((kernel.product(x[:3], packed), kernel.product(x, packed)))
    except (AttributeError, RuntimeError) as error:  # an operator that this build lacks, or has for other machines
        return f"not here ({str(error).splitlines()[0][:80]})"
    if not torch.equal(codes_back, codes) or not torch.equal(scale_back, scale):
        return "this processor's layout is another one"
    exact = int4_linear_reference(torch.cat((x[:3], x)), codes, scale)
    return None if float((found - exact).abs().max()) <= float(exact.abs().max()) / 128 else "its products are wrong"


class Int4Linear(nn.Module):
    """Takes the place of `Linear`; float32 in, float32 out, on the CPU. `parts`: as in `Linear`."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None = None, parts: tuple[int, ...] | None = None,
                 kernel: Kernel | None = None):
        super().__init__()
        self.parts = parts or (len(codes),)
        self.outputs, self.inputs = codes.shape
        self.group = codes.shape[1] // scale.shape[1]
        self.kernel: Kernel = kernel or choose_int4(self.group).value
        self.packed: Any = self.kernel.pack(codes, scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise TypeError(f"INT4 layers take float32 activations on the CPU, not {x.dtype} on {x.device}")
        y = self.kernel.product(x.reshape(-1, self.inputs), self.packed)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.outputs)

    @property
    def stored_bytes(self) -> int:
        """In a file: half a byte a weight, two a group."""
        return self.outputs * (self.inputs // 2 + 2 * self.inputs // self.group)

    @property
    def weight(self) -> Tensor:
        """(N, K) float32: what the codes stand for."""
        return int4_decode(*self.kernel.unpack(self.packed))

    def __deepcopy__(self, memo: dict[int, Any]) -> Int4Linear:
        return Int4Linear(*self.kernel.unpack(self.packed), self.bias, self.parts, self.kernel)

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {' + '.join(map(str, self.parts))}, int4 in groups of {self.group}, {self.kernel.name}"
