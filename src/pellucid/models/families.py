"""The table of families: `model_type` -> how to read its config.json and what its tensors are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pellucid.errors import BadInput, nearest
from pellucid.models.config import Config, rope_fields
from pellucid.models.names import Names
from pellucid.nn.specs import DecoderSpec


@dataclass(frozen=True)
class Family:
    model_type: str
    architecture: str  # the class that transformers opens it with
    names: Names
    spec: Callable[[Config], DecoderSpec]


FAMILIES: dict[str, Family] = {}


def family(model_type: str, architecture: str, names: Names) -> Callable[[Callable[[Config], DecoderSpec]], Callable[[Config], DecoderSpec]]:
    """Registers a function config -> spec."""

    def register(spec: Callable[[Config], DecoderSpec]) -> Callable[[Config], DecoderSpec]:
        FAMILIES[model_type] = Family(model_type, architecture, names, spec)
        return spec

    return register


def find(model_type: str) -> Family:
    from pellucid.models import llama, qwen  # noqa: F401  (they register themselves)

    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = sorted(FAMILIES)
        raise BadInput(f"model_type {model_type!r} is not supported{nearest(str(model_type), known)}",
                       next=f"supported families: {', '.join(known)}")
    return FAMILIES[model_type]


def config_of(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json (transformers 5 spelling) of a spec: the inverse of the family's function."""
    f = find(spec.family)
    mixer, ffn = spec.layers[0].mixer, spec.layers[0].ffn
    windows = [layer.mixer.window for layer in spec.layers]
    fields: dict[str, Any] = {
        "architectures": [f.architecture],
        "model_type": spec.family,
        "vocab_size": spec.vocab,
        "hidden_size": spec.dim,
        "intermediate_size": ffn.hidden,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": ffn.act,
        "rms_norm_eps": spec.eps,
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": spec.tied,
        "attention_bias": mixer.qkv_bias,
        "rope_parameters": rope_fields(mixer.rope),
    }
    if ffn.bias:
        fields["mlp_bias"] = True
    if any(windows):
        fields |= {"use_sliding_window": True, "sliding_window": next(w for w in windows if w),
                   "layer_types": ["sliding_attention" if w else "full_attention" for w in windows]}
    return {**dict(spec.extra), **fields}
