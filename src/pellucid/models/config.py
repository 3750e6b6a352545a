"""`config.json` read with both spellings (transformers 5 and older Hub files), written in the one of transformers 5."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from pellucid.errors import BadInput
from pellucid.nn.specs import Attn, DecoderSpec, DualChunk, MoE, Rope
from pellucid.ops import rope_attention_factor

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"  # the words of `layer_types`
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
YARN = ("attention_factor", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim", "original_max_position_embeddings")


class Config:
    """Access to a config.json with errors that name the field. null counts as absent, as in transformers."""

    def __init__(self, fields: dict[str, Any]):
        self.fields = fields

    def get(self, name: str, default: Any = None) -> Any:
        value = self.fields.get(name)
        return default if value is None else value

    def need(self, name: str, low: int = 1, high: int = 2**24) -> int:
        """A whole number that the architecture cannot do without, within sane limits."""
        value = self.fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise wrong(name, value, f"a whole number from {low} to {high}")
        return value

    def whole(self, name: str, default: int, low: int = 1, high: int = 2**31) -> int:
        """A whole number that may be absent."""
        return self.need(name, low, high) if self.get(name) is not None else default

    def number(self, name: str, default: float, low: float = 0.0, high: float = math.inf) -> float:
        return number(name, self.get(name, default), low, high)

    def one_of(self, name: str, default: str, choices: Collection[str]) -> str:
        value = self.get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise wrong(name, value, f"one of {', '.join(sorted(choices))}")
        return value

    @property
    def heads(self) -> int:
        return self.need("num_attention_heads", high=2**12)

    @property
    def kv_heads(self) -> int:
        kv = self.whole("num_key_value_heads", self.heads, high=self.heads)
        if self.heads % kv:
            raise BadInput(f"config.json: {self.heads} query heads cannot share {kv} key/value heads evenly")
        return kv

    @property
    def dim(self) -> int:
        return self.need("hidden_size", high=2**20)

    @property
    def layers(self) -> int:
        return self.need("num_hidden_layers", high=1000)

    def head_dim(self, default: int | None = None) -> int:
        return self.whole("head_dim", default or self.dim // self.heads, high=2**14)

    def experts(self, default: int) -> int:
        """How many: `num_experts` or `num_local_experts`; transformers itself reads the one and writes the other (Qwen3-MoE)."""
        return self.whole("num_experts" if self.get("num_experts") is not None else "num_local_experts", default, low=0, high=2**16)

    def window(self, default: int | None) -> int | None:
        """`sliding_window`. The one field where null is not absence: it means no window (Mistral 0.2 and later)."""
        if self.fields.get("sliding_window", default) is None:
            return None
        return self.whole("sliding_window", default or 0)

    def rope(
        self, head_dim: int, partial: bool = False, original: int | None = None, aliases: Mapping[str, str] | None = None,
        theta: float = 10_000.0,
    ) -> Rope:
        """`rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling` (older files).

        partial: whether this family may rotate only the first part of each head. original: the family's own default of
        `original_max_position_embeddings`, which stands outside of these fields then. aliases: its own words for kinds.
        theta: what it is where the file does not say.
        """
        fields = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(fields, dict):
            raise wrong("rope_parameters", fields, "an object")
        fields = {k: v for k, v in fields.items() if v is not None}
        theta = number("rope_theta", fields.get("rope_theta") or self.get("rope_theta", theta))
        turned = number("partial_rotary_factor", fields.get("partial_rotary_factor", self.get("partial_rotary_factor", 1)), high=1.1)
        dim = int(head_dim * turned)
        if (turned != 1 and not partial) or dim % 2 or not 0 < dim <= head_dim:
            raise BadInput(f"config.json asks to rotate {turned} of heads of {head_dim}",
                           "an even number of entries is supported" + ("" if partial else ", and only whole heads in this family"))
        kind = fields.get("rope_type") or fields.get("type") or "default"
        if aliases and isinstance(kind, str):
            kind = aliases.get(kind, kind)
        if not isinstance(kind, str) or kind not in SCALINGS:
            raise BadInput(f"config.json asks for rope_type {kind!r}", f"only {', '.join(SCALINGS)} are supported",
                           "use a checkpoint without it, or remove rope_scaling if you stay within the original context")
        context = self.whole("max_position_embeddings", 2048)
        known = self.get("original_max_position_embeddings", original) or fields.get("original_max_position_embeddings", context)
        fields = {**fields, "original_max_position_embeddings": context if kind == "dynamic" else known}
        if kind == "yarn":
            fields.setdefault("factor", context / number("original_max_position_embeddings", known))
        scaling = {"rope_type": kind, **SCALINGS[kind](fields, dim)} if kind != "default" else {}
        if (kind == "yarn" and theta <= 1) or (kind == "dynamic" and dim < 4):
            raise BadInput(f"config.json: rope_type {kind} has no meaning for rope_theta {theta} and {dim} rotated entries")
        return Rope(dim, theta, scaling=tuple(scaling.items()), attention_factor=rope_attention_factor(scaling, context))


def llama3(fields: dict[str, Any], dim: int) -> dict[str, Any]:
    scaling = {name: number(name, fields.get(name)) for name in LLAMA3}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise wrong("low_freq_factor", scaling["low_freq_factor"], "smaller than high_freq_factor")
    return dict(sorted(scaling.items()))


def yarn(fields: dict[str, Any], dim: int) -> dict[str, Any]:
    truncate = fields.get("truncate", True)
    if not isinstance(truncate, bool):
        raise wrong("truncate", truncate, "true or false")
    fields = {name: value for name, value in fields.items() if value != 0 or not name.startswith("mscale")}  # 0: as if absent
    numbers = {name: number(name, fields[name]) for name in YARN if name in fields}
    return {**numbers, **({"truncate": truncate} if "truncate" in fields else {})}


def longrope(fields: dict[str, Any], dim: int) -> dict[str, Any]:
    for name in ("short_factor", "long_factor"):
        if not isinstance(fields.get(name), list) or len(fields[name]) != dim // 2:
            raise wrong(name, fields.get(name), f"a list of {dim // 2} numbers")
    lists = {name: tuple(number(name, x) for x in fields[name]) for name in ("long_factor", "short_factor")}
    known = number("original_max_position_embeddings", fields["original_max_position_embeddings"], low=1.0)
    return {**lists, "original_max_position_embeddings": known,
            **{name: number(name, fields[name]) for name in ("attention_factor", "factor") if name in fields}}


SCALINGS: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
    "default": lambda fields, dim: {},
    "linear": lambda fields, dim: {"factor": number("factor", fields.get("factor"))},
    "dynamic": lambda fields, dim: {name: number(name, fields.get(name)) for name in ("factor", "original_max_position_embeddings")},
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}
"""Kind of position scaling -> its fields, checked; see `ops.rope_frequencies` for what they mean."""


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> float:
    """A finite number above `low` and below `high`; whole numbers stay int, so that they are written as they were read."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low < value < high:
        raise wrong(name, value, f"a number above {low:g}" + (f" and below {high:g}" if high < math.inf else ""))
    return value


def wrong(name: str, value: Any, must: str) -> BadInput:
    shown = repr(value)
    return BadInput(f"config.json: {name} is {shown[:60]}{'...' if len(shown) > 60 else ''}", f"it must be {must}",
                    "check that the folder is a complete Hugging Face checkpoint")


def experts_checked(moe: MoE) -> MoE:
    """The spec itself, if each token can be given that many of these experts."""
    if not 0 < moe.top_k <= moe.experts:
        raise BadInput(f"config.json: {moe.top_k} of {moe.experts} experts", "that cannot be chosen",
                       "check that the folder is a complete Hugging Face checkpoint")
    return moe


def with_dual_chunks(c: Config, spec: DecoderSpec) -> DecoderSpec:
    """The spec with what `dual_chunk_attention_config` says, if it is there (Qwen2.5-1M, Qwen3-2507's config_1m.json)."""
    stated = c.get("dual_chunk_attention_config")
    if stated is None:
        return spec
    if not isinstance(stated, dict):
        raise wrong("dual_chunk_attention_config", stated, "an object")
    fields = Config(stated)
    size, local = fields.need("chunk_size", high=2**31), fields.need("local_size", low=0, high=2**31)
    if 2 * local > size:
        raise wrong("dual_chunk_attention_config", stated, "of a local_size of half the chunk_size at most")
    reach = DualChunk(size, local, fields.whole("original_max_position_embeddings", 0, low=0))
    far = [isinstance(layer.mixer, Attn) and layer.mixer.window is None for layer in spec.layers]
    if not any(far):
        raise wrong("dual_chunk_attention_config", stated, "absent: this model has no attention that it would serve")
    return replace(spec, layers=tuple(
        replace(layer, mixer=replace(layer.mixer, reach=reach)) if chosen else layer for layer, chosen in zip(spec.layers, far, strict=True)))


def dual_chunk_fields(spec: Any) -> dict[str, Any]:
    """And back."""
    reach = next((r for layer in getattr(spec, "layers", ()) if isinstance(r := getattr(layer.mixer, "reach", None), DualChunk)), None)
    if reach is None:
        return {}
    return {"dual_chunk_attention_config": {"chunk_size": reach.size, "local_size": reach.local,
                                            "original_max_position_embeddings": reach.trained}}


def layer_types(c: Config, other: str = SLIDING) -> list[str] | None:
    """What `layer_types` says, if it is there: each layer full attention or this family's other kind."""
    kinds = c.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != c.layers or not all(kind in (FULL, other) for kind in kinds):
        raise wrong("layer_types", kinds, f"a list of {c.layers}, each {FULL} or {other}")
    return kinds


def rope_fields(rope: Rope) -> dict[str, Any]:
    scaling = {name: list(value) if isinstance(value, tuple) else value for name, value in rope.scaling}
    kind = scaling.pop("rope_type", "default")
    if kind == "dynamic":
        del scaling["original_max_position_embeddings"]  # it is max_position_embeddings for this kind
    return {"rope_type": kind, "rope_theta": rope.theta, **scaling}


def rotary_share(rope: Rope, head_dim: int) -> float:
    """`partial_rotary_factor`. Readers cut head_dim times it down: 44 * (30 / 44) is less than 30."""
    share = rope.dim / head_dim
    return share if int(head_dim * share) == rope.dim else math.nextafter(share, 1)


def shared_fields(spec: DecoderSpec) -> dict[str, Any]:
    """What nearly all decoders call the same."""
    mixer, ffn = spec.layers[0].mixer, spec.layers[0].ffn
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.dim,
        "intermediate_size": ffn.hidden,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "hidden_act": ffn.act,
        "rms_norm_eps": spec.eps,
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": spec.tied,
        "rope_parameters": rope_fields(mixer.rope),
    }


def head_dim_field(spec: DecoderSpec) -> dict[str, Any]:
    """`head_dim`, for configs that know the field only as an exception: nothing where it is D / H."""
    mixer = spec.layers[0].mixer
    return {} if mixer.head_dim * mixer.heads == spec.dim else {"head_dim": mixer.head_dim}


def window_fields(spec: DecoderSpec) -> dict[str, Any]:
    """Qwen's way to say which layers have a window; nothing where none has."""
    windows = [layer.mixer.window for layer in spec.layers]
    if not any(windows):
        return {}
    return {"use_sliding_window": True, "sliding_window": next(w for w in windows if w),
            "layer_types": [SLIDING if w else FULL for w in windows]}
