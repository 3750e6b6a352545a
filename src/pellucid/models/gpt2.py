"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each part, biases everywhere, no gate, a tied head."""

from __future__ import annotations

from typing import Any

from pellucid.models.config import Config, wrong
from pellucid.models.families import family
from pellucid.models.names import GPT2
from pellucid.nn.specs import MLP, Attn, DecoderSpec, Layer, Rope
from pellucid.ops import ACTIVATIONS

USUAL = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def fields(spec: DecoderSpec) -> dict[str, Any]:
    mixer, ffn = spec.layers[0].mixer, spec.layers[0].ffn
    return {
        "vocab_size": spec.vocab, "n_embd": spec.dim, "n_layer": len(spec.layers), "n_head": mixer.heads, "n_inner": ffn.hidden,
        "n_positions": spec.context, "activation_function": ffn.act, "layer_norm_epsilon": spec.eps,
        "tie_word_embeddings": spec.tied,
    }


@family("gpt2", architecture="GPT2LMHeadModel", names=GPT2, fields=fields)
def gpt2(c: Config) -> DecoderSpec:
    for name, usual in USUAL.items():
        if c.get(name, usual) is not usual:
            raise wrong(name, c.get(name), f"{usual}: other scales are not supported")
    dim, heads = c.need("n_embd", high=2**20), c.need("n_head", high=2**12)
    if dim % heads:
        raise wrong("n_embd", dim, f"a multiple of n_head, {heads}")
    attn = Attn(heads, heads, dim // heads, Rope(0), qkv_bias=True, out_bias=True)
    mlp = MLP(c.whole("n_inner", 4 * dim, high=2**24), c.one_of("activation_function", "gelu_new", ACTIVATIONS), bias=True, gated=False)
    return DecoderSpec(
        c.need("vocab_size"), dim, (Layer(attn, mlp),) * c.need("n_layer", high=1000),
        eps=c.number("layer_norm_epsilon", 1e-5, high=1.0), tied=bool(c.get("tie_word_embeddings", True)),
        context=c.whole("n_positions", 1024), norm="layer", positions="learned", family="gpt2")
