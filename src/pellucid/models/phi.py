"""Phi-3, 3.5 and 4-mini (arXiv 2404.14219): Llama's block with q, k, v (and gate, up) in one tensor on the Hub, rotation of
the first part of each head only (4-mini), and LongRoPE."""

from __future__ import annotations

from typing import Any

from pellucid.models.config import Config, head_dim_field, rotary_share, shared_fields
from pellucid.models.families import family
from pellucid.models.names import PHI3
from pellucid.nn.specs import MLP, Attn, DecoderSpec, Layer
from pellucid.ops import ACTIVATIONS


def fields(spec: DecoderSpec) -> dict[str, Any]:
    fields, mixer = {**shared_fields(spec), **head_dim_field(spec)}, spec.layers[0].mixer
    fields["sliding_window"] = mixer.window
    fields["rope_parameters"]["partial_rotary_factor"] = rotary_share(mixer.rope, mixer.head_dim)
    if "original_max_position_embeddings" in mixer.rope.scaling_dict:  # where transformers looks for it
        fields["original_max_position_embeddings"] = mixer.rope.scaling_dict["original_max_position_embeddings"]
    return fields


@family("phi3", architecture="Phi3ForCausalLM", names=PHI3, fields=fields)
def phi3(c: Config) -> DecoderSpec:
    d = c.head_dim()
    rope = c.rope(d, partial=True, original=4096, aliases={"su": "longrope", "yarn": "longrope"})  # what first files said
    attn = Attn(c.heads, c.kv_heads, d, rope, window=c.window(default=None))
    mlp = MLP(c.need("intermediate_size"), c.one_of("hidden_act", "silu", ACTIVATIONS))
    return DecoderSpec(
        c.need("vocab_size"), c.dim, (Layer(attn, mlp),) * c.layers, eps=c.number("rms_norm_eps", 1e-5, high=1.0),
        tied=bool(c.get("tie_word_embeddings", False)), context=c.whole("max_position_embeddings", 4096), family="phi3")
