"""The dense Qwens. Qwen1.5, 2 and 2.5 (arXiv 2407.10671, 2412.15115): Llama's block with biases on q, k and v. Qwen3 (arXiv
2505.09388): no biases, but an RMS norm on every query and key head, before the rotation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pellucid.models.config import (
    FULL,
    SLIDING,
    Config,
    head_dim_field,
    layer_types,
    shared_fields,
    window_fields,
    wrong,
)
from pellucid.models.families import family
from pellucid.models.names import LLAMA
from pellucid.nn.specs import MLP, Attn, DecoderSpec, Layer
from pellucid.ops import ACTIVATIONS


def qwen2_fields(spec: DecoderSpec) -> dict[str, Any]:
    return {**shared_fields(spec), **head_dim_field(spec), **window_fields(spec)}


def qwen3_fields(spec: DecoderSpec) -> dict[str, Any]:
    mixer = spec.layers[0].mixer
    return {**shared_fields(spec), "head_dim": mixer.head_dim, "attention_bias": mixer.qkv_bias, **window_fields(spec)}


@family("qwen2", architecture="Qwen2ForCausalLM", names=LLAMA, fields=qwen2_fields)
def qwen2(c: Config) -> DecoderSpec:
    d = c.head_dim()
    return qwen(c, "qwen2", Attn(c.heads, c.kv_heads, d, c.rope(d), qkv_bias=True))


@family("qwen3", architecture="Qwen3ForCausalLM", names=LLAMA, fields=qwen3_fields)
def qwen3(c: Config) -> DecoderSpec:
    d, bias = c.head_dim(default=128), bool(c.get("attention_bias", False))
    return qwen(c, "qwen3", Attn(c.heads, c.kv_heads, d, c.rope(d), qkv_bias=bias, out_bias=bias, qk_norm=True))


def qwen(c: Config, name: str, attn: Attn) -> DecoderSpec:
    """What the two have in common. attn: that of a layer without a window."""
    kinds = layer_kinds(c)
    window = c.window(default=4096)
    if window is None and SLIDING in kinds:
        raise wrong("sliding_window", None, f"a whole number, as layer_types names {SLIDING}")
    mlp = MLP(c.need("intermediate_size"), c.one_of("hidden_act", "silu", ACTIVATIONS))
    of_kind = {FULL: Layer(attn, mlp), SLIDING: Layer(replace(attn, window=window), mlp)}
    return DecoderSpec(
        c.need("vocab_size"), c.dim, tuple(of_kind[kind] for kind in kinds),
        eps=c.number("rms_norm_eps", 1e-6, high=1.0), tied=bool(c.get("tie_word_embeddings", False)),
        context=c.whole("max_position_embeddings", 32768), family=name)


def layer_kinds(c: Config) -> list[str]:
    """`layer_types`, or what older files say: a window from layer `max_window_layers` on, if it is used at all."""
    used = c.get("use_sliding_window", False) and c.window(default=4096) is not None
    first = c.whole("max_window_layers", 28, low=0) if used else c.layers
    return layer_types(c) or [FULL if i < first else SLIDING for i in range(c.layers)]
