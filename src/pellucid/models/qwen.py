"""Qwen3, dense (arXiv 2505.09388): Llama's block with an RMS norm on every query and key head, before the rotation."""

from __future__ import annotations

from pellucid.models.config import Config
from pellucid.models.families import family
from pellucid.models.names import LLAMA
from pellucid.nn.specs import MLP, Attn, DecoderSpec, Layer


@family("qwen3", architecture="Qwen3ForCausalLM", names=LLAMA)
def qwen3(c: Config) -> DecoderSpec:
    d = c.head_dim(default=128)
    bias = bool(c.get("attention_bias", False))
    n = c.need("num_hidden_layers")
    window = c.get("sliding_window") if c.get("use_sliding_window", False) else None
    first = c.get("max_window_layers", n)  # the window applies from this layer on
    kinds = c.get("layer_types") or ["sliding_attention" if window and i >= first else "full_attention" for i in range(n)]
    mlp = MLP(c.need("intermediate_size"), c.get("hidden_act", "silu"))

    def attn(kind: str) -> Attn:
        return Attn(c.heads, c.kv_heads, d, c.rope(d), qkv_bias=bias, out_bias=bias, qk_norm=True,
                    window=window if kind == "sliding_attention" else None)

    return DecoderSpec(
        c.need("vocab_size"), c.need("hidden_size"), tuple(Layer(attn(k), mlp) for k in kinds),
        eps=c.get("rms_norm_eps", 1e-6), tied=bool(c.get("tie_word_embeddings", False)),
        context=c.get("max_position_embeddings", 32768), family="qwen3")
