"""DeepSeek V2 and V2-Lite (arXiv 2405.04434), V3 and R1 (arXiv 2412.19437), V3.2 (arXiv 2512.02556).

All: multi-head latent attention, first layers dense, then experts of which one is shared. V2 scores experts by softmax, in groups
ranked by their best. V3 scores by sigmoid and chooses with a bias that balances loads, in groups ranked by their two best;
behind the last layer may stand one more that predicts a further token. V3.2 adds an indexer that chooses the keys.
DeepSeek LLM and the distillations of R1 are Llama's and Qwen2's architecture, and are called so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pellucid.errors import BadInput
from pellucid.models.config import Config, rope_fields, wrong
from pellucid.models.families import family
from pellucid.models.names import DEEPSEEK
from pellucid.nn.specs import MLA, MLP, DecoderSpec, Indexer, Layer, MoE, Rope
from pellucid.ops import ACTIVATIONS

MTP_COPIES = (r"\.layers\.\d+\.embed_tokens\.weight$", r"\.shared_head\.head\.weight$")  # of the model's own embedding and head
KEPT = ("intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size", "n_group",
        "topk_group", "routed_scaling_factor", "norm_topk_prob", "topk_method", "moe_layer_freq", "aux_loss_alpha", "seq_aux")
"""What a model of one kind of layer alone would not say of the other kind."""


@family("deepseek_v2", architecture="DeepseekV2ForCausalLM", names=DEEPSEEK, fields=lambda spec: fields(spec, "softmax", "greedy"))
def deepseek_v2(c: Config) -> DecoderSpec:
    limited = c.one_of("topk_method", "greedy", ("greedy", "group_limited_greedy")) == "group_limited_greedy"
    groups = (c.need("n_group"), c.need("topk_group")) if limited else (1, 1)
    moe = experts(c, 64, 2, 1407, None, MoE(0, 0, 0, scale=c.number("routed_scaling_factor", 1.0), groups=groups[0], top_groups=groups[1]))
    return deepseek(c, "deepseek_v2", latent(c), sparse(c, 0), moe, context=2048)


@family("deepseek_v3", architecture="DeepseekV3ForCausalLM", names=DEEPSEEK, fields=lambda spec: v3_fields(spec), ignored=MTP_COPIES)
def deepseek_v3(c: Config) -> DecoderSpec:
    pairs = bool(c.get("rope_interleave", True))
    return deepseek(c, "deepseek_v3", latent(c, pairs), sparse(c, 3), v3_experts(c), context=4096)


@family("deepseek_v32", architecture="DeepseekV32ForCausalLM", names=DEEPSEEK, fields=lambda spec: v32_fields(spec), ignored=MTP_COPIES)
def deepseek_v32(c: Config) -> DecoderSpec:
    indexer = Indexer(c.whole("index_n_heads", 64, high=2**12), c.whole("index_head_dim", 128, high=2**14), c.whole("index_topk", 2048))
    mla = replace(latent(c), indexer=indexer)
    if mla.q_rank is None or indexer.dim < mla.rope.dim:
        raise BadInput(f"config.json: index_head_dim {indexer.dim}, q_lora_rank {mla.q_rank}",
                       f"the indexer reads the queries' latent, and rotates {mla.rope.dim} entries of its heads")
    return deepseek(c, "deepseek_v32", mla, sparse(c, 3), v3_experts(c), context=163840)


def latent(c: Config, pairs: bool = True) -> MLA:
    """The attention of every layer. pairs: neighbours are rotated together, not halves."""
    nope, r = c.whole("qk_nope_head_dim", 128, high=2**14), c.whole("qk_rope_head_dim", 64, high=2**14)
    rope = replace(c.rope(r), interleaved=pairs)
    q_rank = c.whole("q_lora_rank", 1536) if c.fields.get("q_lora_rank", 0) is not None else None  # null says: none
    return MLA(c.heads, q_rank, c.whole("kv_lora_rank", 512), nope, c.whole("v_head_dim", 128, high=2**14), rope,
               scale=(nope + r) ** -0.5 * temperature(rope), bias=bool(c.get("attention_bias", False)))


def temperature(rope: Rope) -> float:
    """YaRN's second one: beside cos and sin, the whole score is multiplied, by the square of 0.1 mscale_all_dim ln factor + 1."""
    scaling = rope.scaling_dict
    factor, share = scaling.get("factor", 1.0), scaling.get("mscale_all_dim", 0.0)
    return float((0.1 * share * math.log(factor) + 1) ** 2) if factor > 1 else 1.0


def experts(c: Config, count: int, shared: int, hidden: int, top_k: int | None, router: MoE) -> MoE:
    """`router` with the sizes that config.json gives, or those defaults."""
    hidden, count = c.whole("moe_intermediate_size", hidden), c.whole("n_routed_experts", count, high=2**16)
    top_k = c.need("num_experts_per_tok") if top_k is None else c.whole("num_experts_per_tok", top_k)
    if top_k > count or count % router.groups or router.top_groups > router.groups:
        raise BadInput(f"config.json: {top_k} of {count} experts, from {router.top_groups} of {router.groups} groups", "that cannot be chosen")
    return replace(router, experts=count, top_k=top_k, hidden=hidden, act=activation(c), wide_router=True,
                   shared=hidden * c.whole("n_shared_experts", shared, low=0, high=2**16),
                   aux_loss=c.number("aux_loss_alpha", 0.0, low=-1), balance="sequence" if c.get("seq_aux", True) else "switch")


def v3_experts(c: Config) -> MoE:
    return experts(c, 256, 1, 2048, 8, MoE(
        0, 0, 0, score="sigmoid", renormalize=bool(c.get("norm_topk_prob", True)), scale=c.number("routed_scaling_factor", 2.5),
        groups=c.whole("n_group", 8), top_groups=c.whole("topk_group", 4), group_score="top2", select_bias=True))


def sparse(c: Config, first: int) -> list[bool]:
    """Which layers have experts: `mlp_layer_types`, or every `moe_layer_freq`-th from `first_k_dense_replace` on."""
    kinds = c.get("mlp_layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != c.layers or not all(kind in ("dense", "sparse") for kind in kinds):
            raise wrong("mlp_layer_types", kinds, f"a list of {c.layers}, each dense or sparse")
        return [kind == "sparse" for kind in kinds]
    first, every = c.whole("first_k_dense_replace", first, low=0), c.whole("moe_layer_freq", 1)
    return [i >= first and i % every == 0 for i in range(c.layers)]


def activation(c: Config) -> str:
    return c.one_of("hidden_act", "silu", ACTIVATIONS)


def deepseek(c: Config, name: str, mla: MLA, is_sparse: Sequence[bool], moe: MoE, context: int) -> DecoderSpec:
    """What all of them have in common."""
    mlp = moe if all(is_sparse) else MLP(c.need("intermediate_size"), activation(c))
    return DecoderSpec(
        c.need("vocab_size"), c.dim, tuple(Layer(mla, moe if yes else mlp) for yes in is_sparse),
        eps=c.number("rms_norm_eps", 1e-6, high=1.0), tied=bool(c.get("tie_word_embeddings", False)),
        context=c.whole("max_position_embeddings", context),
        mtp=(Layer(mla, moe),) * c.whole("num_nextn_predict_layers", 0, low=0, high=100) if name != "deepseek_v2" else (),
        family=name, extra=tuple((field, c.fields[field]) for field in KEPT if c.get(field) is not None))


# --- and back ---------------------------------------------------------------------------------------------------------


def fields(spec: DecoderSpec, score: str, method: str) -> dict[str, Any]:
    mla = spec.layers[0].mixer
    ffns = [layer.ffn for layer in (*spec.layers, *spec.mtp)]
    dense = next((ffn for ffn in ffns if isinstance(ffn, MLP)), None)
    found: dict[str, Any] = {} if dense is None else {"intermediate_size": dense.hidden}
    moe = next((ffn for ffn in ffns if isinstance(ffn, MoE)), None)
    if moe is not None:
        groups = {"n_group": moe.groups, "topk_group": moe.top_groups} if method == "noaux_tc" or moe.groups > 1 else {}
        found |= {
            "n_routed_experts": moe.experts, "num_experts_per_tok": moe.top_k, "moe_intermediate_size": moe.hidden,
            "n_shared_experts": moe.shared // moe.hidden, "routed_scaling_factor": moe.scale, "norm_topk_prob": moe.renormalize,
            "topk_method": "group_limited_greedy" if method == "greedy" and moe.groups > 1 else method, "scoring_func": score, **groups}
    return {
        "vocab_size": spec.vocab, "hidden_size": spec.dim, "num_hidden_layers": len(spec.layers),
        "num_attention_heads": mla.heads, "num_key_value_heads": mla.heads,
        "q_lora_rank": mla.q_rank, "kv_lora_rank": mla.kv_rank, "qk_nope_head_dim": mla.nope, "qk_rope_head_dim": mla.rope.dim,
        "v_head_dim": mla.v_dim, "attention_bias": mla.bias, "hidden_act": ffns[0].act, "rms_norm_eps": spec.eps,
        "max_position_embeddings": spec.context, "tie_word_embeddings": spec.tied, "rope_parameters": rope_fields(mla.rope),
        "first_k_dense_replace": next((i for i, layer in enumerate(spec.layers) if isinstance(layer.ffn, MoE)), len(spec.layers)),
        **found}


def v3_fields(spec: DecoderSpec) -> dict[str, Any]:
    return {**fields(spec, "sigmoid", "noaux_tc"), "rope_interleave": spec.layers[0].mixer.rope.interleaved,
            "num_nextn_predict_layers": len(spec.mtp)}


def v32_fields(spec: DecoderSpec) -> dict[str, Any]:
    indexer = spec.layers[0].mixer.indexer
    kinds = ["sparse" if isinstance(layer.ffn, MoE) else "dense" for layer in spec.layers]
    return {**fields(spec, "sigmoid", "noaux_tc"), "mlp_layer_types": kinds, "num_nextn_predict_layers": len(spec.mtp),
            "index_n_heads": indexer.heads, "index_head_dim": indexer.dim, "index_topk": indexer.top_k}
