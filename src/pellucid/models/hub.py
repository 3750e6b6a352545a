"""Weights and configs in and out: what pellucid saves transformers opens, and the other way round.

Each parameter pulls itself: the table of names says which Hub tensors make it up (models/names.py), the files give just
those (models/weights.py). The shape of the model follows from the type of its spec.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pellucid import events
from pellucid.errors import BadInput
from pellucid.files import atomic_folder, write_atomic
from pellucid.messages import add, three_parts
from pellucid.models.config import Config, with_dual_chunks
from pellucid.models.families import config_of, family_of, find, find_all, unwrapped
from pellucid.models.names import Piece, targets
from pellucid.models.weights import Weights, assemble, planned
from pellucid.nn import (
    Decoder,
    DecoderSpec,
    DualEncoder,
    DualEncoderSpec,
    Encoder,
    EncoderDecoder,
    EncoderDecoderSpec,
    EncoderSpec,
    Linear,
    init_weights,
)
from pellucid.nn.experts import ExpertLinear
from pellucid.runtime import choose_device, dtype_of

add({
    "error.checkpoint": ("no checkpoint folder at {name!r}", "{name!r} 处没有检查点目录"),
    "error.checkpoint.why": ("a folder with config.json and *.safetensors is expected", "应为含 config.json 与 *.safetensors 的目录"),
    "error.checkpoint.next": ("check the path, or give a Hub id such as Qwen/Qwen3-0.6B", "检查路径，或给出 Hub id，如 Qwen/Qwen3-0.6B"),
    "error.hub": ("no folder {name!r} here, and the Hub gave none", "本地没有目录 {name!r}，也未能从 Hub 取得"),
    "error.hub.why": ("{text}", "{text}"),
    "error.hub.next": ("check the name and the network, or give a local folder", "检查名称与网络，或给出本地目录"),
})
WEIGHTS = (r"\.(safetensors|bin|pt|pth|gguf)$", r"\.index\.json$")
TOKENIZER = (r"^(tokenizer|vocab|merges|special_tokens_map|added_tokens|chat_template|generation_config)", r"\.tiktoken$", "^additional_chat_templates$")
"""Names of files that a saved model, and a saved tokenizer, put out of date."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What a language model's config.json keeps, null included: where one is not stated, transformers takes the family's own."""
SHAPES: dict[type, type[nn.Module]] = {
    DecoderSpec: Decoder, EncoderSpec: Encoder, EncoderDecoderSpec: EncoderDecoder, DualEncoderSpec: DualEncoder}
"""Spec -> the module that is built from it."""


def load(
    path_or_id: str | os.PathLike[str], dtype: str | torch.dtype = "float32", device: str = "cpu", *,
    allow_missing: bool = False, change: Callable[[Any], Any] | None = None,
) -> Any:
    """A checkpoint folder (or Hub id) as a module in eval mode: a `Decoder`, or what its architecture is.

    dtype "auto" keeps the file's: what config.json states, else what the weights have. Raises BadInput that names every missing, unused or mis-shaped tensor;
    allow_missing: missing ones are drawn at random, unused ones left out, and both told as a warning.
    change: spec -> the spec to build instead, for what needs no other weights: see models/long_context.py.
    """
    folder = local_folder(path_or_id)
    fields = read_config(folder)
    spec = spec_of(fields)
    if change is not None:
        spec = change(spec)
    with ExitStack() as stack:
        weights = Weights(folder, stack, family_of(spec))
        if dtype == "auto":
            dtype = stated_dtype(fields, weights)
        spec = tied_as_stored(spec, weights)
        model = blank(spec)
        if getattr(spec, "mtp", ()) and not weights.hold(model, "mtp.", main_layers(model)):
            events.note(f"{folder}: config.json states layers of multi-token prediction, and the weights hold none: left out", "info")
            model = blank(replace(spec, mtp=()))  # transformers writes the field, but not the layers
        weights.check(model, main_layers(model), allow_missing)  # before any memory is taken for what config.json claims
        allocate(model, dtype_of(dtype), choose_device(device).value)
        if allow_missing:
            init_weights(model)
        weights.fill(model, main_layers(model))
    return model.eval()


def stated_dtype(fields: dict[str, Any], weights: Weights) -> str | torch.dtype:
    """What config.json states, else what the weights have."""
    return unwrapped(fields).get("dtype") or unwrapped(fields).get("torch_dtype") or weights.dtype


def tied_as_stored(spec: Any, weights: Weights) -> Any:
    """What transformers makes of files that contradict `tie_word_embeddings`: a head of its own, where one stands beside the
    embedding and differs; and a head alone is the embedding too."""
    if not (isinstance(spec, DecoderSpec) and spec.tied):
        return spec
    embed, head = (entry[0] for entry in (weights.family.names["embed.weight"], weights.family.names["head.weight"]) if isinstance(entry, tuple))
    if head in weights and embed not in weights:
        weights.where[embed] = weights.where[head]
    elif head in weights and not torch.equal(weights.get(embed), weights.get(head)):
        events.note(f"{weights.folder}: config.json ties the head to the embedding, but {head} differs from {embed}: not tied", "warning")
        return replace(spec, tied=False)
    return spec


def spec_of(fields: dict[str, Any]) -> Any:
    """config.json (as a dict) -> spec."""
    find_all()
    fields = unwrapped(fields)
    c = Config(fields)
    spec = find(fields.get("model_type", "")).spec(c)
    if not isinstance(spec, DecoderSpec):
        return spec
    ids = tuple((name, fields[name]) for name in TOKEN_IDS if name in fields)
    return with_dual_chunks(c, replace(spec, extra=(*ids, *spec.extra)))


def shape_of(spec: Any) -> type[nn.Module]:
    return SHAPES[type(spec)]


def blank(spec: Any) -> nn.Module:
    """The model of a spec, without memory."""
    with torch.device("meta"):
        return shape_of(spec)(spec)


def matrices_of(folder: Path) -> dict[str, str]:
    """The folder's tensors that are matrices of products, by the names in its files: "rows" where they stand as (out, in), with experts
    or without, "columns" as (in, out); "table" for the embedding and the head."""
    spec = spec_of(read_config(folder))
    found: dict[str, str] = {}
    with ExitStack() as stack:
        weights, model = Weights(folder, stack, family_of(spec)), blank(spec)
        for ours, _, piece in targets(model, weights.family.names, main_layers(model), weights):
            owner, _, leaf = ours.rpartition(".")
            if piece.name in weights.where and leaf == "weight" and (owner == "embed" or isinstance(model.get_submodule(owner), (Linear, ExpertLinear))):
                kind = "table" if owner in ("embed", "head") else "columns" if piece.transposed else "rows"
                found[weights.where[piece.name][1]] = kind
    return found


def main_layers(model: nn.Module) -> int:
    """Layers of the main stack: tensors of further heads are counted behind them."""
    return len(getattr(model.spec, "layers", ()))


def allocate(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Memory for a model built on the meta device. Parameters that a module names in `wide` stay float32 (a router's
    selection bias: its steps are smaller than what bfloat16 resolves)."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = torch.promote_types(dtype, torch.float32) if name in getattr(module, "wide", ()) else dtype
            new = nn.Parameter(torch.empty(parameter.shape, dtype=kind, device=device), requires_grad=parameter.requires_grad)
            module._parameters[name] = new
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)


def local_folder(path_or_id: str | os.PathLike[str], weights: bool = True) -> Path:
    """The folder itself, or the cached snapshot of a Hub id (downloaded unless HF_HUB_OFFLINE is set); `weights`: with them."""
    path = Path(path_or_id)
    if path.is_dir():
        return path
    name = str(path_or_id)
    looks_local = path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if looks_local:
        raise BadInput(*three_parts("error.checkpoint", name=name))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.jinja", "*.txt", "*.tiktoken", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(*three_parts("error.hub", name=name, text=str(error).split("\n")[0])) from error


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{folder} has no config.json", "it is not a Hugging Face checkpoint folder") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read", str(error.strerror), "check what it is, and its permissions") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or built to exhaust the parser
        raise BadInput(f"{path} is not readable JSON", str(error), "fetch the file again") from error
    if not isinstance(fields, dict):
        raise BadInput(f"{path} holds {type(fields).__name__}, not an object", next="fetch the file again")
    return fields


def fill(model: nn.Module, folder: Path) -> None:
    """Every parameter pulls its tensors, and stays the object that an optimizer may hold; anything missing, unused or of
    another shape is an error with its name."""
    with ExitStack() as stack:
        weights = Weights(folder, stack, family_of(model.spec))
        weights.check(model, main_layers(model))
        weights.fill(model, main_layers(model), adopt=False)


def save(
    model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: Any = None, generation: dict[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes config.json, safetensors (and the tokenizer's files) so that transformers opens the folder.

    The folder appears whole or not at all. `generation`: fields of generation_config.json, e.g. eos_token_id.
    shard_bytes: weights beyond it are cut into several files with an index, one in memory at a time.
    What a model's folder holds beside its weights (a tokenizer, a model card) stays unless it is written anew; a folder of
    other things is refused.
    """
    beside = files_beside(Path(folder), tokenizer is not None)
    with atomic_folder(folder) as new:
        write_model(model, new, generation, shard_bytes)
        if tokenizer is not None:
            tokenizer.save(new)
        for path in beside:
            if not (new / path.name).exists():
                keep(path, new / path.name)


def files_beside(folder: Path, new_tokenizer: bool) -> list[Path]:
    """What stays in a folder whose model is replaced. BadInput if it holds no model, but something."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    if found and not (folder / "config.json").exists():
        raise BadInput(f"{folder} holds no model, but {', '.join(path.name for path in found[:3])}",
                       "saving puts a model's folder in its place", "choose a new folder, or an empty one")
    gone = re.compile("|".join((*WEIGHTS, *(TOKENIZER if new_tokenizer else ()))))
    return [path for path in found if not gone.search(path.name)]


def keep(old: Path, new: Path) -> None:
    """A file or folder once more, without copying what is large: as a second name of the same content."""
    if old.is_dir():
        shutil.copytree(old, new, copy_function=lambda a, b: keep(Path(a), Path(b)))
        return
    try:
        if old.is_symlink():  # into the Hub's cache, whose content stays its own
            raise OSError
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def write_model(
    model: nn.Module, folder: Path, generation: dict[str, Any] | None = None, shard_bytes: int = 5 * 10**9,
) -> None:
    family, layers = family_of(model.spec), main_layers(model)
    plan = planned(model, family, layers)
    whole = set(planned(blank(model.spec), family, layers))
    if whole != set(plan):
        raise BadInput("this model cannot be saved as a float checkpoint", f"it lacks {min(whole ^ set(plan))} as such",
                       "an INT8 folder is made from the float one: pellucid quantize")
    write_weights(plan, folder, shard_bytes)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = config_of(model.spec) | {"dtype": dtype, **(generation or {})}
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if generation is not None:
        write_atomic(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")


def write_weights(plan: dict[str, list[tuple[Tensor, Piece]]], folder: Path, shard_bytes: int) -> None:
    """One file, or shards of at most `shard_bytes` (a larger tensor alone) beside an index."""
    sizes = {name: math.prod(parts[0][1].shape) * parts[0][0].element_size() for name, parts in plan.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards, filled = [*shards, []], 0
        shards[-1].append(name)
        filled += size
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        save_file({name: assemble(plan[name]) for name in names}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
