"""One layer of a stack: how mixer, cross-attention and feed-forward join the residual stream.

x (B, T, D). `enter` and `leave` are called once before and after a stack: a residual of several streams opens and
closes them there; with one stream there is nothing to do.
"""

from __future__ import annotations

from torch import Tensor, nn

from pellucid.nn.context import Context
from pellucid.nn.site import Site
from pellucid.nn.specs import Layer


class Block(nn.Module):
    """x + mixer(norm x), then x + ffn(norm x); in the sandwich order also a norm on what is added."""

    def __init__(self, layer: Layer, site: Site, mixer: nn.Module, ffn: nn.Module, cross: nn.Module | None = None):
        super().__init__()
        sandwich = layer.order == "sandwich"
        self.norm1 = site.new_norm()
        self.mixer = mixer
        self.post1 = site.new_norm() if sandwich else None
        if cross is not None:
            self.norm_cross, self.cross = site.new_norm(), cross
        self.norm2 = site.new_norm()
        self.ffn = ffn
        self.post2 = site.new_norm() if sandwich else None

    @staticmethod
    def enter(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def leave(x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        mixed = ctx.through(self.mixer, self.norm1(x))
        x = x + (mixed if self.post1 is None else self.post1(mixed))
        if hasattr(self, "cross"):
            x = x + self.cross(self.norm_cross(x), ctx)
        fed = self.ffn(self.norm2(x), ctx)
        return x + (fed if self.post2 is None else self.post2(fed))


def run_layers(layers: nn.ModuleList, x: Tensor, ctx: Context) -> Tensor:
    """x (B, T, D) through all layers of a stack."""
    first: Block = layers[0]  # type: ignore[assignment]
    x = first.enter(x)
    for layer in layers:
        x = layer(x, ctx)
    return first.leave(x)


class PostBlock(Block):
    """norm(x + mixer x), then norm(x + ffn x): the original Transformer's order, and BERT's."""

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = self.norm1(x + ctx.through(self.mixer, x))
        if hasattr(self, "cross"):
            x = self.norm_cross(x + self.cross(x, ctx))
        return self.norm2(x + self.ffn(x, ctx))  # type: ignore[no-any-return]
