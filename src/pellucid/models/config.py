"""`config.json` read with both spellings (transformers 5 and older Hub files), written in the one of transformers 5."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from pellucid.errors import BadInput
from pellucid.nn.specs import Rope

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
