"""gpt-oss (arXiv 2508.10925): attention with a sink logit in every head, its layers with and without a window in turns; experts in all
layers, chosen by their logits and weighed by a softmax over the chosen, with a clamped gate; biases nearly everywhere."""

from __future__ import annotations

from typing import Any

from pellucid.models.config import FULL, SLIDING, Config, experts_checked, layer_types, shared_fields, wrong
from pellucid.models.families import family
from pellucid.models.names import GPT_OSS
from pellucid.nn.specs import Attn, DecoderSpec, Layer, MoE

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096}


def fields(spec: DecoderSpec) -> dict[str, Any]:
    mixers, moe = [layer.mixer for layer in spec.layers], spec.layers[0].ffn
    windows = [m.window for m in mixers if m.window]
    alpha, limit = moe.clamp
    return {
        **shared_fields(spec), "head_dim": mixers[0].head_dim, "attention_bias": mixers[0].qkv_bias,
        "layer_types": [SLIDING if m.window else FULL for m in mixers], **({"sliding_window": windows[0]} if windows else {}),
        "num_local_experts": moe.experts, "num_experts_per_tok": moe.top_k, "swiglu_alpha": alpha, "swiglu_limit": limit,
        "router_aux_loss_coef": moe.aux_loss,
    }


@family("gpt_oss", architecture="GptOssForCausalLM", names=GPT_OSS, fields=fields)
def gpt_oss(c: Config) -> DecoderSpec:
    d, bias = c.whole("head_dim", 64, high=2**14), bool(c.get("attention_bias", True))
    if c.get("hidden_act", "silu") != "silu":
        raise wrong("hidden_act", c.get("hidden_act"), "silu: the clamped gate is made of it")
    kinds = layer_types(c) or [FULL if i % 2 else SLIDING for i in range(c.layers)]
    window = c.window(default=128)
    if window is None and SLIDING in kinds:
        raise wrong("sliding_window", None, f"a whole number, as layer_types names {SLIDING}")
    scaling = c.get("rope_parameters") or c.get("rope_scaling") or YARN
    rope = Config({**c.fields, "rope_parameters": scaling}).rope(d, theta=150_000.0)
    attns = {kind: Attn(c.heads, c.kv_heads, d, rope, bias, bias, sinks=True, window=window if kind == SLIDING else None)
             for kind in (FULL, SLIDING)}
    moe = experts_checked(MoE(
        c.experts(128), c.whole("num_experts_per_tok", 4), c.need("intermediate_size"), score="top_k_softmax", router_bias=True,
        expert_bias=True, clamp=(c.number("swiglu_alpha", 1.702), c.number("swiglu_limit", 7.0)),
        aux_loss=c.number("router_aux_loss_coef", 0.001, low=-1)))
    return DecoderSpec(
        c.need("vocab_size"), c.dim, tuple(Layer(attns[kind], moe) for kind in kinds), eps=c.number("rms_norm_eps", 1e-5, high=1.0),
        tied=bool(c.get("tie_word_embeddings", False)), context=c.whole("max_position_embeddings", 131072), norm="rms_wide",
        family="gpt_oss")
