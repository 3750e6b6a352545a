"""Specs: what a model is, as a small tree of frozen dataclasses.

`config.json` is read into specs once (models/); blocks are built from specs (`BUILD` in nn/build.py); the inspector
counts from them. No block ever asks for a model's name: where two families differ, a field differs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pellucid.ops import BY_LENGTH


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: rotated width `dim` (the first entries of a head; 0: none), base `theta`, `scaling` as in config.json's
    rope_parameters."""

    dim: int
    theta: float = 10_000.0
    interleaved: bool = False
    scaling: tuple[tuple[str, Any], ...] = ()  # sorted items, so that a spec stays hashable and comparable
    attention_factor: float = 1.0  # cos and sin are multiplied by it (YaRN, LongRoPE)

    @property
    def scaling_dict(self) -> dict[str, Any]:
        return dict(self.scaling)

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length of the sequence."""
        return self.scaling_dict.get("rope_type") in BY_LENGTH


@dataclass(frozen=True)
class Attn:
    """Self-attention with grouped key/value heads (MHA: kv_heads == heads; MQA: kv_heads == 1)."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head, before the rotation (Qwen3)
    window: int | None = None
    scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    # Derived: whether cos and sin are more than those of position x frequency. A field, so that a fast path that does
    # not know it steps aside, as it does for any other.
    special_rope: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "special_rope", self.rope.by_length or self.rope.attention_factor != 1)


@dataclass(frozen=True)
class MLP:
    """Feed-forward: down(act(gate x) * up x), or without a gate down(act(up x))."""

    hidden: int
    act: str = "silu"
    bias: bool = False
    gated: bool = True


@dataclass(frozen=True)
class Layer:
    """Pre-norm residual layer: x + mixer(norm x), then x + ffn(norm x)."""

    mixer: Attn
    ffn: MLP
    post_norms: bool = False  # a norm also on what mixer and ffn return, before it is added (sandwich; Gemma)


@dataclass(frozen=True)
class DecoderSpec:
    """A causal language model: embedding, layers, final norm, head (the embedding's own matrix when `tied`)."""

    vocab: int
    dim: int
    layers: tuple[Layer, ...]
    eps: float = 1e-6
    tied: bool = False
    context: int = 2048
    norm: str = "rms"  # of every norm outside attention: rms; rms_centred (weights are stored less 1, q and k too); layer (with mean and bias)
    positions: str = "rope"  # or learned: a vector for each of `context` positions, added to the embedding
    embed_scale: float = 1.0  # of the embedding, in its own dtype; the tied head goes without
    family: str = "qwen3"  # which function of models/ writes the config.json back
    extra: tuple[tuple[str, Any], ...] = field(default=(), compare=False)  # config.json fields that change no number

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of float32 cache that one token leaves in all layers."""
        return sum(2 * layer.mixer.kv_heads * layer.mixer.head_dim * 4 for layer in self.layers)


def count_parameters(spec: DecoderSpec) -> int:
    """Parameters (a tied head counted once), from the spec alone; equals the built model's own count."""
    norm = spec.dim * (2 if spec.norm == "layer" else 1)
    total = spec.vocab * spec.dim * (1 if spec.tied else 2) + norm
    total += spec.context * spec.dim * (spec.positions == "learned")
    for layer in spec.layers:
        a, m = layer.mixer, layer.ffn
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        total += spec.dim * (q + 2 * kv) + q * spec.dim + (2 + m.gated) * spec.dim * m.hidden + (4 if layer.post_norms else 2) * norm
        total += (q + 2 * kv) * a.qkv_bias + spec.dim * a.out_bias + 2 * a.head_dim * a.qk_norm
        total += ((1 + m.gated) * m.hidden + spec.dim) * m.bias
    return total


def forward_flops(spec: DecoderSpec, context: int) -> int:
    """Forward FLOPs for one token at position `context`: 2 per matrix weight used, and 4 H d per visible key."""
    total = 2 * spec.vocab * spec.dim
    for layer in spec.layers:
        a, m = layer.mixer, layer.ffn
        total += 2 * spec.dim * a.head_dim * (2 * a.heads + 2 * a.kv_heads) + 2 * (2 + m.gated) * spec.dim * m.hidden
        total += 4 * a.heads * a.head_dim * min(context, a.window or context)
    return total
