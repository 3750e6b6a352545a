"""The Qwens with experts, two before the hybrids. Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): Qwen2's attention; weights of the chosen
experts as they come from the softmax, and a shared expert behind a gate of its own. Qwen3-MoE (arXiv 2505.09388): Qwen3's
attention; the weights add up to 1, no shared expert. Some layers may be dense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pellucid.models.config import (
    FULL,
    SLIDING,
    Config,
    experts_checked,
    head_dim_field,
    layer_types,
    shared_fields,
    window_fields,
    wrong,
)
from pellucid.models.families import family
from pellucid.models.names import QWEN_MOE
from pellucid.nn.specs import MLP, Attn, DecoderSpec, Layer, MoE
from pellucid.ops import ACTIVATIONS

KEPT = ("intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
        "shared_expert_intermediate_size", "router_aux_loss_coef")
"""What a model of one kind of layer alone would not say of the other kind."""


def fields(spec: DecoderSpec) -> dict[str, Any]:
    """Of both kinds of layers, where there are any of them."""
    found = {**shared_fields(spec), **head_dim_field(spec)}
    dense = [i for i, layer in enumerate(spec.layers) if isinstance(layer.ffn, MLP)]
    del found["intermediate_size"]
    if dense:
        found["intermediate_size"] = spec.layers[dense[0]].ffn.hidden
    moe = next((layer.ffn for layer in spec.layers if isinstance(layer.ffn, MoE)), None)
    if moe is not None:
        found |= {"num_experts": moe.experts, "num_experts_per_tok": moe.top_k, "moe_intermediate_size": moe.hidden,
                  "norm_topk_prob": moe.renormalize, "router_aux_loss_coef": moe.aux_loss}
        found |= {"shared_expert_intermediate_size": moe.shared} if moe.shared else {}
    return {**found, "decoder_sparse_step": 1, "mlp_only_layers": dense}


def qwen2_moe_fields(spec: DecoderSpec) -> dict[str, Any]:
    return {**fields(spec), "qkv_bias": spec.layers[0].mixer.qkv_bias, **window_fields(spec)}


def qwen3_moe_fields(spec: DecoderSpec) -> dict[str, Any]:
    mixer = spec.layers[0].mixer
    return {**fields(spec), "head_dim": mixer.head_dim, "attention_bias": mixer.qkv_bias, "use_sliding_window": mixer.window is not None,
            "sliding_window": mixer.window}


@family("qwen2_moe", architecture="Qwen2MoeForCausalLM", names=QWEN_MOE, fields=qwen2_moe_fields)
def qwen2_moe(c: Config) -> DecoderSpec:
    d, window = c.head_dim(), c.window(default=4096) if c.get("use_sliding_window", False) else None
    few = c.whole("max_window_layers", 28, low=0)  # here it is the first layers that have a window, and of them every second
    kinds = layer_types(c) or [SLIDING if window is not None and i % 2 == 0 and i < few else FULL for i in range(c.layers)]
    if window is None and SLIDING in kinds:
        raise wrong("use_sliding_window", c.get("use_sliding_window"), f"true, with a sliding_window, as layer_types names {SLIDING}")
    attn = Attn(c.heads, c.kv_heads, d, c.rope(d), qkv_bias=bool(c.get("qkv_bias", True)))
    moe = experts(c, MoE(c.experts(60), c.whole("num_experts_per_tok", 4), c.whole("moe_intermediate_size", 1408),
                         shared=c.whole("shared_expert_intermediate_size", 5632), shared_gate=True))
    return decoder(c, "qwen2_moe", [replace(attn, window=window) if kind == SLIDING else attn for kind in kinds], moe)


@family("qwen3_moe", architecture="Qwen3MoeForCausalLM", names=QWEN_MOE, fields=qwen3_moe_fields)
def qwen3_moe(c: Config) -> DecoderSpec:
    d, bias = c.head_dim(), bool(c.get("attention_bias", False))
    window = c.window(default=4096) if c.get("use_sliding_window", False) else None
    attn = Attn(c.heads, c.kv_heads, d, c.rope(d), qkv_bias=bias, out_bias=bias, qk_norm=True, window=window)
    moe = experts(c, MoE(c.experts(128), c.whole("num_experts_per_tok", 8), c.whole("moe_intermediate_size", 768)))
    return decoder(c, "qwen3_moe", [attn] * c.layers, moe)


def experts(c: Config, sizes: MoE) -> MoE | None:
    """`sizes` with what config.json says beside them; None: there are no experts at all."""
    return None if not sizes.experts else experts_checked(replace(sizes, act=activation(c), renormalize=bool(c.get("norm_topk_prob", False)),
                                   aux_loss=c.number("router_aux_loss_coef", 0.001, low=-1)))


def activation(c: Config) -> str:
    return c.one_of("hidden_act", "silu", ACTIVATIONS)


def decoder(c: Config, name: str, mixers: list[Attn], moe: MoE | None) -> DecoderSpec:
    """Layers with experts but where `mlp_only_layers` names them, or `decoder_sparse_step` passes over them."""
    only, step = c.get("mlp_only_layers", []), c.whole("decoder_sparse_step", 1)
    if not isinstance(only, list) or not all(isinstance(i, int) for i in only):
        raise wrong("mlp_only_layers", only, "a list of whole numbers")
    sparse = [moe is not None and i not in only and (i + 1) % step == 0 for i in range(c.layers)]
    mlp = None if all(sparse) else MLP(c.need("intermediate_size"), activation(c))
    return DecoderSpec(
        c.need("vocab_size"), c.dim, tuple(Layer(mixer, moe if has else mlp) for mixer, has in zip(mixers, sparse, strict=True)),
        eps=c.number("rms_norm_eps", 1e-6, high=1.0), tied=bool(c.get("tie_word_embeddings", False)),
        context=c.whole("max_position_embeddings", 32768), family=name,
        extra=tuple((field, c.fields[field]) for field in KEPT if c.get(field) is not None))
