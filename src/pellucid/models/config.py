"""`config.json` read with both spellings (transformers 5 and older Hub files), written in the one of transformers 5."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from pellucid.errors import BadInput
from pellucid.nn.specs import DecoderSpec, Rope

FULL, SLIDING = "full_attention", "sliding_attention"  # the words of `layer_types`
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


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

    def window(self, default: int | None) -> int | None:
        """`sliding_window`. The one field where null is not absence: it means no window (Mistral 0.2 and later)."""
        if self.fields.get("sliding_window", default) is None:
            return None
        return self.whole("sliding_window", default or 0)

    def rope(self, dim: int) -> Rope:
        """`rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling` (older files)."""
        fields = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(fields, dict):
            raise wrong("rope_parameters", fields, "an object")
        theta = number("rope_theta", fields.get("rope_theta") or self.get("rope_theta", 10_000.0))
        kind = fields.get("rope_type") or fields.get("type") or "default"
        turned = fields.get("partial_rotary_factor") or self.get("partial_rotary_factor", 1)
        if turned != 1 or dim % 2:
            raise BadInput(f"config.json asks to rotate {turned} of heads of {dim}", "only whole heads of even size are supported")
        if kind == "default":
            return Rope(dim, theta)
        if kind == "linear":
            return Rope(dim, theta, scaling=(("rope_type", kind), ("factor", number("factor", fields.get("factor")))))
        if kind == "llama3":
            known = {"original_max_position_embeddings": self.get("max_position_embeddings"), **fields}
            scaling = {name: number(name, known.get(name)) for name in LLAMA3}
            if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
                raise wrong("low_freq_factor", scaling["low_freq_factor"], "smaller than high_freq_factor")
            return Rope(dim, theta, scaling=(("rope_type", kind), *sorted(scaling.items())))
        raise BadInput(
            f"config.json asks for rope_type {kind!r}", "only default, linear and llama3 are supported so far",
            "use a checkpoint without it, or remove rope_scaling if you stay within the original context")


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> float:
    """A finite number above `low` and below `high`; whole numbers stay int, so that they are written as they were read."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low < value < high:
        raise wrong(name, value, f"a number above {low:g}" + (f" and below {high:g}" if high < math.inf else ""))
    return value


def wrong(name: str, value: Any, must: str) -> BadInput:
    shown = repr(value)
    return BadInput(f"config.json: {name} is {shown[:60]}{'...' if len(shown) > 60 else ''}", f"it must be {must}",
                    "check that the folder is a complete Hugging Face checkpoint")


def rope_fields(rope: Rope) -> dict[str, Any]:
    scaling = rope.scaling_dict
    return {"rope_type": scaling.pop("rope_type", "default"), "rope_theta": rope.theta, **scaling}


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
