"""Pure functions on tensors. Each has a reference of a few lines; a fast twin, where one exists, has its signature."""

from pellucid.ops.activation import ACTIVATIONS, swiglu, swiglu_reference
from pellucid.ops.attention import attention, attention_reference, attention_sdpa, choose_attention
from pellucid.ops.compiled import choose_jit
from pellucid.ops.contrastive import contrastive_loss
from pellucid.ops.delta import (
    causal_conv,
    choose_gated_delta,
    gated_delta,
    gated_delta_chunked,
    gated_delta_reference,
    l2_norm,
)
from pellucid.ops.dispatch import Pairs, capacity_of, pairs_by_expert, pairs_of_choice
from pellucid.ops.experts import (
    ExpertWeights,
    choose_experts,
    experts,
    experts_few,
    experts_grouped,
    experts_reference,
    experts_sorted,
    gated,
)
from pellucid.ops.heads import qkv_heads, qkv_heads_reference
from pellucid.ops.indexer import choose_keys, chosen_mask, index_scores, index_scores_reference
from pellucid.ops.latent import (
    choose_latent_attention,
    latent_attention,
    latent_attention_absorbed,
    latent_attention_expanded,
    latent_attention_reference,
)
from pellucid.ops.loss import chunked_cross_entropy, cross_entropy_reference, token_logprobs
from pellucid.ops.norm import rms_norm, rms_norm_reference
from pellucid.ops.rope import (
    BY_LENGTH,
    apply_rope,
    apply_rope_reference,
    log_n_scale,
    rope_angles,
    rope_attention_factor,
    rope_frequencies,
)
from pellucid.ops.router import expert_choice, route
from pellucid.ops.sinusoid import sinusoids
from pellucid.ops.softmax import log_softmax, online_softmax, softmax
from pellucid.ops.tiles import attention_one_query, attention_tiled
from pellucid.ops.versions import attention_of_versions
from pellucid.ops.visible import bias_of, visible

__all__ = [
    "ACTIVATIONS",
    "BY_LENGTH",
    "ExpertWeights",
    "Pairs",
    "apply_rope",
    "apply_rope_reference",
    "attention",
    "attention_of_versions",
    "attention_one_query",
    "attention_reference",
    "attention_sdpa",
    "attention_tiled",
    "bias_of",
    "capacity_of",
    "causal_conv",
    "choose_attention",
    "choose_experts",
    "choose_gated_delta",
    "choose_jit",
    "choose_keys",
    "choose_latent_attention",
    "chosen_mask",
    "chunked_cross_entropy",
    "contrastive_loss",
    "cross_entropy_reference",
    "expert_choice",
    "experts",
    "experts_few",
    "experts_grouped",
    "experts_reference",
    "experts_sorted",
    "gated",
    "gated_delta",
    "gated_delta_chunked",
    "gated_delta_reference",
    "index_scores",
    "index_scores_reference",
    "l2_norm",
    "latent_attention",
    "latent_attention_absorbed",
    "latent_attention_expanded",
    "latent_attention_reference",
    "log_n_scale",
    "log_softmax",
    "online_softmax",
    "pairs_by_expert",
    "pairs_of_choice",
    "qkv_heads",
    "qkv_heads_reference",
    "rms_norm",
    "rms_norm_reference",
    "rope_angles",
    "rope_attention_factor",
    "rope_frequencies",
    "route",
    "sinusoids",
    "softmax",
    "swiglu",
    "swiglu_reference",
    "token_logprobs",
    "visible",
]
