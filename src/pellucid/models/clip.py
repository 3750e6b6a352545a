"""CLIP (arXiv 2103.00020): a causal text tower and a vision transformer, LayerNorm before each part, compared in one space."""

from __future__ import annotations

from typing import Any

from pellucid.models.config import Config, wrong
from pellucid.models.families import family
from pellucid.models.names import CLIP
from pellucid.nn.specs import MLP, Attn, DualEncoderSpec, EncoderSpec, Layer, Rope, VisionSpec
from pellucid.ops import ACTIVATIONS

KEPT = ("bos_token_id", "pad_token_id")


def fields(spec: DualEncoderSpec) -> dict[str, Any]:
    text, vision = spec.text, spec.vision
    return {
        "projection_dim": spec.dim,
        "text_config": {
            **tower_fields(text), **dict(text.extra), "model_type": "clip_text_model", "vocab_size": text.vocab,
            "max_position_embeddings": text.context, "eos_token_id": spec.pool_at, "projection_dim": spec.dim},
        "vision_config": {
            **tower_fields(vision), "model_type": "clip_vision_model", "image_size": vision.image, "patch_size": vision.patch,
            "num_channels": vision.channels, "projection_dim": spec.dim},
    }


def tower_fields(spec: EncoderSpec | VisionSpec) -> dict[str, Any]:
    mixer, ffn = spec.layers[0].mixer, spec.layers[0].ffn
    return {"hidden_size": spec.dim, "intermediate_size": ffn.hidden, "num_hidden_layers": len(spec.layers),
            "num_attention_heads": mixer.heads, "hidden_act": ffn.act, "layer_norm_eps": spec.eps}


@family("clip", architecture="CLIPModel", names=CLIP, fields=fields)
def clip(c: Config) -> DualEncoderSpec:
    text, vision = part(c, "text_config"), part(c, "vision_config")
    dim, layers, eps = tower(text, dim=512, heads=8, causal=True)
    words = EncoderSpec(
        text.whole("vocab_size", 49408), dim, layers, eps=eps, context=text.whole("max_position_embeddings", 77), final_norm=True,
        family="clip", extra=tuple((name, text.get(name)) for name in KEPT if text.get(name) is not None))
    dim, layers, eps = tower(vision, dim=768, heads=12, causal=False)
    image, patch = vision.whole("image_size", 224, high=2**14), vision.whole("patch_size", 32, high=2**14)
    if patch > image:
        raise wrong("patch_size", patch, f"at most image_size, {image}")
    pictures = VisionSpec(dim, layers, image, patch, vision.whole("num_channels", 3, high=64), eps)
    return DualEncoderSpec(words, pictures, c.whole("projection_dim", 512, high=2**20), text.whole("eos_token_id", 49407, low=0))


def tower(c: Config, dim: int, heads: int, causal: bool) -> tuple[int, tuple[Layer, ...], float]:
    """Width, layers and epsilon of one tower; dim and heads as they are where the file does not say."""
    dim, heads = c.whole("hidden_size", dim, high=2**20), c.whole("num_attention_heads", heads, high=2**12)
    if dim % heads:
        raise wrong("hidden_size", dim, f"a multiple of num_attention_heads, {heads}")
    attn = Attn(heads, heads, dim // heads, Rope(0), qkv_bias=True, out_bias=True, causal=causal)
    mlp = MLP(c.whole("intermediate_size", 4 * dim, high=2**24), c.one_of("hidden_act", "quick_gelu", ACTIVATIONS), True, False)
    return dim, (Layer(attn, mlp),) * c.whole("num_hidden_layers", 12, high=1000), c.number("layer_norm_eps", 1e-5, high=1.0)


def part(c: Config, name: str) -> Config:
    """`text_config` or `vision_config`; what older files say in `..._config_dict` counts."""
    parts = [c.get(name, {}), c.get(f"{name}_dict", {})]
    if not all(isinstance(fields, dict) for fields in parts):
        raise wrong(name, parts, "an object")
    return Config({**parts[0], **parts[1]})
