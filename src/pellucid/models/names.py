"""Names as data: which Hub tensors fill each of our parameters.

A table maps our parameter name to the Hub names whose tensors, stacked by rows, make it up. Loading pulls along the
table, saving walks it backwards, and "missing" and "unused" are exact because both lists come from it.

    ("a", "b", "c")      the k-th name fills the k-th of the parts that our module stacks; a single name fills all of them
    "a[0:3]", "a[0,3]"   the name fills these of our parts
    "a^T"                the Hub stores it transposed
    "a^grouped"          the rows of its parts stand together head by head (`groups` of our module): first head's q, k, v, ...
    "a^interleaved"      the rows of its parts alternate (gpt-oss: gate, up, gate, up, ...)
    "x.{e}.y"            one tensor an expert, the first dimension of our parameter
    [("a", "b"), ("c",)] alternatives: loading takes the first of which the file has all, saving writes the first
    {i}, {n}             the number of the layer; the same counted behind the main layers (multi-token prediction)

Rows are the last dimension but one of a matrix, and the only one of a vector; with experts, of each expert's.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

Entry = tuple[str, ...] | list[tuple[str, ...]]
Names = Mapping[str, Entry]

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

def _experts(router: str, expert: str, parts: tuple[str, str, str], fused: str) -> Names:
    """One tensor an expert: gate, up and down; or all of them in one, as transformers holds them in memory."""
    gate, up, down = (f"{expert}.{{e}}.{part}.weight" for part in parts)
    return {
        "layers.{i}.ffn.router.weight": [(f"{router}.weight",), (f"{fused}.gate.weight",)],
        "layers.{i}.ffn.experts.gate_up.weight": [(gate, up), (f"{fused}.experts.gate_up_proj",)],
        "layers.{i}.ffn.experts.down.weight": [(down,), (f"{fused}.experts.down_proj",)],
    }


MIXTRAL: Names = {
    **LLAMA,
    **_experts("model.layers.{i}.block_sparse_moe.gate", "model.layers.{i}.block_sparse_moe.experts", ("w1", "w3", "w2"), "model.layers.{i}.mlp"),
}

QWEN_MOE: Names = {
    **LLAMA,
    **_experts("model.layers.{i}.mlp.gate", "model.layers.{i}.mlp.experts", ("gate_proj", "up_proj", "down_proj"), "model.layers.{i}.mlp"),
    "layers.{i}.ffn.shared.gate_up.weight": tuple(f"model.layers.{{i}}.mlp.shared_expert.{x}_proj.weight" for x in ("gate", "up")),
    "layers.{i}.ffn.shared.down.weight": ("model.layers.{i}.mlp.shared_expert.down_proj.weight",),
    "layers.{i}.ffn.shared_gate.weight": ("model.layers.{i}.mlp.shared_expert_gate.weight",),
}

GPT_OSS: Names = {
    **LLAMA,
    "layers.{i}.mixer.sinks": ("model.layers.{i}.self_attn.sinks",),
    **{f"layers.{{i}}.ffn.router.{w}": (f"model.layers.{{i}}.mlp.router.{w}",) for w in ("weight", "bias")},
    "layers.{i}.ffn.experts.gate_up.weight": ("model.layers.{i}.mlp.experts.gate_up_proj^T^interleaved",),
    "layers.{i}.ffn.experts.gate_up.bias": ("model.layers.{i}.mlp.experts.gate_up_proj_bias^interleaved",),
    "layers.{i}.ffn.experts.down.weight": ("model.layers.{i}.mlp.experts.down_proj^T",),
    "layers.{i}.ffn.experts.down.bias": ("model.layers.{i}.mlp.experts.down_proj_bias",),
}


LATENT = {
    "q": "q_proj", "q_a": "q_a_proj", "q_norm": "q_a_layernorm", "q_b": "q_b_proj", "kv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm",
    "kv_b": "kv_b_proj", "o": "o_proj", "indexer.q": "indexer.wq_b", "indexer.k": "indexer.wk", "indexer.k_norm": "indexer.k_norm",
    "indexer.weights": "indexer.weights_proj"}

DEEPSEEK_LAYER: Names = {
    **{name: entry for name, entry in LLAMA.items() if name.startswith("layers.") and "mixer" not in name},
    **{f"layers.{{i}}.mixer.{ours}.{w}": (f"model.layers.{{i}}.self_attn.{theirs}.{w}",) for ours, theirs in LATENT.items() for w in ("weight", "bias")},
    **_experts("model.layers.{i}.mlp.gate", "model.layers.{i}.mlp.experts", ("gate_proj", "up_proj", "down_proj"), "model.layers.{i}.mlp"),
    "layers.{i}.ffn.router.select_bias": ("model.layers.{i}.mlp.gate.e_score_correction_bias",),
    "layers.{i}.ffn.shared.gate_up.weight": tuple(f"model.layers.{{i}}.mlp.shared_experts.{x}_proj.weight" for x in ("gate", "up")),
    "layers.{i}.ffn.shared.down.weight": ("model.layers.{i}.mlp.shared_experts.down_proj.weight",),
}


def _behind(layer: Names) -> Names:
    """The same for layers that are counted behind the main ones."""
    def moved(choice: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(source.replace("{i}", "{n}") for source in choice)

    return {name.replace("layers.{i}.", "mtp.{i}.block.", 1): [moved(choice) for choice in entry] if isinstance(entry, list) else moved(entry)
            for name, entry in layer.items()}


DEEPSEEK: Names = {
    **{name: entry for name, entry in LLAMA.items() if not name.startswith("layers.")},
    **DEEPSEEK_LAYER,
    **_behind(DEEPSEEK_LAYER),
    "mtp.{i}.norm_embedded.weight": ("model.layers.{n}.enorm.weight",),
    "mtp.{i}.norm_hidden.weight": ("model.layers.{n}.hnorm.weight",),
    "mtp.{i}.join.weight": ("model.layers.{n}.eh_proj.weight",),
    "mtp.{i}.norm.weight": ("model.layers.{n}.shared_head.norm.weight",),
}
"""V2, V3 and V3.2; the layers of multi-token prediction are counted behind the others."""


def _hybrid(*projections: str) -> Names:
    """Layers of two kinds: gated attention, and the gated delta net with these projections."""
    attention, delta = "model.layers.{i}.self_attn.", "model.layers.{i}.linear_attn."
    own = {"in_proj.weight": projections, "conv": ("conv1d.weight",), "A_log": ("A_log",), "dt_bias": ("dt_bias",),
           "norm.weight": ("norm.weight",), "out.weight": ("out_proj.weight",)}
    return {
        **QWEN_MOE,
        **{f"layers.{{i}}.mixer.qkv.{w}": (f"{attention}q_proj.{w}[0,3]^grouped", f"{attention}k_proj.{w}", f"{attention}v_proj.{w}")
           for w in ("weight", "bias")},
        **{f"layers.{{i}}.mixer.{ours}": tuple(delta + name for name in theirs) for ours, theirs in own.items()},
    }


QWEN3_NEXT = _hybrid("in_proj_qkvz.weight[0:4]^grouped", "in_proj_ba.weight[4,5]^grouped")
QWEN3_5 = {
    name: entry[::-1] if isinstance(entry, list) else entry
    for name, entry in _hybrid("in_proj_qkv.weight[0:3]", "in_proj_z.weight[3]", "in_proj_b.weight[4]", "in_proj_a.weight[5]").items()}
"""On the Hub its experts stand in one tensor."""


QWEN1: Names = {
    "embed.weight": ("transformer.wte.weight",),
    **{
        f"layers.{{i}}.{ours}.{w}": tuple(f"transformer.h.{{i}}.{name}.{w}" for name in theirs)
        for ours, theirs in (
            ("norm1", ("ln_1",)), ("mixer.qkv", ("attn.c_attn",)), ("mixer.o", ("attn.c_proj",)), ("norm2", ("ln_2",)),
            ("ffn.gate_up", ("mlp.w2", "mlp.w1")), ("ffn.down", ("mlp.c_proj",)))  # w2 is the gate
        for w in ("weight", "bias")
    },
    "norm.weight": ("transformer.ln_f.weight",),
    "head.weight": ("lm_head.weight",),
}
"""GPT-2's words, but its matrices stand as they are multiplied."""


BERT: Names = {
    "embed.weight": ("bert.embeddings.word_embeddings.weight",),
    "positions.weight": ("bert.embeddings.position_embeddings.weight",),
    "types.weight": ("bert.embeddings.token_type_embeddings.weight",),
    **{
        f"layers.{{i}}.mixer.qkv.{w}": tuple(f"bert.encoder.layer.{{i}}.attention.self.{x}.{w}" for x in ("query", "key", "value"))
        for w in ("weight", "bias")
    },
    **{
        f"{ours}.{w}": (f"{theirs}.{w}",)
        for ours, theirs in (
            ("embed_norm", "bert.embeddings.LayerNorm"),
            ("layers.{i}.mixer.o", "bert.encoder.layer.{i}.attention.output.dense"),
            ("layers.{i}.norm1", "bert.encoder.layer.{i}.attention.output.LayerNorm"),
            ("layers.{i}.ffn.up", "bert.encoder.layer.{i}.intermediate.dense"),
            ("layers.{i}.ffn.down", "bert.encoder.layer.{i}.output.dense"),
            ("layers.{i}.norm2", "bert.encoder.layer.{i}.output.LayerNorm"),
            ("pooler", "bert.pooler.dense"), ("head.dense", "cls.predictions.transform.dense"),
            ("head.norm", "cls.predictions.transform.LayerNorm"), ("classifier", "classifier"))
        for w in ("weight", "bias")
    },
    "head.bias": [("cls.predictions.bias",), ("cls.predictions.decoder.bias",)],
}

CLIP: Names = {
    "text.embed.weight": ("text_model.embeddings.token_embedding.weight",),
    "text.positions.weight": ("text_model.embeddings.position_embedding.weight",),
    "vision.patches.weight": ("vision_model.embeddings.patch_embedding.weight",),
    "vision.first": ("vision_model.embeddings.class_embedding",),
    "vision.positions.weight": ("vision_model.embeddings.position_embedding.weight",),
    **{
        f"{tower}.layers.{{i}}.mixer.qkv.{w}": tuple(f"{tower}_model.encoder.layers.{{i}}.self_attn.{x}_proj.{w}" for x in "qkv")
        for tower in ("text", "vision") for w in ("weight", "bias")
    },
    **{
        f"{tower}.layers.{{i}}.{ours}.{w}": (f"{tower}_model.encoder.layers.{{i}}.{theirs}.{w}",)
        for tower in ("text", "vision")
        for ours, theirs in (("norm1", "layer_norm1"), ("mixer.o", "self_attn.out_proj"), ("norm2", "layer_norm2"),
                             ("ffn.up", "mlp.fc1"), ("ffn.down", "mlp.fc2"))
        for w in ("weight", "bias")
    },
    **{
        f"{ours}.{w}": (f"{theirs}.{w}",)
        for ours, theirs in (("text.norm", "text_model.final_layer_norm"), ("vision.norm", "vision_model.post_layernorm"),
                             ("vision.embed_norm", "vision_model.pre_layrnorm"))  # the real name
        for w in ("weight", "bias")
    },
    "text_projection.weight": ("text_projection.weight",),
    "image_projection.weight": ("visual_projection.weight",),
    "logit_scale": ("logit_scale",),
}

MARIAN: Names = {
    "embed.weight": ("model.shared.weight",),
    "target_embed.weight": ("model.decoder.embed_tokens.weight",),
    **{
        f"{side}.layers.{{i}}.{ours}.{w}": tuple(f"model.{side}.layers.{{i}}.{name}.{w}" for name in theirs)
        for side in ("encoder", "decoder")
        for ours, theirs in (
            ("mixer.qkv", [f"self_attn.{x}_proj" for x in "qkv"]), ("mixer.o", ["self_attn.out_proj"]),
            ("norm1", ["self_attn_layer_norm"]), ("cross.q", ["encoder_attn.q_proj"]),
            ("cross.kv", ["encoder_attn.k_proj", "encoder_attn.v_proj"]), ("cross.o", ["encoder_attn.out_proj"]),
            ("norm_cross", ["encoder_attn_layer_norm"]), ("ffn.up", ["fc1"]), ("ffn.down", ["fc2"]), ("norm2", ["final_layer_norm"]))
        for w in ("weight", "bias")
    },
    "head.weight": ("lm_head.weight",),
    "logits_bias": ("final_logits_bias",),
}

TORCH: Names = {
    "embed.weight": ("embedding.weight",),
    "target_embed.weight": ("target_embedding.weight",),
    **{f"{side}.layers.{{i}}.mixer.qkv.{w}": (f"{side}.layers.{{i}}.self_attn.in_proj_{w}",)
       for side in ("encoder", "decoder") for w in ("weight", "bias")},
    **{
        f"{side}.{ours}.{w}": tuple(f"{side}.{name}.{w}" for name in theirs)
        for side, last in (("encoder", "norm2"), ("decoder", "norm3"))
        for ours, theirs in (
            ("layers.{i}.mixer.o", ["layers.{i}.self_attn.out_proj"]), ("layers.{i}.norm1", ["layers.{i}.norm1"]),
            ("layers.{i}.cross.q", ["layers.{i}.multihead_attn.q_proj"]),
            ("layers.{i}.cross.kv", ["layers.{i}.multihead_attn.k_proj", "layers.{i}.multihead_attn.v_proj"]),
            ("layers.{i}.cross.o", ["layers.{i}.multihead_attn.out_proj"]), ("layers.{i}.norm_cross", ["layers.{i}.norm2"]),
            ("layers.{i}.ffn.up", ["layers.{i}.linear1"]), ("layers.{i}.ffn.down", ["layers.{i}.linear2"]),
            ("layers.{i}.norm2", [f"layers.{{i}}.{last}"]), ("norm", ["norm"]))
        for w in ("weight", "bias")
    },
    "head.weight": ("head.weight",),
    "logits_bias": ("head.bias",),
}
"""The names of `torch.nn.Transformer`, whose cross-attention is cut into q, k and v (models/transformer.py does it)."""


@dataclass(frozen=True)
class Piece:
    """The Hub's tensor `name` of that `shape`, or a part of it, and the part of our parameter that equals it.

    `ours(parameter)` and `theirs(tensor)` are views of one shape: copying from one into the other loads or saves.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] | None = None  # of our parameter (start, stop); None: all
    vector: bool = False  # rows are the last dimension
    groups: int = 1  # in how many groups the Hub's rows stand
    within: tuple[int, int] | None = None  # (offset, width): of each group in the Hub's tensor; None: all of it
    transposed: bool = False

    def whole(self, parameter: Tensor) -> bool:
        """Whether the Hub's tensor is our parameter as it stands."""
        all_rows = self.rows is None or self.rows == (0, parameter.shape[-1 if self.vector else -2])
        return all_rows and self.expert is None and self.within is None and not self.transposed

    def ours(self, parameter: Tensor) -> Tensor:
        view = parameter if self.expert is None else parameter[self.expert]
        dim = -1 if self.vector else -2
        if self.rows is not None:
            view = view.narrow(dim, self.rows[0], self.rows[1] - self.rows[0])
        if self.within is not None:
            return view.unflatten(dim, (self.groups, self.within[1]))
        return view.mT if self.transposed else view

    def theirs(self, tensor: Tensor) -> Tensor:
        if self.within is None:
            return tensor
        view, dim = tensor.mT if self.transposed else tensor, -1 if self.vector else -2
        return view.unflatten(dim, (self.groups, view.shape[dim] // self.groups)).narrow(dim, *self.within)


def targets(
    model: nn.Module, names: Names, layers: int = 0, have: Container[str] | None = None, within: str = "",
) -> Iterator[tuple[str, Tensor, Piece]]:
    """(our name, parameter, piece) for every Hub tensor that fills a parameter of the model.

    layers: of the main stack, for `{n}`. have: the names in a file, to choose between alternatives. within: what our names begin with.
    """
    for prefix, module in model.named_modules():
        stacked: Mapping[str, tuple[int, ...]] = getattr(module, "stacked", {})
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if not name.startswith(within):
                continue
            entry, number = lookup(names, name)
            groups = getattr(module, "groups", 1)
            choice = _choose(entry, number, layers, parameter, have) if isinstance(entry, list) else entry
            for index, source in enumerate(choice):
                for piece in _pieces(_numbered(source, number, layers), parameter, stacked.get(leaf, ()), groups, leaf,
                                     index if len(choice) > 1 else None):
                    yield name, parameter, piece


def lookup(names: Names, ours: str) -> tuple[Entry, int]:
    """The entry of one of our parameters, and the number of its layer."""
    found = re.search(r"(?:^|\.)(?:layers|mtp)\.(\d+)\.", ours)
    if found is None:
        return names[ours], 0
    return names[f"{ours[: found.start(1)]}{{i}}{ours[found.end(1) :]}"], int(found[1])


def _numbered(source: str, number: int, layers: int) -> str:
    return source.replace("{i}", str(number)).replace("{n}", str(layers + number))


def _choose(entry: list[tuple[str, ...]], number: int, layers: int, parameter: Tensor, have: Container[str] | None) -> tuple[str, ...]:
    """The first alternative whose names (the first and the last expert's) are all there; else the first."""
    for choice in entry if have is not None else ():
        bare = [re.sub(r"\[.*?\]|\^\w+", "", _numbered(source, number, layers)) for source in choice]
        wanted = {name.replace("{e}", str(e)) for name in bare for e in (0, len(parameter) - 1)}
        if have is not None and all(name in have for name in wanted):
            return choice
    return entry[0]


def _pieces(source: str, parameter: Tensor, parts: tuple[int, ...], groups: int, leaf: str, index: int | None) -> Iterator[Piece]:
    """The pieces that one name of the table stands for. index: which of several names it is, None for the only one."""
    name, covered, marks = _parsed(source, parts, index)
    experts = range(len(parameter)) if "{e}" in name else [None]
    for e in experts:
        shape = list(parameter.shape if e is None else parameter.shape[1:])
        # a bias of stacked experts has two dimensions, of which the last counts rows
        vector = len(shape) == 1 or (leaf.endswith("bias") and len(shape) == 2)
        spots = [(sum(parts[:j]), sum(parts[: j + 1])) for j in covered]
        full = name if e is None else name.replace("{e}", str(e))
        if spots:
            shape[-1 if vector else -2] = sum(stop - start for start, stop in spots)
        if "T" in marks:
            shape[-1], shape[-2] = shape[-2], shape[-1]
        common = {"expert": e, "vector": vector, "transposed": "T" in marks}
        if not marks & {"grouped", "interleaved"}:
            rows = (spots[0][0], spots[-1][1]) if spots else None
            yield Piece(full, tuple(shape), rows=rows, **common)  # type: ignore[arg-type]
            continue
        offset = 0
        for start, stop in spots:
            count = stop - start if "interleaved" in marks else groups
            width = (stop - start) // count
            yield Piece(full, tuple(shape), rows=(start, stop), groups=count, within=(offset, width), **common)  # type: ignore[arg-type]
            offset += width


def _parsed(source: str, parts: tuple[int, ...], index: int | None) -> tuple[str, list[int], set[str]]:
    """'a[0:3]^grouped' -> ('a', [0, 1, 2], {'grouped'})"""
    name, *marks = source.split("^")
    found = re.fullmatch(r"(.*)\[([\d:,]+)\]", name)
    if found is None:
        return name, list(range(len(parts))) if index is None else [index], set(marks)
    if ":" in found[2]:
        start, stop = map(int, found[2].split(":"))
        return found[1], list(range(start, stop)), set(marks)
    return found[1], [int(j) for j in found[2].split(",")], set(marks)
