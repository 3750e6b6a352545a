"""Mistral (arXiv 2310.06825): Llama's block, every layer with the same sliding window, or none of them."""

from __future__ import annotations

from typing import Any

from pellucid.models.config import Config, shared_fields
from pellucid.models.families import family
from pellucid.models.names import LLAMA
from pellucid.nn.specs import MLP, Attn, DecoderSpec, Layer
from pellucid.ops import ACTIVATIONS


def fields(spec: DecoderSpec) -> dict[str, Any]:
    mixer = spec.layers[0].mixer
    return {**shared_fields(spec), "head_dim": mixer.head_dim, "sliding_window": mixer.window}


@family("mistral", architecture="MistralForCausalLM", names=LLAMA, fields=fields)
def mistral(c: Config) -> DecoderSpec:
    d = c.head_dim()
    attn = Attn(c.heads, c.kv_heads, d, c.rope(d), window=c.window(default=4096))
    mlp = MLP(c.need("intermediate_size"), c.one_of("hidden_act", "silu", ACTIVATIONS))
    return DecoderSpec(
        c.need("vocab_size"), c.dim, (Layer(attn, mlp),) * c.layers, eps=c.number("rms_norm_eps", 1e-6, high=1.0),
        tied=bool(c.get("tie_word_embeddings", False)), context=c.whole("max_position_embeddings", 131072), family="mistral")
