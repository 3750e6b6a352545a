"""Names as data: which Hub tensors fill each of our parameters.

A table maps our parameter name to the Hub names whose tensors, stacked by rows, make it up; `{i}` is the layer.
Loading pulls along the table, saving walks it backwards, and "missing" and "unused" are exact because both lists come
from it.

    >>> expand({"layers.{i}.mixer.qkv.weight": ("model.layers.{i}.q.weight", "model.layers.{i}.k.weight")}, 1)
    {'layers.0.mixer.qkv.weight': ('model.layers.0.q.weight', 'model.layers.0.k.weight')}
"""

from __future__ import annotations

from collections.abc import Mapping

Names = Mapping[str, tuple[str, ...]]

LLAMA: Names = {
    "embed.weight": ("model.embed_tokens.weight",),
    "layers.{i}.norm1.weight": ("model.layers.{i}.input_layernorm.weight",),
    **{
        f"layers.{{i}}.mixer.qkv.{w}": tuple(f"model.layers.{{i}}.self_attn.{x}_proj.{w}" for x in "qkv")
        for w in ("weight", "bias")
    },
    **{f"layers.{{i}}.mixer.o.{w}": (f"model.layers.{{i}}.self_attn.o_proj.{w}",) for w in ("weight", "bias")},
    "layers.{i}.mixer.q_norm.weight": ("model.layers.{i}.self_attn.q_norm.weight",),
    "layers.{i}.mixer.k_norm.weight": ("model.layers.{i}.self_attn.k_norm.weight",),
    "layers.{i}.norm2.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
    **{
        f"layers.{{i}}.ffn.gate_up.{w}": tuple(f"model.layers.{{i}}.mlp.{x}_proj.{w}" for x in ("gate", "up"))
        for w in ("weight", "bias")
    },
    **{f"layers.{{i}}.ffn.down.{w}": (f"model.layers.{{i}}.mlp.down_proj.{w}",) for w in ("weight", "bias")},
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
}
"""Llama's names, shared by Mistral and every Qwen since 1.5. Rows that a model lacks are simply not asked for."""


def expand(names: Names, layers: int) -> dict[str, tuple[str, ...]]:
    """The table with `{i}` written out for every layer."""
    table: dict[str, tuple[str, ...]] = {}
    for ours, theirs in names.items():
        for i in range(layers) if "{i}" in ours else [0]:
            table[ours.replace("{i}", str(i))] = tuple(t.replace("{i}", str(i)) for t in theirs)
    return table
