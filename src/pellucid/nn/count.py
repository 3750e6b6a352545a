"""What a spec costs, counted from the spec alone: parameters, cache, arithmetic. No model is built.

Each kind of part has one function in `PARTS`. D: model width. "Matrix weights" are those that a token is multiplied by:
2 FLOPs each; what a mixer computes beside them depends on how many keys a token sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pellucid.nn.specs import (
    GDN,
    MLA,
    MLP,
    Attn,
    DecoderSpec,
    DualEncoderSpec,
    EncoderDecoderSpec,
    EncoderSpec,
    Layer,
    MoE,
    Streaming,
    VisionSpec,
)
from pellucid.ops.cache_codes import CacheCodes


@dataclass(frozen=True)
class Count:
    """Of one part of a layer.

    matrices: parameters in products; vectors: the others (norms, biases).  active: matrix weights that one token meets
    (fewer than `matrices` with experts).  entries: cached numbers a token leaves;  state: numbers kept whatever the length.
    """

    matrices: int
    vectors: int = 0
    active: int | None = None
    entries: int = 0
    state: int = 0

    @property
    def parameters(self) -> int:
        return self.matrices + self.vectors

    @property
    def active_matrices(self) -> int:
        return self.matrices if self.active is None else self.active


def attn(a: Attn, D: int) -> Count:
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    vectors = (q * (1 + a.gate) + 2 * kv) * a.qkv_bias + D * a.out_bias + 2 * a.head_dim * a.qk_norm + a.heads * a.sinks
    kept = reach_of(a)
    return Count(D * (q * (1 + a.gate) + 2 * kv) + q * D, vectors, entries=0 if kept else 2 * kv, state=2 * kv * kept)


def reach_of(a: Attn) -> int:
    """Tokens that a cache of constant size keeps; 0 where it grows."""
    return a.reach.sinks + a.reach.window if isinstance(a.reach, Streaming) else 0


def mla(a: MLA, D: int) -> Count:
    head, r = a.nope + a.rope.dim, a.rope.dim
    queries = D * a.heads * head if a.q_rank is None else D * a.q_rank + a.q_rank * a.heads * head
    matrices = queries + D * (a.kv_rank + r) + a.kv_rank * a.heads * (a.nope + a.v_dim) + a.heads * a.v_dim * D
    vectors = a.kv_rank + (a.q_rank or 0) + a.bias * ((a.q_rank or 0) + a.kv_rank + r + D)
    entries = a.kv_rank + r
    if a.indexer is not None:
        i = a.indexer
        matrices += (a.q_rank or 0) * i.heads * i.dim + D * i.dim + D * i.heads
        vectors, entries = vectors + 2 * i.dim, entries + i.dim
    return Count(matrices, vectors, entries=entries)


def gdn(a: GDN, D: int) -> Count:
    k, v = a.k_heads * a.k_dim, a.v_heads * a.v_dim
    channels = 2 * k + v
    return Count(D * (channels + v + 2 * a.v_heads) + v * D, channels * a.conv + 2 * a.v_heads + a.v_dim,
                 state=a.v_heads * a.k_dim * a.v_dim + channels * (a.conv - 1))


def mlp(m: MLP, D: int) -> Count:
    return Count((2 + m.gated) * D * m.hidden, ((1 + m.gated) * m.hidden + D) * m.bias)


def moe(m: MoE, D: int) -> Count:
    expert, shared = 3 * D * m.hidden, 3 * D * m.shared + D * m.shared_gate
    vectors = m.experts * (m.select_bias + m.router_bias) + m.experts * (2 * m.hidden + D) * m.expert_bias
    return Count(m.experts * expert + m.experts * D + shared, vectors, m.top_k * expert + m.experts * D + shared)


PARTS: dict[type, Callable[[Any, int], Count]] = {Attn: attn, MLA: mla, GDN: gdn, MLP: mlp, MoE: moe}


def count(part: Any, dim: int) -> Count:
    """What one mixer or feed-forward of a model of that width costs."""
    return PARTS[type(part)](part, dim)


def cache_shapes(mixer: Any) -> list[tuple[int, int]]:
    """(heads, width) of each tensor that the mixer's cache keeps for every token."""
    if isinstance(mixer, Attn):
        return [] if reach_of(mixer) else [(mixer.kv_heads, mixer.head_dim)] * 2
    if isinstance(mixer, MLA):
        indexer = [] if mixer.indexer is None else [(1, mixer.indexer.dim)]
        return [(1, mixer.kv_rank), (1, mixer.rope.dim), *indexer]
    return []


def cache_entries(mixer: Any) -> int:
    """Numbers that one token leaves in the mixer's cache."""
    return sum(heads * width for heads, width in cache_shapes(mixer))


def cache_bytes(mixer: Any, codes: CacheCodes) -> int:
    """Bytes that one token leaves in the mixer's cache, kept in that format."""
    return sum(codes.bytes(heads, width) for heads, width in cache_shapes(mixer))


def layer_norms(layer: Layer, norm: int) -> int:
    """Parameters of the norms of one layer outside its mixer; norm: those of one norm."""
    return norm * ((4 if layer.order == "sandwich" else 2) + (layer.cross is not None))


def count_parameters(spec: Any) -> int:
    """Parameters (a tied head counted once) of a shape, from its spec alone; equals the built model's own count."""
    return SHAPES[type(spec)](spec)


def decoder_parameters(spec: DecoderSpec) -> int:
    total = spec.vocab * spec.dim * (1 if spec.tied else 2) + norm_parameters(spec)
    total += spec.context * spec.dim * (spec.positions == "learned")
    return total + stack_parameters(spec.layers, spec) + mtp_parameters(spec)


def encoder_parameters(spec: EncoderSpec) -> int:
    D, norm, V, C = spec.dim, norm_parameters(spec), spec.vocab, len(spec.labels)
    rows = V + spec.context * (spec.positions == "learned") + spec.token_types
    head = {"": 0, "mlm": D * D + D + norm + V, "classifier": C * D + C}[spec.head]
    return rows * D + norm * (spec.embed_norm + spec.final_norm) + stack_parameters(spec.layers, spec) + (D * D + D) * spec.pooler + head


def encoder_decoder_parameters(spec: EncoderDecoderSpec) -> int:
    V = spec.target_vocab or spec.vocab
    rows = spec.vocab + spec.target_vocab + V * (not spec.tied)
    stacks = stack_parameters(spec.encoder, spec) + stack_parameters(spec.decoder, spec)
    return rows * spec.dim + V * spec.logits_bias + stacks + 2 * norm_parameters(spec) * spec.final_norm


def vision_parameters(spec: VisionSpec) -> int:
    entries = spec.channels * spec.patch**2 + 1 + 1 + spec.patches  # of each: a patch's matrix, the class token, the positions
    return entries * spec.dim + 2 * norm_parameters(spec) + stack_parameters(spec.layers, spec)


def dual_encoder_parameters(spec: DualEncoderSpec) -> int:
    towers = encoder_parameters(spec.text) + vision_parameters(spec.vision)
    return towers + spec.dim * (spec.text.dim + spec.vision.dim) + 1


SHAPES: dict[type, Callable[[Any], int]] = {
    DecoderSpec: decoder_parameters, EncoderSpec: encoder_parameters, EncoderDecoderSpec: encoder_decoder_parameters,
    VisionSpec: vision_parameters, DualEncoderSpec: dual_encoder_parameters}


def norm_parameters(spec: Any) -> int:
    """Those of one norm of the residual stream."""
    return int(spec.dim) * (2 if spec.norm == "layer" else 1)


def stack_parameters(layers: tuple[Layer, ...], spec: Any) -> int:
    return sum(layer_parameters(layer, spec.dim, norm_parameters(spec)) for layer in layers)


def mtp_parameters(spec: DecoderSpec) -> int:
    """Those of the layers of multi-token prediction, which share embedding and head with the model."""
    return stack_parameters(spec.mtp, spec) + len(spec.mtp) * (2 * spec.dim**2 + 3 * norm_parameters(spec))


def layer_parameters(layer: Layer, dim: int, norm: int) -> int:
    parts = [p for p in (layer.mixer, layer.cross, layer.ffn) if p is not None]
    return sum(count(part, dim).parameters for part in parts) + layer_norms(layer, norm)


def mixing_flops(mixer: Any, context: int) -> int:
    """Forward FLOPs of one token at position `context` beside the products with weights."""
    if isinstance(mixer, Attn):
        return 4 * mixer.heads * mixer.head_dim * min(context, mixer.window or reach_of(mixer) or context)
    if isinstance(mixer, MLA):  # in the absorbed form: scores against latent and rotated key, then a sum of latents
        seen = context if mixer.indexer is None else min(context, mixer.indexer.top_k)
        index = 0 if mixer.indexer is None else 2 * mixer.indexer.heads * mixer.indexer.dim * context
        return 2 * mixer.heads * (2 * mixer.kv_rank + mixer.rope.dim) * seen + index
    return 8 * mixer.v_heads * mixer.k_dim * mixer.v_dim  # decay, read, write, read


def forward_flops(spec: DecoderSpec | EncoderSpec | EncoderDecoderSpec | DualEncoderSpec, context: int) -> int:
    """Forward FLOPs for one token that sees `context` tokens, itself included: 2 per matrix weight used, and the mixers' own.

    Of an encoder without what it does once a text, however long: a pooler, a classifier. Of an encoder-decoder: a written token
    and a source token together, each of them seeing `context` tokens of either side that it attends to. Of two encoders: a
    token of text (see `image_flops`), without the projection of the whole text.
    """
    spec = spec.text if isinstance(spec, DualEncoderSpec) else spec
    if isinstance(spec, EncoderSpec):
        total = 2 * (spec.vocab + spec.dim) * spec.dim * (spec.head == "mlm")
    else:
        total = 2 * (getattr(spec, "target_vocab", 0) or spec.vocab) * spec.dim
    stacks = (*spec.encoder, *spec.decoder) if isinstance(spec, EncoderDecoderSpec) else spec.layers
    return total + layer_flops(stacks, spec.dim, context)


def layer_flops(layers: tuple[Layer, ...], dim: int, context: int) -> int:
    """Those of one token in these layers."""
    total = 0
    for layer in layers:
        total += 2 * sum(count(part, dim).active_matrices for part in (layer.mixer, layer.cross, layer.ffn) if part is not None)
        total += sum(mixing_flops(mixer, context) for mixer in (layer.mixer, layer.cross) if mixer is not None)
    return total


def image_flops(spec: DualEncoderSpec) -> int:
    """Forward FLOPs of one image: its patches' matrix, the layers, the projection into the space of texts."""
    v = spec.vision
    tokens = v.patches + 1  # the class token
    patches = 2 * v.channels * v.patch**2 * v.dim * v.patches
    return patches + tokens * layer_flops(v.layers, v.dim, tokens) + 2 * v.dim * spec.dim
