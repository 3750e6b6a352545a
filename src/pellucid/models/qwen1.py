"""Qwen, the first (arXiv 2309.16609): Llama's block with biases on q, k and v. Beyond the context of training it stretches the
rotation in steps (an NTK of its own) and sharpens attention by the logarithm of a query's position; neither while training.

The stretch of a prompt is kept while the model goes on writing, as in its authors' code. That code counts padding when it sharpens;
here a row of a padded batch is as if alone.
"""

from __future__ import annotations

from typing import Any

from pellucid.errors import BadInput
from pellucid.models.config import Config, rotary_share, wrong
from pellucid.models.families import family
from pellucid.models.names import QWEN1
from pellucid.nn.specs import MLP, Attn, DecoderSpec, Layer, Rope

CODE = {"AutoConfig": "Qwen/Qwen-7B--configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "Qwen/Qwen-7B--modeling_qwen.QWenLMHeadModel"}
"""Where transformers, which has no such model itself, finds its authors' code (and asks before it runs it)."""


def fields(spec: DecoderSpec) -> dict[str, Any]:
    mixer, ffn = spec.layers[0].mixer, spec.layers[0].ffn
    return {
        "auto_map": CODE, "vocab_size": spec.vocab, "hidden_size": spec.dim, "intermediate_size": 2 * ffn.hidden,
        "num_hidden_layers": len(spec.layers), "num_attention_heads": mixer.heads, "kv_channels": mixer.head_dim,
        "seq_length": spec.context, "max_position_embeddings": spec.context, "rotary_emb_base": mixer.rope.theta,
        "rotary_pct": rotary_share(mixer.rope, mixer.head_dim), "use_dynamic_ntk": mixer.rope.by_row, "use_logn_attn": mixer.logn > 0,
        "no_bias": not mixer.out_bias, "layer_norm_epsilon": spec.eps, "tie_word_embeddings": spec.tied,
    }


@family("qwen", architecture="QWenLMHeadModel", names=QWEN1, fields=fields)
def qwen1(c: Config) -> DecoderSpec:
    d, bias = c.whole("kv_channels", 128, high=2**14), not c.get("no_bias", True)
    context = c.whole("seq_length", 8192)
    if c.heads * d != c.dim:
        raise BadInput(f"config.json: {c.heads} heads of kv_channels {d} are not hidden_size {c.dim}", "this family knows no other case")
    if c.need("intermediate_size") % 2:
        raise wrong("intermediate_size", c.get("intermediate_size"), "even: twice the width of the feed-forward layer")
    turned = int(d * c.number("rotary_pct", 1.0, high=1.1))
    if turned % 2 or not 2 < turned <= d:
        raise wrong("rotary_pct", c.get("rotary_pct"), f"an even share of {d}")
    stretch = (("rope_type", "qwen-ntk"), ("original_max_position_embeddings", context)) if c.get("use_dynamic_ntk", True) else ()
    rope = Rope(turned, c.number("rotary_emb_base", 10000.0), scaling=stretch)
    attn = Attn(c.heads, c.heads, d, rope, qkv_bias=True, out_bias=bias, logn=context if c.get("use_logn_attn", True) else 0)
    return DecoderSpec(
        c.need("vocab_size"), c.dim, (Layer(attn, MLP(c.need("intermediate_size") // 2, bias=bias)),) * c.layers,
        eps=c.number("layer_norm_epsilon", 1e-6, high=1.0), tied=bool(c.get("tie_word_embeddings", False)), context=context, family="qwen")
