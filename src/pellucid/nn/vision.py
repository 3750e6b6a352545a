"""The vision transformer (arXiv 2010.11929) as CLIP has it: patches behind one class token, a norm before the layers.

Legend: B batch, C channels, P patches, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.nn.block import run_layers
from pellucid.nn.build import build_layer
from pellucid.nn.context import open_context
from pellucid.nn.linear import embedding
from pellucid.nn.site import Site
from pellucid.nn.specs import VisionSpec


class VisionEncoder(nn.Module):
    """pixels (B, C, image, image), normalised -> last hidden state (B, 1 + P, D); the class token is the first."""

    def __init__(self, spec: VisionSpec):
        super().__init__()
        self.spec = spec
        self.compute_dtype: torch.dtype | None = None
        site = Site(spec.dim, spec.eps, spec.norm)
        self.patches = Patches(spec)
        self.first = nn.Parameter(torch.zeros(spec.dim))
        self.positions = embedding(1 + spec.patches, spec.dim)
        self.embed_norm = site.new_norm()
        self.layers = nn.ModuleList(
            build_layer(layer, Site(spec.dim, spec.eps, spec.norm, i)) for i, layer in enumerate(spec.layers))
        self.norm = site.new_norm()

    def draw_own(self, generator: torch.Generator) -> None:
        self.first.normal_(0, 0.02, generator=generator)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1:] != (must := (self.spec.channels, self.spec.image, self.spec.image)):
            raise ValueError(f"pixels of shape {tuple(pixels.shape[1:])}, this model reads {must}")
        x = self.patches(pixels)
        x = torch.cat((self.first.expand(len(x), 1, -1), x), 1) + self.positions.weight
        x = self.embed_norm(x if self.compute_dtype is None else x.to(self.compute_dtype))
        return run_layers(self.layers, x, open_context(x, x.dtype, causal=False))

    def pooled(self, hidden: Tensor) -> Tensor:
        """(B, 1 + P, D) -> (B, D): the class token, normed."""
        return self.norm(hidden[:, 0])  # type: ignore[no-any-return]


class Patches(nn.Module):
    """(B, C, image, image) -> (B, P, D): each patch of p x p pixels through one matrix, row by row of the picture."""

    def __init__(self, spec: VisionSpec):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.dim, spec.channels, spec.patch, spec.patch))

    def draw_own(self, generator: torch.Generator) -> None:
        self.weight.normal_(0, self.weight[0].numel() ** -0.5, generator=generator)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = F.conv2d(pixels.to(self.weight.dtype), self.weight, stride=self.weight.shape[-1])
        return patches.flatten(2).mT
