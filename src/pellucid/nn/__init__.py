"""Specs (what a model is) and the blocks built from them."""

from pellucid.nn.cache import KVCache
from pellucid.nn.context import Routing
from pellucid.nn.count import count_parameters, forward_flops
from pellucid.nn.decoder import Decoder
from pellucid.nn.dual_encoder import DualEncoder
from pellucid.nn.encoder import Encoder
from pellucid.nn.encoder_decoder import EncoderDecoder
from pellucid.nn.init import init_weights
from pellucid.nn.linear import LayerNorm, Linear, RMSNorm
from pellucid.nn.mtp import prediction_loss, prediction_spec
from pellucid.nn.specs import (
    GDN,
    MLA,
    MLP,
    Attn,
    DecoderSpec,
    DualEncoderSpec,
    EncoderDecoderSpec,
    EncoderSpec,
    Indexer,
    Layer,
    MoE,
    Rope,
    VisionSpec,
)
from pellucid.nn.vision import VisionEncoder

__all__ = [
    "GDN",
    "MLA",
    "MLP",
    "Attn",
    "Decoder",
    "DecoderSpec",
    "DualEncoder",
    "DualEncoderSpec",
    "Encoder",
    "EncoderDecoder",
    "EncoderDecoderSpec",
    "EncoderSpec",
    "Indexer",
    "KVCache",
    "Layer",
    "LayerNorm",
    "Linear",
    "MoE",
    "RMSNorm",
    "Rope",
    "Routing",
    "VisionEncoder",
    "VisionSpec",
    "count_parameters",
    "forward_flops",
    "init_weights",
    "prediction_loss",
    "prediction_spec",
]
