"""`config.json` read with both spellings (transformers 5 and older Hub files), written in the one of transformers 5."""

from __future__ import annotations

from typing import Any

from pellucid.errors import BadInput
from pellucid.nn.specs import Rope


class Config:
    """Attribute access to a config.json with errors that name the field."""

    def __init__(self, fields: dict[str, Any]):
        self.fields = fields

    def get(self, name: str, default: Any = None) -> Any:
        value = self.fields.get(name)
        return default if value is None else value

    def need(self, name: str, low: int = 1, high: int = 2**31) -> int:
        """A whole number that the architecture cannot do without, within sane limits."""
        value = self.fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise BadInput(
                f"config.json: {name} is {value!r}", f"it must be a whole number from {low} to {high}",
                "check that the folder is a complete Hugging Face checkpoint")
        return value

    @property
    def heads(self) -> int:
        return self.need("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        kv = self.get("num_key_value_heads", self.heads)
        if self.heads % kv:
            raise BadInput(f"config.json: {self.heads} query heads cannot share {kv} key/value heads evenly")
        return kv

    def head_dim(self, default: int | None = None) -> int:
        return self.get("head_dim") or default or self.need("hidden_size") // self.heads

    def rope(self, dim: int) -> Rope:
        """`rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling` (older files)."""
        scaling = dict(self.get("rope_parameters") or self.get("rope_scaling") or {})
        theta = scaling.pop("rope_theta", None) or self.get("rope_theta", 10_000.0)
        kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
        scaling.pop("type", None)
        if kind not in ("default", "linear", "llama3"):
            raise BadInput(
                f"config.json asks for rope_type {kind!r}", "only default, linear and llama3 are supported so far",
                "use a checkpoint without it, or remove rope_scaling if you stay within the original context")
        if kind == "default":
            return Rope(dim, float(theta))
        if kind == "llama3":
            scaling.setdefault("original_max_position_embeddings", self.need("max_position_embeddings"))
        return Rope(dim, float(theta), scaling=(("rope_type", kind), *sorted(scaling.items())))


def rope_fields(rope: Rope) -> dict[str, Any]:
    scaling = rope.scaling_dict
    return {"rope_type": scaling.pop("rope_type", "default"), "rope_theta": rope.theta, **scaling}
