"""Specs: what a model is, as a small tree of frozen dataclasses.

`config.json` is read into specs once (models/); blocks are built from specs (`BUILD` in nn/build.py); the inspector
counts from them (nn/count.py). No block ever asks for a model's name: where two families differ, a field differs.

    mixers   Attn, MLA, GDN            what moves information between positions
    ffns     MLP, MoE                  what works on each position alone
    Layer    a mixer, perhaps cross-attention, an ffn, and how their results join the residual stream
    shapes   DecoderSpec, EncoderSpec, EncoderDecoderSpec, DualEncoderSpec
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from pellucid.ops import BY_LENGTH

Extra = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: rotated width `dim` (the first entries of a head; 0: none), base `theta`, `scaling` as in config.json's
    rope_parameters."""

    dim: int
    theta: float = 10_000.0
    interleaved: bool = False
    scaling: Extra = ()  # sorted items, so that a spec stays hashable and comparable
    attention_factor: float = 1.0  # cos and sin are multiplied by it (YaRN, LongRoPE)

    @property
    def scaling_dict(self) -> dict[str, Any]:
        return dict(self.scaling)

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length of the sequence."""
        return self.scaling_dict.get("rope_type") in BY_LENGTH

    @property
    def by_row(self) -> bool:
        """Whether each sequence of a batch has frequencies of its own length, which it keeps when it grows (Qwen v1)."""
        return self.scaling_dict.get("rope_type") == "qwen-ntk"

    @property
    def in_training(self) -> Rope:
        """Qwen v1 stretches its rotation in use only."""
        return replace(self, scaling=()) if self.by_row else self


# --- mixers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Streaming:
    """StreamingLLM (arXiv 2309.17453): only the first `sinks` tokens and the last `window` are kept, and positions are those
    inside the cache."""

    sinks: int = 4
    window: int = 1020


@dataclass(frozen=True)
class DualChunk:
    """Dual chunk attention (arXiv 2402.17463): no relative position exceeds `size`; `local` of them stay exact across a border."""

    size: int
    local: int
    trained: int = 0  # keys of a sequence of L tokens, more than these, are multiplied by 0.1 ln(L / trained) + 1; 0: never


@dataclass(frozen=True)
class Attn:
    """Attention with grouped key/value heads (MHA: kv_heads == heads; MQA: kv_heads == 1)."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head, before the rotation (Qwen3)
    window: int | None = None
    scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    causal: bool = True
    gate: bool = False  # the result is multiplied by sigmoid(gate x), entry by entry (Qwen3-Next)
    sinks: bool = False  # one logit a head joins the softmax and is then dropped (gpt-oss)
    logn: int = 0  # beyond so many keys, a query at position i is multiplied by log_logn(i) (Qwen v1); 0: never
    reach: Streaming | DualChunk | None = None  # a way to run beyond the trained context
    # Derived: whether cos and sin are more than those of position x frequency. A field, so that a fast path that does
    # not know it steps aside, as it does for any other.
    special_rope: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "special_rope", self.rope.by_length or self.rope.attention_factor != 1)


@dataclass(frozen=True)
class Indexer:
    """DeepSeek-V3.2's lightning indexer: small heads that choose the `top_k` keys which a query may see."""

    heads: int
    dim: int
    top_k: int


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads are made from one latent
    vector a token, beside one rotated key that all heads share."""

    heads: int
    q_rank: int | None  # width of the queries' own latent; None: queries are made from x at once
    kv_rank: int
    nope: int  # entries of a query or key head that are not rotated; they come first
    v_dim: int
    rope: Rope  # rope.dim entries of a head are rotated; they come last
    scale: float | None = None  # of the scores; None: 1 / sqrt(nope + rope.dim)
    bias: bool = False  # on q_a, kv_a and o
    eps: float = 1e-6  # of the latents' norms, whatever the model's own is
    indexer: Indexer | None = None


@dataclass(frozen=True)
class GDN:
    """Gated delta net (arXiv 2412.06464): linear attention with a state of v_heads x k_dim x v_dim that decays and is
    corrected by the delta rule; a short causal convolution comes before it."""

    k_heads: int
    v_heads: int  # each key head serves v_heads / k_heads consecutive value heads
    k_dim: int
    v_dim: int
    conv: int = 4


# --- feed-forward -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MLP:
    """Feed-forward: down(act(gate x) * up x), or without a gate down(act(up x))."""

    hidden: int
    act: str = "silu"
    bias: bool = False
    gated: bool = True


@dataclass(frozen=True)
class MoE:
    """Mixture of experts: each token goes to `top_k` of `experts` gated MLPs of width `hidden`, and to a shared one."""

    experts: int
    top_k: int
    hidden: int
    act: str = "silu"
    score: str = "softmax"  # over all experts; sigmoid: of each alone; top_k_softmax: over the chosen logits
    renormalize: bool = False  # the chosen weights are divided by their sum
    scale: float = 1.0  # of the routed sum
    groups: int = 1  # experts stand in groups, and only the best `top_groups` of them can be chosen from
    top_groups: int = 1
    group_score: str = "max"  # of a group: its best score; top2: the sum of its two best
    select_bias: bool = False  # a bias that counts for choosing, not for weighing (balancing without an auxiliary loss)
    wide_router: bool = False  # the router's product in float32 (DeepSeek)
    router_bias: bool = False
    expert_bias: bool = False
    clamp: tuple[float, float] | None = None  # (alpha, limit): gpt-oss's clamped gate
    shared: int = 0  # width of the expert that sees every token; 0: none
    shared_gate: bool = False  # it is multiplied by sigmoid(gate x)
    capacity: float | None = None  # tokens an expert takes at most in training, in shares of an even load; the others are dropped
    expert_choice: bool = False  # experts choose tokens (arXiv 2202.09368)
    held: tuple[int, int] | None = None  # of several processes this one has the experts from .. to; None: all
    # What keeps the experts busy in training, and changes no number of the model:
    aux_loss: float = field(default=0.0, compare=False)  # weight of the balance loss
    balance: str = field(default="switch", compare=False)  # switch: over all tokens and layers; sequence: DeepSeek-V3's, within each
    z_loss: float = field(default=0.0, compare=False)  # weight of the mean squared log sum exp of the router's logits
    bias_speed: float = field(default=0.001, compare=False)  # of the selection bias, a step (DeepSeek-V3: 0.001)


# --- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Residual:
    """One residual stream: x + f(x)."""


@dataclass(frozen=True)
class Layer:
    """order: pre: x + f(norm x); post: norm(x + f(x)); sandwich: x + norm(f(norm x)) (Gemma)."""

    mixer: Any  # Attn, MLA or GDN: what nn/build.py knows
    ffn: Any  # MLP or MoE
    order: str = "pre"
    cross: Attn | None = None  # attention to the encoder's output, between the two
    residual: Residual = Residual()


# --- shapes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderSpec:
    """A causal language model: embedding, layers, final norm, head (the embedding's own matrix when `tied`)."""

    vocab: int
    dim: int
    layers: tuple[Layer, ...]
    eps: float = 1e-6
    tied: bool = False
    context: int = 2048
    norm: str = "rms"  # of every norm outside attention: rms; rms_centred (weights are stored less 1, q and k too); rms_wide
    # (the weight is applied in float32); layer (with mean and bias)
    positions: str = "rope"  # or learned: a vector for each of `context` positions, added to the embedding
    embed_scale: float = 1.0  # of the embedding, in its own dtype; the tied head goes without
    mtp: tuple[Layer, ...] = ()  # multi-token prediction: a layer for each further token (DeepSeek-V3)
    mtp_loss: float = field(default=0.3, compare=False)  # their weight in training: 0.3 for most of DeepSeek-V3's, 0.1 at its end
    family: str = "qwen3"  # which function of models/ writes the config.json back
    extra: Extra = field(default=(), compare=False)  # config.json fields that change no number

    @property
    def limit(self) -> int:
        """Tokens that a sequence may have: the context, or as many as one likes where attention reaches beyond it."""
        far = [layer.mixer for layer in self.layers if isinstance(layer.mixer, MLA) or getattr(layer.mixer, "window", 0) is None]
        return 2**31 if far and all(getattr(mixer, "reach", None) for mixer in far) else self.context

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of float32 cache that one token leaves in all layers."""
        from pellucid.nn.count import cache_entries

        return 4 * sum(cache_entries(layer.mixer) for layer in self.layers)


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder: embeddings, layers, perhaps a pooler and a head. What its tokens see is in its layers (`Attn.causal`)."""

    vocab: int
    dim: int
    layers: tuple[Layer, ...]
    eps: float = 1e-12
    context: int = 512
    norm: str = "layer"
    positions: str = "learned"  # or rope: none are added
    token_types: int = 0
    embed_norm: bool = False  # a norm on the summed embeddings (BERT)
    final_norm: bool = False  # one more norm after the layers
    pooler: bool = False  # tanh(W x[0])
    head: str = ""  # mlm: a masked language model's; classifier: a logit for each of `labels` from the pooled output
    labels: tuple[str, ...] = ()
    family: str = "bert"
    extra: Extra = field(default=(), compare=False)


@dataclass(frozen=True)
class EncoderDecoderSpec:
    """The original Transformer (arXiv 1706.03762): an encoder, and a decoder whose layers also attend to its output."""

    vocab: int
    dim: int
    encoder: tuple[Layer, ...]
    decoder: tuple[Layer, ...]
    eps: float = 1e-5
    context: int = 512
    norm: str = "layer"
    positions: str = "sinusoid-halves"  # sines in the first half (Marian); sinusoid-pairs: interleaved, as in the paper
    embed_scale: float = 1.0
    final_norm: bool = False  # one more norm after each stack (torch.nn.Transformer)
    target_vocab: int = 0  # of a target embedding of its own; 0: source and target share one
    tied: bool = True  # the head is the target's embedding
    logits_bias: bool = False
    start: int = 0  # the token that a target begins with
    end: int = 0  # and the one that it ends with
    family: str = "marian"
    extra: Extra = field(default=(), compare=False)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Those that write, and that a cache belongs to."""
        return self.decoder


@dataclass(frozen=True)
class VisionSpec:
    """A vision transformer: `image` x `image` pixels in patches of `patch`, behind one class token."""

    dim: int
    layers: tuple[Layer, ...]
    image: int
    patch: int
    channels: int = 3
    eps: float = 1e-5
    norm: str = "layer"

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class DualEncoderSpec:
    """CLIP (arXiv 2103.00020): a text and a vision tower, projected into one space of `dim` entries."""

    text: EncoderSpec
    vision: VisionSpec
    dim: int
    pool_at: int  # the end token, at whose first place a text is read; 2: at the largest id (old files)
    family: str = "clip"
    extra: Extra = field(default=(), compare=False)


Spec = DecoderSpec | EncoderSpec | EncoderDecoderSpec | DualEncoderSpec
