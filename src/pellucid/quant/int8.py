"""Quantized models, and INT8 layers: 8-bit weights with a scale for each row, activations rounded to 8 bits as they come.

    W (N, K) ~ codes (N, K) int8 * scale (N, 1)         x (M, K) ~ a (M, K) int8 / factor
    y = (a @ codes^T) * scale / factor + bias           (integers inside: exact, whatever the order of the sum)

The scheme is that of LLM.int8() without its outlier columns (arXiv 2208.07339, section 2.1: vector-wise). Activations:
"token" gives every row a factor of its own, so that a result never depends on what else is in the batch; "tensor" is
PyTorch's `linear_dynamic`: one scale for the whole batch, where one large row coarsens all others. Measured, the
former costs 10 to 20 % of a large product and is more accurate from two rows on: it is the default.
"""

from __future__ import annotations

import copy
import re
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pellucid.errors import BadInput, PellucidError
from pellucid.nn import Decoder, Linear
from pellucid.nn.experts import ExpertLinear
from pellucid.quant.int4 import GROUP, Int4Linear, quantize_groups
from pellucid.quant.kernels import Kernel, Native, choose_kernel

Activations = Literal["token", "tensor"]
SMALLEST = 1e-30  # rows whose largest value is below it count as zero


def quantize_rows(weight: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> codes (N, K) int8 in -127..127, scale (N, 1) float32: symmetric, to nearest.  largest (N, 1): of the rows' absolute
    values, where `weight` holds only some columns of them.

    Scales keep 16 significant bits: then codes * scale is exact in float32, and quantizing that product
    gives the same codes and scales again. So a model loaded from INT8 files as float32 loses nothing.
    """
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise PellucidError("the weights cannot be quantized", "some of them are infinite or not a number",
                            "check the training run that wrote them")
    largest = largest_of(weight) if largest is None else largest
    scale = torch.where(largest < SMALLEST, torch.ones(()), largest / 127)
    scale = (scale.view(torch.int32) & ~0xFF).view(torch.float32)  # of a float32's 24 bits
    return (weight / scale).round().to(torch.int8), scale


def largest_of(rows: Tensor) -> Tensor:
    """(N, K) -> (N, 1): the largest absolute value of each row."""
    return rows.abs().amax(-1, keepdim=True)  # six times as fast as the infinity norm


def int8_linear_reference(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, limit: int = 127) -> Tensor:
    """x (..., K), codes (N, K) int8, scale (N, 1) -> (..., N): the definition, with a factor for each row of x."""
    factor = torch.tensor(float(limit)) / x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    a = (x * factor).round().int()
    y = (a @ codes.int().mT).float() * scale.mT / factor
    return y if bias is None else y + bias


class Int8Linear(nn.Module):
    """Takes the place of `Linear`; float32 in, float32 out, on the CPU. `parts`: as in `Linear`.

    Holds the weights once, in the kernel's own packing; `codes`, `scale` and `weight` (rounded, float32) are made from
    it when asked for.
    """

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None = None, parts: tuple[int, ...] | None = None,
                 activations: Activations = "token", kernel: Kernel | None = None):
        super().__init__()
        self.kernel: Kernel = kernel or choose_kernel().value
        self.parts, self.activations = parts or (len(codes),), activations
        self.packed: Any = self.kernel.pack(codes, scale.flatten())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)
        self.limit = torch.tensor(float(self.kernel.limit))  # a Python number would be wrapped anew at every call
        self.inputs, self.outputs = codes.shape[1], codes.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise TypeError(f"INT8 layers take float32 activations on the CPU, not {x.dtype} on {x.device}")
        rows = x.reshape(-1, self.inputs)
        y = self._by_token(rows) if self.activations == "token" else self.kernel.dynamic(rows, self.packed)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.outputs)

    def _by_token(self, rows: Tensor) -> Tensor:
        if isinstance(self.kernel, Native):
            return self.kernel.by_token(rows, self.packed)
        return self._scaled(rows, largest_of(rows))

    def _scaled(self, rows: Tensor, largest: Tensor) -> Tensor:
        """rows (M, K), rounded so that `largest` (M, 1) becomes the largest integer: before the kernel rounds, because adding its zero
        point in float32 would move values that are near a half."""
        factor = torch.div(self.limit, largest.clamp_min_(SMALLEST))
        return self.kernel.product((rows * factor).round_(), self.packed).div_(factor)

    @property
    def codes(self) -> Tensor:
        return self.kernel.unpack(self.packed)[0]

    @property
    def scale(self) -> Tensor:
        """(N, 1)"""
        return self.kernel.unpack(self.packed)[1][:, None]

    @property
    def weight(self) -> Tensor:
        """(N, K) float32: what the codes stand for."""
        codes, scale = self.kernel.unpack(self.packed)
        return codes.float() * scale[:, None]

    @property
    def stored_bytes(self) -> int:
        """In a file: a byte a weight, four a row."""
        return self.outputs * (self.inputs + 4)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Linear:
        return Int8Linear(self.codes, self.scale, self.bias, self.parts, self.activations, self.kernel)

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {' + '.join(map(str, self.parts))}, int8, {self.kernel.name}, scale a {self.activations}"


@torch.no_grad()
def quantize(model: Decoder, activations: Activations = "token", kernel: str = "auto", bits: int = 8, consume: bool = False) -> Decoder:
    """A copy of `model` (eval mode, float32 around the products); the model itself is left as it is, or with `consume` gives up
    each matrix as it is rounded, and is of no use afterwards.

    All matrices become `Int8Linear`, the head and each expert's too. The embedding is rounded in the same way and kept as float32 rows to
    gather from; a tied head has its codes, so the file holds them once. Norms and biases stay. `kernel`: "auto", or the
    name of one of `quant.kernels`. bits=4: matrices whose rows divide into groups become `Int4Linear`; embedding and
    head, and the matrices that do not, stay in INT8.
    """
    if activations not in get_args(Activations):
        raise BadInput(f"unknown activations {activations!r}", next=f"one of {', '.join(get_args(Activations))}")
    check_bits(bits)
    if is_quantized(model):
        raise BadInput("the model is quantized already", next="quantize the checkpoint it was made from")
    chosen: Kernel = choose_kernel(kernel).value

    def small_layer(weight: Tensor, bias: Tensor | None, parts: tuple[int, ...], head: bool = False) -> nn.Module:
        return rounded_layer(weight, bias, parts, 8 if head else bits, activations, chosen)

    def small_module(m: Linear | ExpertLinear) -> nn.Module:
        weight = m.weight
        if consume:
            m.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        if isinstance(m, Linear):
            return small_layer(weight, m.bias, m.parts, m is model.head)
        return nn.ModuleList(small_layer(w, None if m.bias is None else m.bias[e], m.parts) for e, w in enumerate(weight))

    codes, scale = quantize_rows(model.embed.weight)
    # deepcopy takes what its memo holds instead of copying: no float copy of a matrix is ever made
    memo: dict[int, Any] = {id(m): small_module(m) for m in model.modules() if isinstance(m, (Linear, ExpertLinear))}
    memo[id(model.embed)] = nn.Embedding.from_pretrained(codes.float() * scale)
    small = copy.deepcopy(model, memo)
    if small.head is None:
        small.head = Int8Linear(codes.cpu(), scale.cpu(), None, None, activations, chosen)  # type: ignore[assignment]
    small.compute_dtype = None
    return small.float().cpu().requires_grad_(False).eval()


def rounded_layer(weight: Tensor, bias: Tensor | None, parts: tuple[int, ...], bits: int, activations: Activations = "token",
                  kernel: Kernel | None = None) -> Int8Linear | Int4Linear:
    """The layer of a matrix (N, K): of 4 bits where they are asked for and its rows divide into groups, else of 8."""
    if bits == 4 and weight.shape[1] % GROUP == 0:
        return Int4Linear(*quantize_groups(weight.cpu()), bias, parts)
    codes, scale = quantize_rows(weight)
    return Int8Linear(codes.cpu(), scale.cpu(), bias, parts, activations, kernel)


def check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise BadInput(f"weights of {bits} bits are not known", next="use 8 or 4")


def bits_named(name: str | None) -> int | None:
    """int8 -> 8, int4 -> 4, None -> None."""
    if name not in (None, "int8", "int4"):
        raise BadInput(f"weights cannot be quantized to {name!r}", next="use int8 or int4")
    return None if name is None else int(name.removeprefix("int"))


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(m, (Int8Linear, Int4Linear)) for m in model.modules())


def left_float(small: nn.Module) -> dict[str, int]:
    """Matrices that no product of a quantized model has in codes (routers, convolutions, ...): their names, `*` for the number of a
    layer, with how many numbers they hold. The embedding, rounded and gathered from, is not one of them."""
    found: dict[str, int] = {}
    for name, p in small.named_parameters():
        if p.dim() > 1 and name != "embed.weight":
            name = re.sub(r"\d+", "*", name)
            found[name] = found.get(name, 0) + p.numel()
    return found


def held_bytes(small: Decoder) -> int:
    """Bytes of a quantized model's numbers in memory; its embedding is float32 there."""
    return sum(p.nbytes for p in small.parameters()) + sum(m.stored_bytes for m in small.modules() if isinstance(m, (Int8Linear, Int4Linear)))


def stored_bytes(model: Decoder) -> int:
    """Bytes of the model's tensors in its file; the embedding beside INT8 and INT4 layers is INT8 too."""
    if not is_quantized(model):
        return sum(p.numel() * p.element_size() for p in model.parameters())
    layers = [m for m in model.modules() if isinstance(m, (Int8Linear, Int4Linear)) and not (model.spec.tied and m is model.head)]
    rows, columns = model.embed.weight.shape
    rest = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name != "embed.weight")
    return rest + rows * (columns + 4) + sum(m.stored_bytes for m in layers)
