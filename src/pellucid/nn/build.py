"""The only dispatch: which block is built from which spec. A new kind of part is a spec, a block, and a line here."""

from __future__ import annotations

from typing import Any

from torch import nn

from pellucid.nn.attention import Attention
from pellucid.nn.block import Block, PostBlock
from pellucid.nn.cross_attention import CrossAttention
from pellucid.nn.delta_net import GatedDeltaNet
from pellucid.nn.experts import Experts
from pellucid.nn.feedforward import FeedForward, PlainFeedForward
from pellucid.nn.latent_attention import LatentAttention
from pellucid.nn.long_context import DualChunkAttention, StreamingAttention
from pellucid.nn.site import Site
from pellucid.nn.specs import GDN, MLA, MLP, Attn, DualChunk, Layer, MoE, Residual, Streaming

BUILD: dict[type, Any] = {
    Attn: lambda spec, site: REACH[type(spec.reach)](spec, site),
    MLA: LatentAttention,
    GDN: GatedDeltaNet,
    MLP: lambda spec, site: (FeedForward if spec.gated else PlainFeedForward)(spec, site),
    MoE: Experts,
}
REACH: dict[type, type[Attention]] = {type(None): Attention, Streaming: StreamingAttention, DualChunk: DualChunkAttention}
RESIDUAL: dict[type, Any] = {Residual: lambda layer: PostBlock if layer.order == "post" else Block}


def build(spec: Any, site: Site) -> nn.Module:
    """The block of one mixer or feed-forward spec."""
    return BUILD[type(spec)](spec, site)  # type: ignore[no-any-return]


def build_layer(layer: Layer, site: Site) -> Block:
    """A layer: how its parts join the residual stream decides the class."""
    mixer, ffn = build(layer.mixer, site), build(layer.ffn, site)
    cross = None if layer.cross is None else CrossAttention(layer.cross, site)
    return RESIDUAL[type(layer.residual)](layer)(layer, site, mixer, ffn, cross)  # type: ignore[no-any-return]
