"""LoRA for any decoder of ours: where adapters go, the models with and without them, and PEFT's files.

    attach(model, LoraConfig(rank=8))        from here on only the adapters are trained
    plain = without_adapters(model)          the model as it was given: the same tensors, no copy
    merged = with_merged(model)              one whose weights have the adapters added, for sampling and for saving
    save_adapters(model, folder)             adapter_config.json + adapter_model.safetensors, what PEFT opens

Matrices are named by the last word of the Hub's name (q_proj, down_proj, c_attn), as in PEFT. The stacked matrices of experts have
adapters where they are asked for (`target_parameters`, PEFT's word), one an expert, under the names that transformers 5 gives the
stacks. Norms have no adapters, nor have matrices that are not a product of their own here: the second half of latent attention.
`attach` says which it leaves as they are, and refuses them by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pellucid import events
from pellucid.errors import BadInput
from pellucid.files import atomic_folder, write_atomic
from pellucid.models.families import family_of
from pellucid.models.hub import main_layers
from pellucid.models.names import Piece, targets
from pellucid.nn import Decoder
from pellucid.nn.experts import ExpertLinear
from pellucid.nn.linear import Linear
from pellucid.nn.lora import Adapter, ExpertAdapter, LoraExperts, LoraLinear, adapted
from pellucid.tokenizers.reading import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
M = TypeVar("M", bound=Decoder)


@dataclass(frozen=True)
class LoraConfig:
    """Size of the adapters, and which matrices get one."""

    rank: int = 8
    """Inner dimension r."""
    alpha: float = 16.0
    """What is learned is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Matrices by the last word of their Hub names (q_proj, v_proj ...); by default all inside the layers but those of experts."""
    target_parameters: tuple[str, ...] = ()
    """Stacked matrices of experts by the last word of their names: gate_up_proj, down_proj."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise BadInput(f"adapters of rank {self.rank} and alpha {self.alpha:g} are not possible", next="use rank 8 and alpha 16")


def attach(model: Decoder, config: LoraConfig, seed: int = 0) -> None:
    """Adds adapters, and freezes everything else. Errors: BadInput for a target that the model does not have."""
    if adapted(model):
        raise BadInput("this model has adapters already", next="merge them first, or go on with them")
    found = list(_matrices(model))
    known, without = sorted({_leaf(piece.name) for _, _, piece in found}), left_out(model)
    stacks = list(_stacks(model))
    for name in config.target_parameters:
        if name not in STACKS or not stacks:
            raise BadInput(f"no stacked matrix of experts is called {name!r}" if stacks else "this model has no experts whose stacks are "
                           "stored as PEFT adapts them", next=f"choose among {', '.join(STACKS)}" if stacks else "leave target_parameters out")
    for name in config.targets:
        if name not in known:
            raise BadInput(f"{name} has no adapters here" if name in without else f"no matrix of this model is called {name!r}",
                           without.get(name) or f"it has {', '.join(known)}", f"choose among {', '.join(known)}")
    if not found:
        raise BadInput("no matrix of this model can have an adapter", "; ".join(sorted(set(without.values()))), "train its weights themselves")
    if set(config.target_parameters) == set(STACKS):
        without = {name: why for name, why in without.items() if "experts" not in why}
    if without and not config.targets:
        events.note("no adapters, and so no training, for " + "; ".join(f"{name}: {why}" for name, why in without.items()), "warning")
    chosen = [x for x in found if not config.targets or _leaf(x[2].name) in config.targets]
    _attach(model, chosen, config.rank, config.alpha / config.rank, seed, [x for x in stacks if _leaf(x[2]) in config.target_parameters])


def _attach(model: Decoder, chosen: list[tuple[str, Linear, Piece]], rank: int, scale: float, seed: int,
            stacks: list[tuple[str, ExpertLinear, str]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    parts: dict[str, list[Adapter]] = {}
    for name, linear, piece in chosen:
        rows, inputs = linear.weight.shape
        start, stop = piece.rows or (0, rows)
        parts.setdefault(name, []).append(
            Adapter(piece.name.removesuffix(".weight"), start, stop, inputs, rank, linear.weight, generator))
    for name, adapters in parts.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, LoraLinear(getattr(model.get_submodule(owner), leaf), adapters, scale))
    for name, experts, source in stacks:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)[leaf] = LoraExperts(experts, ExpertAdapter(source, rank, experts.weight, generator), scale)  # type: ignore[operator]


STACKS = {"gate_up_proj": "gate_up", "down_proj": "down"}  # the last word of the stack's name -> ours


def _stacks(model: Decoder) -> Iterator[tuple[str, ExpertLinear, str]]:
    """(name of our stack, it, its name in transformers), where the rows of both stand alike (of gpt-oss they alternate, transposed)."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear) and name.startswith("layers.") and model.spec.family != "gpt_oss":
            layer, leaf = name.split(".")[1], name.rpartition(".")[2]
            (word,) = (theirs for theirs, ours in STACKS.items() if ours == leaf)
            yield name, module, f"model.layers.{layer}.mlp.experts.{word}"


def left_out(model: Decoder) -> dict[str, str]:
    """Matrices inside the layers that get no adapter, by the last word of their Hub names, and why."""
    taken, out = {_leaf(piece.name) for _, _, piece in _matrices(model)}, {}
    for parameter, _, piece in targets(model, family_of(model.spec).names, main_layers(model)):
        leaf, name = _leaf(piece.name), parameter.rpartition(".")[0]
        if parameter.startswith("layers.") and model.get_parameter(parameter).ndim >= 2 and leaf not in taken and not piece.vector:
            out[leaf] = ("the matrices of experts are stacked" if piece.expert is not None or model.get_parameter(parameter).ndim > 2 else
                         "latent attention multiplies parts of it by themselves" if name.endswith("kv_b") else "it is no linear layer here")
    return out


def _matrices(model: Decoder) -> Iterator[tuple[str, Linear, Piece]]:
    """(name of our Linear, it, a Hub matrix that is some of its rows), inside the layers."""
    for parameter, _, piece in targets(model, family_of(model.spec).names, main_layers(model)):
        name, _, leaf = parameter.rpartition(".")
        module = model.get_submodule(name)
        plain = piece.expert is None and piece.within is None and not piece.vector
        used_whole = not name.endswith("kv_b")  # latent attention multiplies parts of its weight by themselves
        if parameter.startswith("layers.") and leaf == "weight" and isinstance(module, Linear) and plain and used_whole:
            yield name, module, piece


def _leaf(source: str) -> str:
    return source.removesuffix(".weight").rpartition(".")[2]


# --- with and without -------------------------------------------------------------------------------------------------


def without_adapters(model: M) -> M:
    """The model as it was before `attach`, over the SAME tensors: a reference that costs no memory."""
    with torch.device("meta"):
        plain = type(model)(model.spec)
    state = {n: p for n, p in model.state_dict(keep_vars=True).items() if ".adapters." not in n}
    plain.load_state_dict(state, assign=True)
    plain.compute_dtype = model.compute_dtype
    return plain.requires_grad_(False).eval()


def with_merged(model: M) -> M:
    """A plain model whose weights have the adapters added. Matrices without adapters are shared, the others are new."""
    plain = without_adapters(model)
    for name, lora in adapted(model).items():
        plain.get_submodule(name).weight = nn.Parameter(lora.merged(), requires_grad=False)
    return plain


@torch.no_grad()
def merge_into(plain: Decoder, model: Decoder) -> None:
    """Brings a model from `with_merged` up to date."""
    for name, lora in adapted(model).items():
        plain.get_parameter(f"{name}.weight").copy_(lora.merged())


# --- PEFT's files -----------------------------------------------------------------------------------------------------


def write_adapters(model: Decoder, folder: Path, base: str = "") -> None:
    """adapter_config.json and adapter_model.safetensors, into a folder that exists."""
    tensors: dict[str, torch.Tensor] = {}
    sources: set[str] = set()
    parameters: set[str] = set()
    names = nested(model)
    for lora in adapted(model).values():
        for adapter in lora.all:
            (parameters if isinstance(adapter, ExpertAdapter) else sources).add(adapter.source)
            for letter, value in zip("AB", _flat(adapter), strict=True):
                tensors[f"{PREFIX}{names.get(adapter.source, adapter.source)}.lora_{letter}.weight"] = value.detach().contiguous()
    if not tensors:
        raise BadInput("this model has no adapters", next="save it as a model")
    first = next(iter(adapted(model).values()))
    rank = first.all[0].a.shape[-2]
    leaves = {_leaf(s) for s in sources}
    pieces = [p for _, _, p in _matrices(without_adapters(model)) if _leaf(p.name) in leaves]
    everywhere = {p.name.removesuffix(".weight") for p in pieces} == sources
    fields: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base or None, "r": rank,
              "lora_alpha": first.scale * rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": any(p.transposed for p in pieces), "inference_mode": True,
              "target_modules": sorted(leaves if everywhere else sources)}
    if parameters:
        fields["target_parameters"] = sorted({".".join(p.split(".")[-3:]) for p in parameters})
    if float(fields["lora_alpha"]).is_integer():
        fields["lora_alpha"] = int(fields["lora_alpha"])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_atomic(folder / CONFIG, json.dumps(fields, indent=2) + "\n")


def save_adapters(model: Decoder, folder: str | Path, base: str = "") -> None:
    """A folder that `peft.PeftModel.from_pretrained` opens; it appears whole or not at all. base: the base model's name."""
    with atomic_folder(folder) as new:
        write_adapters(model, new, base)


def load_adapters(model: Decoder, folder: str | Path) -> None:
    """PEFT's folder into a model of ours: adapters are attached where the file has them, or filled where they are.

    Errors: BadInput for a folder without adapters, another kind of adapter, or names and shapes that do not fit the model.
    """
    fields, tensors = read_peft(Path(folder), experts=True)
    strange = [name for name in tensors if not re.fullmatch(re.escape(PREFIX) + r".+\.lora_[AB]\.weight", name)]
    if fields.get("target_parameters"):
        tensors = _unnested(tensors, [str(p) for p in fields["target_parameters"]])
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if fields.get(name)]
    if strange or patterns or not tensors:
        raise BadInput("these adapters are of a kind that is not trained here", ", ".join(patterns or strange[:1] or ["no tensors"]),
                       "give plain LoRA adapters of one rank")
    rank = int(fields["r"])
    scale = scale_of(fields, "", rank)
    sources = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    if not adapted(model):
        chosen = [x for x in _matrices(model) if x[2].name.removesuffix(".weight") in sources]
        _attach(model, chosen, rank, scale, 0, [x for x in _stacks(model) if x[2] in sources])
    here = {a.source: (lora, a) for lora in adapted(model).values() for a in lora.all}
    if set(here) != sources:
        raise BadInput(f"the adapters in {folder} belong to another model", f"{sorted(set(here) ^ sources)[0]} is in one of both only",
                       "give the model that they were trained on")
    with torch.no_grad():
        for source, (lora, adapter) in here.items():
            lora.scale = scale
            for ours, flat, letter in zip((adapter.a, adapter.b), _flat(adapter), "AB", strict=True):
                theirs = tensors[f"{PREFIX}{source}.lora_{letter}.weight"]
                if theirs.shape != flat.shape:
                    raise BadInput(f"the adapter of {source} has shape {tuple(theirs.shape)}, this model needs {tuple(flat.shape)}",
                                   next="give the model that they were trained on, or the rank that they have")
                ours.copy_(_stacked(theirs, ours, letter) if isinstance(adapter, ExpertAdapter) else theirs)


# --- experts: PEFT lays the adapters of a stack out as two matrices, and nests the stacks of a layer ----------------------------------


def _flat(adapter: Adapter | ExpertAdapter) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as PEFT stores them; of experts (E r, in), and (out, r E) with the expert last."""
    if isinstance(adapter, Adapter):
        return adapter.a, adapter.b
    return adapter.a.flatten(0, 1), adapter.b.permute(1, 2, 0).flatten(1)


def _stacked(flat: torch.Tensor, like: torch.Tensor, letter: str) -> torch.Tensor:
    """The inverse of `_flat` for experts."""
    E = len(like)
    return flat.unflatten(0, (E, -1)) if letter == "A" else flat.unflatten(1, (-1, E)).permute(2, 0, 1)


def nested(model: Decoder) -> dict[str, str]:
    """Name of an adapted stack -> the module that holds its adapter in PEFT: each of the stacks of a layer is wrapped around those before
    it, in the order in which the layer has them (gate_up_proj, down_proj)."""
    of = {}
    sources = [a.source for lora in adapted(model).values() for a in lora.all if isinstance(a, ExpertAdapter)]
    for source in sources:
        home = source.rpartition(".")[0]
        order = [f"{home}.{word}" for word in STACKS if f"{home}.{word}" in sources]
        of[source] = home + ".base_layer" * (len(order) - 1 - order.index(source))
    return of


def _unnested(tensors: dict[str, torch.Tensor], targets: list[str]) -> dict[str, torch.Tensor]:
    """Tensors under the names of their stacks in place of the modules that wrap them."""
    words = [word for word in STACKS if any(t.rpartition(".")[2] == word for t in targets)]
    found = {}
    for name, tensor in tensors.items():
        module, _, rest = name.rpartition(".lora_")
        depth = module.count(".base_layer")
        if (home := module.removesuffix(".base_layer" * depth)).endswith(".experts"):
            if depth >= len(words):
                raise BadInput(f"{name} belongs to no stack of experts", f"target_parameters names {', '.join(targets)}", "give a folder that PEFT wrote")
            module = f"{home}.{words[::-1][depth]}"
        found[f"{module}.lora_{rest}"] = tensor
    return found


PLAIN: dict[str, Any] = {"use_dora": False, "bias": "none", "modules_to_save": None, "lora_bias": False, "layer_replication": None,
                         "target_parameters": None, "trainable_token_indices": None}
"""What must be so, or left out, in an adapter_config.json that is read."""


def read_peft(folder: Path, experts: bool = False) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """adapter_config.json and the tensors of adapter_model.safetensors. BadInput where they are not there, not readable, or not LORA
    of plain linear layers (or, with `experts`, of stacks of experts beside them)."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise BadInput(f"{folder} holds no LoRA adapter", f"there is no {CONFIG} with peft_type LORA",
                       "give a folder that PEFT's save_pretrained wrote")
    if strange := [key for key, plain in PLAIN.items() if config.get(key) not in (plain, None, [], {})
                and not (experts and key == "target_parameters")]:
        raise BadInput(f"the adapter {folder.name} uses {', '.join(strange)}", "only plain low-rank changes of linear layers are supported")
    try:
        return config, load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{folder} holds no readable {WEIGHTS}", str(error), "fetch the adapter again") from error


def scale_of(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732), with the alpha that a pattern gives this module."""
    alpha = config.get("lora_alpha") or 8
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
