"""Mixtral (arXiv 2401.04088): Mistral's block with eight experts instead of the feed-forward layer, two for each token, whose weights
are a softmax over these two."""

from __future__ import annotations

from typing import Any

from pellucid.models.config import Config, experts_checked, head_dim_field, shared_fields, wrong
from pellucid.models.families import family
from pellucid.models.names import MIXTRAL
from pellucid.nn.specs import Attn, DecoderSpec, Layer, MoE
from pellucid.ops import ACTIVATIONS


def fields(spec: DecoderSpec) -> dict[str, Any]:
    moe = spec.layers[0].ffn
    return {**shared_fields(spec), **head_dim_field(spec), "sliding_window": spec.layers[0].mixer.window, "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k, "router_aux_loss_coef": moe.aux_loss}


@family("mixtral", architecture="MixtralForCausalLM", names=MIXTRAL, fields=fields)
def mixtral(c: Config) -> DecoderSpec:
    if c.get("router_jitter_noise", 0):
        raise wrong("router_jitter_noise", c.get("router_jitter_noise"), "0: routers without noise are supported")
    d = c.head_dim()
    attn = Attn(c.heads, c.kv_heads, d, c.rope(d, theta=1e6), window=c.window(default=None))
    moe = experts_checked(MoE(
        c.experts(8), c.whole("num_experts_per_tok", 2), c.need("intermediate_size"), c.one_of("hidden_act", "silu", ACTIVATIONS),
        renormalize=True, aux_loss=c.number("router_aux_loss_coef", 0.001, low=-1)))
    return DecoderSpec(
        c.need("vocab_size"), c.dim, (Layer(attn, moe),) * c.layers, eps=c.number("rms_norm_eps", 1e-5, high=1.0),
        tied=bool(c.get("tie_word_embeddings", False)), context=c.whole("max_position_embeddings", 131072), family="mixtral")
