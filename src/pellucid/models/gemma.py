"""Gemma 3, text (arXiv 2503.19786): norms before and behind each part, their weights stored less 1; RMS norms on queries and
keys; a scaled embedding; five layers with a window and a rotation of their own, then one without."""

from __future__ import annotations

from typing import Any

from pellucid.models.config import FULL, SLIDING, Config, layer_types, rope_fields, shared_fields, wrong
from pellucid.models.families import family
from pellucid.models.names import GEMMA3
from pellucid.nn.specs import MLP, Attn, DecoderSpec, Layer, Rope
from pellucid.ops import ACTIVATIONS


def fields(spec: DecoderSpec) -> dict[str, Any]:
    mixers = [layer.mixer for layer in spec.layers]
    kinds = [SLIDING if m.window else FULL for m in mixers]
    windows = [m.window for m in mixers if m.window]
    fields = shared_fields(spec)
    return {
        "hidden_activation": fields.pop("hidden_act"), **fields, "head_dim": mixers[0].head_dim, "layer_types": kinds,
        "attention_bias": mixers[0].qkv_bias, "query_pre_attn_scalar": round((mixers[0].scale or 1) ** -2),
        "rope_parameters": {kind: rope_fields(m.rope) for kind, m in zip(kinds, mixers)},
        **({"sliding_window": windows[0]} if windows else {}),
    }


# where multimodal files keep the text model, in transformers 5 and before, and what stands beside it
NESTED = ((r"^(model\.)?language_model\.(model\.)?", "model."),)
EYES = (r"^(model\.)?(vision_tower|multi_modal_projector)\.",)
SILENT = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}  # what the 4B's file leaves unsaid


@family("gemma3_text", architecture="Gemma3ForCausalLM", names=GEMMA3, fields=fields, renames=NESTED, ignored=EYES)
def gemma3(c: Config) -> DecoderSpec:
    c = Config({**SILENT, **{name: value for name, value in c.fields.items() if value is not None or name not in SILENT}})
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        if c.get(name):
            raise wrong(name, c.get(name), "absent: it is not supported")
    d, bias, every = c.head_dim(default=256), bool(c.get("attention_bias", False)), c.whole("sliding_window_pattern", 6)
    kinds = layer_types(c) or [FULL if (i + 1) % every == 0 else SLIDING for i in range(c.layers)]
    scale = c.whole("query_pre_attn_scalar", 256) ** -0.5
    mlp = MLP(c.need("intermediate_size"), c.one_of("hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS))
    of_kind = {
        kind: Layer(Attn(c.heads, c.kv_heads, d, rope(c, kind, d), bias, bias, qk_norm=True, scale=scale,
                         window=c.whole("sliding_window", 4096) if kind == SLIDING else None), mlp, order="sandwich")
        for kind in (FULL, SLIDING)
    }
    return DecoderSpec(
        c.need("vocab_size"), c.dim, tuple(of_kind[kind] for kind in kinds), eps=c.number("rms_norm_eps", 1e-6, high=1.0),
        tied=bool(c.get("tie_word_embeddings", True)), context=c.whole("max_position_embeddings", 131072), norm="rms_centred",
        embed_scale=c.dim**0.5, family="gemma3_text")


def rope(c: Config, kind: str, head_dim: int) -> Rope:
    """Nested in `rope_parameters` by kind, or in older files: `rope_local_base_freq` is theta where there is a window,
    `rope_theta` and `rope_scaling` are for the other layers."""
    nested = c.get("rope_parameters", {})
    if not isinstance(nested, dict):
        raise wrong("rope_parameters", nested, "an object")
    old = ("rope_theta", 1e6) if kind == FULL else ("rope_local_base_freq", 1e4)
    return Config({
        "rope_parameters": nested.get(kind) or (c.get("rope_scaling") if kind == FULL else None),
        "rope_theta": c.get(*old), "max_position_embeddings": c.whole("max_position_embeddings", 131072)}).rope(head_dim)
