"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783): pre-norm, RoPE, SwiGLU, grouped key/value heads, no biases.

DeepSeek LLM (arXiv 2401.02954) and the R1 distillations into Llama are this model under this name.
"""

from __future__ import annotations

from typing import Any

from pellucid.models.config import Config, shared_fields
from pellucid.models.families import family
from pellucid.models.names import LLAMA
from pellucid.nn.specs import MLP, Attn, DecoderSpec, Layer
from pellucid.ops import ACTIVATIONS


def fields(spec: DecoderSpec) -> dict[str, Any]:
    mixer, ffn = spec.layers[0].mixer, spec.layers[0].ffn
    return {**shared_fields(spec), "head_dim": mixer.head_dim, "attention_bias": mixer.qkv_bias, **({"mlp_bias": True} if ffn.bias else {})}


@family("llama", architecture="LlamaForCausalLM", names=LLAMA, fields=fields)
def llama(c: Config) -> DecoderSpec:
    d = c.head_dim()
    bias = bool(c.get("attention_bias", False))
    attn = Attn(c.heads, c.kv_heads, d, c.rope(d), qkv_bias=bias, out_bias=bias)
    mlp = MLP(c.need("intermediate_size"), c.one_of("hidden_act", "silu", ACTIVATIONS), bool(c.get("mlp_bias", False)))
    return DecoderSpec(
        c.need("vocab_size"), c.dim, (Layer(attn, mlp),) * c.layers, eps=c.number("rms_norm_eps", 1e-6, high=1.0),
        tied=bool(c.get("tie_word_embeddings", False)), context=c.whole("max_position_embeddings", 2048), family="llama")
