"""Qwen3, dense (arXiv 2505.09388): Llama's block with an RMS norm on every query and key head, before the rotation."""

from __future__ import annotations

from pellucid.models.config import Config, wrong
from pellucid.models.families import family
from pellucid.models.names import LLAMA
from pellucid.nn.specs import MLP, Attn, DecoderSpec, Layer
from pellucid.ops import ACTIVATIONS

FULL, SLIDING = "full_attention", "sliding_attention"


@family("qwen3", architecture="Qwen3ForCausalLM", names=LLAMA)
def qwen3(c: Config) -> DecoderSpec:
    d = c.head_dim(default=128)
    bias = bool(c.get("attention_bias", False))
    kinds = layer_kinds(c)
    window = c.need("sliding_window", high=2**31) if SLIDING in kinds else None
    mlp = MLP(c.need("intermediate_size"), c.one_of("hidden_act", "silu", ACTIVATIONS))

    def attn(kind: str) -> Attn:
        return Attn(c.heads, c.kv_heads, d, c.rope(d), qkv_bias=bias, out_bias=bias, qk_norm=True,
                    window=window if kind == SLIDING else None)

    return DecoderSpec(
        c.need("vocab_size"), c.dim, tuple(Layer(attn(kind), mlp) for kind in kinds),
        eps=c.number("rms_norm_eps", 1e-6, high=1.0), tied=bool(c.get("tie_word_embeddings", False)),
        context=c.whole("max_position_embeddings", 32768), family="qwen3")


def layer_kinds(c: Config) -> list[str]:
    """`layer_types`, or what older files say: a window from layer `max_window_layers` on, if it is used at all."""
    n, kinds = c.layers, c.get("layer_types")
    if kinds is None:
        first = c.whole("max_window_layers", n, low=0) if c.get("use_sliding_window", False) else n
        return [FULL if i < first else SLIDING for i in range(n)]
    if not isinstance(kinds, list) or len(kinds) != n or not all(kind in (FULL, SLIDING) for kind in kinds):
        raise wrong("layer_types", kinds, f"a list of {n}, each {FULL} or {SLIDING}")
    return kinds
