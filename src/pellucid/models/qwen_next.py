"""Qwen3-Next and Qwen3.5 (text; also 3.6 and 3.8-27B): three layers of gated delta net (arXiv 2412.06464), then one of gated attention.

Attention: grouped, an RMS norm on queries and keys, a quarter of each head rotated, the result multiplied by sigmoid(gate x).
All norms are stored less 1, but for those within the delta net. Feed-forward: experts of which one is shared and gated, or dense.
"""

from __future__ import annotations

from typing import Any

from pellucid.errors import BadInput
from pellucid.models.config import FULL, LINEAR, Config, experts_checked, layer_types, rope_fields, rotary_share, wrong
from pellucid.models.families import family
from pellucid.models.names import QWEN3_5, QWEN3_NEXT
from pellucid.nn.specs import GDN, MLP, Attn, DecoderSpec, Layer, MoE

IGNORED = (r"^mtp\.", r"^model\.visual\.")  # a predictor of further tokens and the eyes: neither is part of the text model
NESTED = ((r"^model\.language_model\.", "model."),)  # where a multimodal model keeps its text model
KEPT = ("head_dim", "num_attention_heads", "num_key_value_heads", "attention_bias", "rope_parameters",
        "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim",
        "intermediate_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
        "norm_topk_prob", "router_aux_loss_coef")
"""What a model of one kind of layer alone would not say of the other kind."""


@family("qwen3_next", architecture="Qwen3NextForCausalLM", names=QWEN3_NEXT, fields=lambda spec: next_fields(spec), ignored=IGNORED)
def qwen3_next(c: Config) -> DecoderSpec:
    moe = experts(c, 512, 10, bool(c.get("norm_topk_prob", True))) if c.experts(512) else None
    dense = dense_layers(c) if moe is not None else range(c.layers)
    return hybrid(c, "qwen3_next", [mlp(c, 5632) if i in dense or moe is None else moe for i in range(c.layers)])


@family("qwen3_5_text", architecture="Qwen3_5ForCausalLM", names=QWEN3_5, fields=lambda spec: fields(spec),
        renames=NESTED, ignored=IGNORED)
def qwen3_5(c: Config) -> DecoderSpec:
    return hybrid(c, "qwen3_5_text", [mlp(c, 12288)] * c.layers)


@family("qwen3_5_moe_text", architecture="Qwen3_5MoeForCausalLM", names=QWEN3_5, fields=lambda spec: fields(spec),
        renames=NESTED, ignored=IGNORED)
def qwen3_5_moe(c: Config) -> DecoderSpec:
    return hybrid(c, "qwen3_5_moe_text", [experts(c, 256, 8, True)] * c.layers)


def hybrid(c: Config, name: str, ffns: list[MLP | MoE]) -> DecoderSpec:
    d, bias = c.head_dim(default=256), bool(c.get("attention_bias", False))
    rope = Config({**c.fields, "partial_rotary_factor": c.get("partial_rotary_factor", 0.25)}).rope(d, partial=True)
    mixers = {FULL: Attn(c.heads, c.kv_heads, d, rope, qkv_bias=bias, out_bias=bias, qk_norm=True, gate=True), LINEAR: delta_net(c)}
    every = c.whole("full_attention_interval", 4)
    kinds = layer_types(c, LINEAR) or [LINEAR if (i + 1) % every else FULL for i in range(c.layers)]
    return DecoderSpec(
        c.need("vocab_size"), c.dim, tuple(Layer(mixers[kind], ffn) for kind, ffn in zip(kinds, ffns, strict=True)),
        eps=c.number("rms_norm_eps", 1e-6, high=1.0), tied=bool(c.get("tie_word_embeddings", False)),
        context=c.whole("max_position_embeddings", 32768), norm="rms_centred", family=name,
        extra=tuple((field, c.fields[field]) for field in KEPT if c.get(field) is not None))


def delta_net(c: Config) -> GDN:
    keys, values = c.whole("linear_num_key_heads", 16, high=2**12), c.whole("linear_num_value_heads", 32, high=2**12)
    if values % keys:
        raise BadInput(f"config.json: {values} value heads cannot share {keys} key heads evenly")
    return GDN(keys, values, c.whole("linear_key_head_dim", 128, high=2**14), c.whole("linear_value_head_dim", 128, high=2**14),
               c.whole("linear_conv_kernel_dim", 4, high=2**8))


def mlp(c: Config, width: int) -> MLP:
    return MLP(c.whole("intermediate_size", width, high=2**24), activation(c))


def experts(c: Config, count: int, top_k: int, renormalize: bool) -> MoE:
    return experts_checked(MoE(
        c.experts(count), c.whole("num_experts_per_tok", top_k), c.whole("moe_intermediate_size", 512), activation(c),
        renormalize=renormalize, shared=c.whole("shared_expert_intermediate_size", 512), shared_gate=True,
        aux_loss=c.number("router_aux_loss_coef", 0.001, low=-1)))


def activation(c: Config) -> str:
    return c.one_of("hidden_act", "silu", ("silu",))  # the delta net's convolution has it too


def dense_layers(c: Config) -> list[int]:
    only, every = c.get("mlp_only_layers", []), c.whole("decoder_sparse_step", 1)
    if not isinstance(only, list) or not all(isinstance(i, int) for i in only):
        raise wrong("mlp_only_layers", only, "a list of layers")
    return [i for i in range(c.layers) if i in only or (i + 1) % every]


# --- and back ---------------------------------------------------------------------------------------------------------


def fields(spec: DecoderSpec) -> dict[str, Any]:
    parts = {type(part): part for layer in spec.layers for part in (layer.mixer, layer.ffn)}
    found = {
        "vocab_size": spec.vocab, "hidden_size": spec.dim, "num_hidden_layers": len(spec.layers), "hidden_act": "silu",
        "rms_norm_eps": spec.eps, "max_position_embeddings": spec.context, "tie_word_embeddings": spec.tied,
        "layer_types": [FULL if isinstance(layer.mixer, Attn) else LINEAR for layer in spec.layers]}
    if (a := parts.get(Attn)) is not None:
        kept = dict(spec.extra).get("rope_parameters") or {}  # M-RoPE's sections, which say nothing of text
        found |= {
            "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "head_dim": a.head_dim, "attention_bias": a.qkv_bias,
            "rope_parameters": {**{k: v for k, v in kept.items() if k.startswith("mrope")}, **rope_fields(a.rope),
                                "partial_rotary_factor": rotary_share(a.rope, a.head_dim)}}
    if (g := parts.get(GDN)) is not None:
        found |= {"linear_num_key_heads": g.k_heads, "linear_num_value_heads": g.v_heads, "linear_key_head_dim": g.k_dim,
                  "linear_value_head_dim": g.v_dim, "linear_conv_kernel_dim": g.conv}
    if (m := parts.get(MLP)) is not None:
        found |= {"intermediate_size": m.hidden}
    if (m := parts.get(MoE)) is not None:
        found |= {"num_experts": m.experts, "num_experts_per_tok": m.top_k, "moe_intermediate_size": m.hidden,
                  "shared_expert_intermediate_size": m.shared, "router_aux_loss_coef": m.aux_loss}
    return found


def next_fields(spec: DecoderSpec) -> dict[str, Any]:
    ffns = [layer.ffn for layer in spec.layers]
    moe = next((ffn for ffn in ffns if isinstance(ffn, MoE)), None)
    return {**fields(spec), **({} if moe is None else {"norm_topk_prob": moe.renormalize}), "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, ffn in enumerate(ffns) if isinstance(ffn, MLP)]}
