"""Names as data: which Hub tensors fill each of our parameters.

A table maps our parameter name to the Hub names whose tensors, stacked by rows, make it up; `{i}` is the layer. One
name for a matrix that we stack from several parts means that the Hub stores the stack. A name that ends in `^T` stands
for a tensor that the Hub stores transposed. Loading pulls along the table, saving walks it backwards, and "missing" and
"unused" are exact because both lists come from it.

    >>> expand({"layers.{i}.mixer.qkv.weight": ("model.layers.{i}.q.weight", "model.layers.{i}.k.weight")}, 1)
    {'layers.0.mixer.qkv.weight': ('model.layers.0.q.weight', 'model.layers.0.k.weight')}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

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


PHI3: Names = {
    **LLAMA,
    "layers.{i}.mixer.qkv.weight": ("model.layers.{i}.self_attn.qkv_proj.weight",),
    "layers.{i}.ffn.gate_up.weight": ("model.layers.{i}.mlp.gate_up_proj.weight",),
}

GEMMA3: Names = {
    **LLAMA,
    "layers.{i}.post1.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
    "layers.{i}.norm2.weight": ("model.layers.{i}.pre_feedforward_layernorm.weight",),
    "layers.{i}.post2.weight": ("model.layers.{i}.post_feedforward_layernorm.weight",),
}

GPT2: Names = {
    "embed.weight": ("transformer.wte.weight",),
    "positions.weight": ("transformer.wpe.weight",),
    **{
        f"layers.{{i}}.{ours}.{w}": (f"transformer.h.{{i}}.{theirs}.{w}{transposed if w == 'weight' else ''}",)
        for ours, theirs, transposed in (
            ("norm1", "ln_1", ""), ("mixer.qkv", "attn.c_attn", "^T"), ("mixer.o", "attn.c_proj", "^T"),
            ("norm2", "ln_2", ""), ("ffn.up", "mlp.c_fc", "^T"), ("ffn.down", "mlp.c_proj", "^T"))
        for w in ("weight", "bias")
    },
    **{f"norm.{w}": (f"transformer.ln_f.{w}",) for w in ("weight", "bias")},
    "head.weight": ("lm_head.weight",),
}
"""Its matrices stand as (in, out), because TensorFlow's did."""


def expand(names: Names, layers: int) -> dict[str, tuple[str, ...]]:
    """The table with `{i}` written out for every layer."""
    table: dict[str, tuple[str, ...]] = {}
    for ours, theirs in names.items():
        for i in range(layers) if "{i}" in ours else [0]:
            table[ours.replace("{i}", str(i))] = tuple(t.replace("{i}", str(i)) for t in theirs)
    return table


@dataclass(frozen=True)
class Piece:
    """The tensor `name` of the Hub: the rows from `start` to `stop` of a parameter of ours, perhaps transposed."""

    name: str
    start: int
    stop: int
    transposed: bool

    def of(self, parameter: Tensor) -> Tensor:
        """The view of our parameter (or of its gradient) that looks like the Hub's tensor; writing into it loads."""
        rows = parameter[self.start : self.stop]
        return rows.T if self.transposed else rows


def pieces(names: tuple[str, ...], parts: tuple[int, ...]) -> list[Piece]:
    """parts: the row counts of what we stack."""
    if len(names) == 1:
        parts = (sum(parts),)
    starts = [sum(parts[:i]) for i in range(len(parts))]
    return [Piece(name.removesuffix("^T"), start, start + rows, name.endswith("^T"))
            for name, start, rows in zip(names, starts, parts, strict=True)]
