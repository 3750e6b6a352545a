"""LoRA for any decoder of ours: where adapters go, the models with and without them, and PEFT's files.

    attach(model, LoraConfig(rank=8))        from here on only the adapters are trained
    plain = without_adapters(model)          the model as it was given: the same tensors, no copy
    merged = with_merged(model)              one whose weights have the adapters added, for sampling and for saving
    save_adapters(model, folder)             adapter_config.json + adapter_model.safetensors, what PEFT opens

Matrices are named by the last word of the Hub's name (q_proj, down_proj, c_attn), as in PEFT. Norms have no adapters, nor have
matrices that are not a product of their own here: those of experts (stacked) and the second half of latent attention. `attach` says
which it leaves as they are, and refuses them by name.
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
from pellucid.nn.linear import Linear
from pellucid.nn.lora import Adapter, LoraLinear, adapted
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
    """Matrices by the last word of their Hub names (q_proj, v_proj ...); by default all inside the layers."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise BadInput(f"adapters of rank {self.rank} and alpha {self.alpha:g} are not possible", next="use rank 8 and alpha 16")


def attach(model: Decoder, config: LoraConfig, seed: int = 0) -> None:
    """Adds adapters, and freezes everything else. Errors: BadInput for a target that the model does not have."""
    if adapted(model):
        raise BadInput("this model has adapters already", next="merge them first, or go on with them")
    found = list(_matrices(model))
    known, without = sorted({_leaf(piece.name) for _, _, piece in found}), left_out(model)
    for name in config.targets:
        if name not in known:
            raise BadInput(f"{name} has no adapters here" if name in without else f"no matrix of this model is called {name!r}",
                           without.get(name) or f"it has {', '.join(known)}", f"choose among {', '.join(known)}")
    if not found:
        raise BadInput("no matrix of this model can have an adapter", "; ".join(sorted(set(without.values()))), "train its weights themselves")
    if without and not config.targets:
        events.note("no adapters, and so no training, for " + "; ".join(f"{name}: {why}" for name, why in without.items()), "warning")
    chosen = [x for x in found if not config.targets or _leaf(x[2].name) in config.targets]
    _attach(model, chosen, config.rank, config.alpha / config.rank, seed)


def _attach(model: Decoder, chosen: list[tuple[str, Linear, Piece]], rank: int, scale: float, seed: int) -> None:
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
    for lora in adapted(model).values():
        for adapter in lora.all:
            sources.add(adapter.source)
            tensors[f"{PREFIX}{adapter.source}.lora_A.weight"] = adapter.a.detach().contiguous()
            tensors[f"{PREFIX}{adapter.source}.lora_B.weight"] = adapter.b.detach().contiguous()
    if not tensors:
        raise BadInput("this model has no adapters", next="save it as a model")
    first = next(iter(adapted(model).values()))
    rank = len(first.all[0].a)
    leaves = {_leaf(s) for s in sources}
    pieces = [p for _, _, p in _matrices(without_adapters(model)) if _leaf(p.name) in leaves]
    everywhere = {p.name.removesuffix(".weight") for p in pieces} == sources
    fields: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base or None, "r": rank,
              "lora_alpha": first.scale * rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": any(p.transposed for p in pieces), "inference_mode": True,
              "target_modules": sorted(leaves if everywhere else sources)}
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
    fields, tensors = read_peft(Path(folder))
    strange = [name for name in tensors if not re.fullmatch(re.escape(PREFIX) + r".+\.lora_[AB]\.weight", name)]
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if fields.get(name)]
    if strange or patterns or not tensors:
        raise BadInput("these adapters are of a kind that is not trained here", ", ".join(patterns or strange[:1] or ["no tensors"]),
                       "give plain LoRA adapters of one rank")
    rank = int(fields["r"])
    scale = scale_of(fields, "", rank)
    sources = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    if not adapted(model):
        chosen = [x for x in _matrices(model) if x[2].name.removesuffix(".weight") in sources]
        _attach(model, chosen, rank, scale, 0)
    here = {a.source: (lora, a) for lora in adapted(model).values() for a in lora.all}
    if set(here) != sources:
        raise BadInput(f"the adapters in {folder} belong to another model", f"{sorted(set(here) ^ sources)[0]} is in one of both only",
                       "give the model that they were trained on")
    with torch.no_grad():
        for source, (lora, adapter) in here.items():
            lora.scale = scale
            for ours, letter in ((adapter.a, "A"), (adapter.b, "B")):
                theirs = tensors[f"{PREFIX}{source}.lora_{letter}.weight"]
                if theirs.shape != ours.shape:
                    raise BadInput(f"the adapter of {source} has shape {tuple(theirs.shape)}, this model needs {tuple(ours.shape)}",
                                   next="give the model that they were trained on, or the rank that they have")
                ours.copy_(theirs)


PLAIN: dict[str, Any] = {"use_dora": False, "bias": "none", "modules_to_save": None, "lora_bias": False, "layer_replication": None,
                         "target_parameters": None, "trainable_token_indices": None}
"""What must be so, or left out, in an adapter_config.json that is read."""


def read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """adapter_config.json and the tensors of adapter_model.safetensors. BadInput where they are not there, not readable, or not LORA
    of plain linear layers."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise BadInput(f"{folder} holds no LoRA adapter", f"there is no {CONFIG} with peft_type LORA",
                       "give a folder that PEFT's save_pretrained wrote")
    if strange := [key for key, plain in PLAIN.items() if config.get(key) not in (plain, None, [], {})]:
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
