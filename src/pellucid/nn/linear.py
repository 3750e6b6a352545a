"""Linear layers, each one matrix that may be several of the Hub's (q, k, v; gate, up) stacked by rows, and norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.ops import rms_norm


class Linear(nn.Module):
    """y = x W^T (+ b), W (out, in).

    parts: the row counts of the matrices stacked in W. Loading and saving cut along them, and so does Muon, which
    must orthogonalise each matrix and not the stack. groups: heads that the rows of each part belong to, for files that
    keep the rows of a head together across parts (see models/names.py). The weight is cast to the activations' dtype at use: float32
    master weights under bfloat16 activations need no autocast.
    """

    def __init__(self, inputs: int, outputs: int | tuple[int, ...], bias: bool = False, groups: int = 1):
        super().__init__()
        self.parts = (outputs,) if isinstance(outputs, int) else tuple(outputs)
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(sum(self.parts), inputs))
        self.bias = nn.Parameter(torch.zeros(sum(self.parts))) if bias else None

    @property
    def stacked(self) -> dict[str, tuple[int, ...]]:
        """The rows of the matrices that stand in each parameter."""
        return {"weight": self.parts, "bias": self.parts}

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {' + '.join(map(str, self.parts))}{', bias' if self.bias is not None else ''}"


def embedding(rows: int, dim: int) -> nn.Embedding:
    """A table of vectors, not yet filled: `nn.Embedding` would draw it, and on the meta device import a compiler for that."""
    return nn.Embedding(rows, dim, _weight=torch.empty(rows, dim))


class RMSNorm(nn.Module):
    """Holds the weight of `ops.rms_norm`; the weight is cast to the activations' dtype at use."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    @property
    def scale(self) -> Tensor:
        """What the normalised entries are multiplied by."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class CentredRMSNorm(RMSNorm):
    """Its weights are stored less 1 and applied in float32, before the one rounding (Gemma)."""

    @property
    def scale(self) -> Tensor:
        return 1 + self.weight.float()

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(wide), self.scale.to(wide), self.eps).to(x.dtype)


class WideRMSNorm(RMSNorm):
    """Its weights are applied in float32, before the one rounding (gpt-oss); the same as RMSNorm in float32."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(wide), self.weight.to(wide), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """w (x - mean) / sqrt(variance + eps) + b (arXiv 1607.06450); statistics in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {
    "rms": RMSNorm, "rms_centred": CentredRMSNorm, "rms_wide": WideRMSNorm, "layer": LayerNorm}
"""The norms by the names that specs use."""
