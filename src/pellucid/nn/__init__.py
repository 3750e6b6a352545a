"""Specs (what a model is) and the blocks built from them."""

from pellucid.nn.cache import KVCache
from pellucid.nn.decoder import Decoder
from pellucid.nn.init import init_weights
from pellucid.nn.linear import LayerNorm, Linear, RMSNorm
from pellucid.nn.specs import MLP, Attn, DecoderSpec, Layer, Rope, count_parameters, forward_flops

__all__ = [
    "MLP",
    "Attn",
    "Decoder",
    "DecoderSpec",
    "KVCache",
    "Layer",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "Rope",
    "count_parameters",
    "forward_flops",
    "init_weights",
]
