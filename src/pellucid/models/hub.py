"""Weights and configs in and out: what pellucid saves transformers opens, and the other way round.

Each parameter pulls itself: the table of names says which Hub tensors make it up, `safetensors` reads just those.
Nothing is unpickled; a file that lies about its shapes is refused with the tensor's name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pellucid.errors import BadInput
from pellucid.files import atomic_folder, write_atomic
from pellucid.messages import add, three_parts
from pellucid.models.config import Config
from pellucid.models.families import config_of, find
from pellucid.models.names import Piece, expand, pieces
from pellucid.nn import Decoder, DecoderSpec, Linear
from pellucid.runtime import choose_device, dtype_of

add({
    "error.checkpoint": ("no checkpoint folder at {name!r}", "{name!r} 处没有检查点目录"),
    "error.checkpoint.why": ("a folder with config.json and *.safetensors is expected", "应为含 config.json 与 *.safetensors 的目录"),
    "error.checkpoint.next": ("check the path, or give a Hub id such as Qwen/Qwen3-0.6B", "检查路径，或给出 Hub id，如 Qwen/Qwen3-0.6B"),
    "error.hub": ("no folder {name!r} here, and the Hub gave none", "本地没有目录 {name!r}，也未能从 Hub 取得"),
    "error.hub.why": ("{text}", "{text}"),
    "error.hub.next": ("check the name and the network, or give a local folder", "检查名称与网络，或给出本地目录"),
})
IGNORED = ("rotary_emb.inv_freq", ".position_ids", ".attn.bias", ".masked_bias")  # buffers in old files, no weights


def load(path_or_id: str | os.PathLike[str], dtype: str | torch.dtype = "float32", device: str = "cpu") -> Decoder:
    """A checkpoint folder (or Hub id) as a `Decoder` in eval mode.

    dtype "auto" keeps the file's. Raises BadInput that names every missing, unused or mis-shaped tensor.
    """
    folder = local_folder(path_or_id)
    fields = read_config(folder)
    spec = spec_of(fields)
    if dtype == "auto":
        dtype = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    where = choose_device(device).value
    with torch.device("meta"):
        model = Decoder(spec)
    with ExitStack() as stack:
        weights = Weights(folder, stack, spec)
        weights.check(model)  # before any memory is taken for what config.json claims
        model.to(dtype_of(dtype)).to_empty(device=where)
        weights.fill(model)
    return model.eval()


def spec_of(fields: dict[str, Any]) -> DecoderSpec:
    """config.json (as a dict) -> spec."""
    return find(fields.get("model_type", "")).spec(Config(fields))


def local_folder(path_or_id: str | os.PathLike[str]) -> Path:
    """The folder itself, or the cached snapshot of a Hub id (downloaded unless HF_HUB_OFFLINE is set)."""
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
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.tiktoken"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(*three_parts("error.hub", name=name, text=str(error).split("\n")[0])) from error


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{folder} has no config.json", "it is not a Hugging Face checkpoint folder") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or built to exhaust the parser
        raise BadInput(f"{path} is not readable JSON", str(error), "fetch the file again") from error
    if not isinstance(fields, dict):
        raise BadInput(f"{path} holds {type(fields).__name__}, not an object", next="fetch the file again")
    return fields


class Weights:
    """All safetensors files of a folder as one mapping from tensor name to (lazily read) tensor.

    Files of a bare base model lack its prefix (`model.`, `transformer.`: GPT-2's own files); it is added then.
    """

    def __init__(self, folder: Path, stack: ExitStack, spec: DecoderSpec):
        self.folder = folder
        self.where: dict[str, tuple[Any, str]] = {}  # name -> the file's handle, the name in it
        for path in self._files(folder):
            try:
                handle = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise BadInput(f"{path.name} is not a whole safetensors file", str(error), "fetch the file again") from error
            self.where.update({name: (handle, name) for name in handle.keys()})
        prefix = find(spec.family).names["embed.weight"][0].split(".")[0] + "."
        if not any(name.startswith(prefix) for name in self.where):
            self.where = {name if name.startswith("lm_head.") else prefix + name: at for name, at in self.where.items()}

    def read(self, name: str) -> Tensor:
        handle, stored = self.where[name]
        tensor: Tensor = handle.get_tensor(stored)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        handle, stored = self.where[name]
        return tuple(handle.get_slice(stored).get_shape())

    def get(self, name: str) -> Tensor:
        """The tensor; INT8 codes that stand beside their row scales (see quant/) are multiplied by them."""
        tensor = self.read(name)
        scale = f"{name}_scale"
        if tensor.is_floating_point() and scale not in self.where:
            return tensor
        found = self.shape(scale) if scale in self.where else None
        if found != (len(tensor), 1):
            raise BadInput(f"{name} holds {tensor.dtype} codes, and {scale} is {found or 'missing'}",
                           f"there should be a scale for each row: {(len(tensor), 1)}", "quantize the checkpoint again")
        return tensor.float() * self.read(scale)

    def check(self, model: Decoder) -> None:
        """BadInput that names every tensor that is missing, unused or of another shape. Reads headers only."""
        missing, wrong, used = [], [], set()
        for _, parameter, piece in targets(model):
            if piece.name not in self.where:
                missing.append(piece.name)
                continue
            used |= {piece.name, f"{piece.name}_scale"}
            found, must = self.shape(piece.name), tuple(piece.of(parameter).shape)
            if found != must:
                wrong.append(f"{piece.name} {found} instead of {must}")
        spare = {"lm_head.weight"} if model.spec.tied else set()
        unused = [n for n in self.where if n not in used | spare and not n.endswith(IGNORED)]
        problems = [f"{label}: {', '.join(sorted(names)[:8])}{' ...' if len(names) > 8 else ''} ({len(names)})"
                    for label, names in (("missing", missing), ("unused", unused), ("wrong shape", wrong)) if names]
        if problems:
            raise BadInput(f"the weights in {self.folder} do not fit its config.json", "; ".join(problems),
                           "check that config.json and the safetensors belong together")

    @torch.no_grad()
    def fill(self, model: Decoder) -> None:
        for _, parameter, piece in targets(model):
            piece.of(parameter).copy_(self.get(piece.name))

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        """The single file if there is one (others beside it are not this model's), else the index's, else all."""
        index = folder / "model.safetensors.index.json"
        if (folder / "model.safetensors").exists():
            return [folder / "model.safetensors"]
        if not index.exists():
            files = sorted(folder.glob("*.safetensors"))
            if not files:
                raise BadInput(f"{folder} holds no *.safetensors", "only safetensors weights are read (pickle runs code)",
                               "convert the checkpoint with transformers: model.save_pretrained(folder)")
            return files
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{index} is not a readable weight index", repr(error), "fetch the file again") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise BadInput(f"{index.name} names {name!r}", "that is no safetensors file of this folder",
                               "do not trust this checkpoint")
            if not (folder / name).exists():
                raise BadInput(f"shard {name} is missing", f"{index.name} lists it", "fetch the checkpoint again")
        return [folder / name for name in sorted(names)]


def targets(model: Decoder) -> Iterator[tuple[str, Tensor, Piece]]:
    """(our name, parameter, piece of it) for every tensor of the Hub."""
    table = expand(find(model.spec.family).names, len(model.spec.layers))
    parts = {f"{n}.{w}": m.parts for n, m in model.named_modules() if isinstance(m, Linear) for w in ("weight", "bias")}
    for name, parameter in model.named_parameters():
        for piece in pieces(table[name], parts.get(name, (parameter.shape[0],))):
            yield name, parameter, piece


def fill(model: Decoder, folder: Path) -> None:
    """Every parameter pulls its tensors; anything missing, unused or of another shape is an error with its name."""
    with ExitStack() as stack:
        weights = Weights(folder, stack, model.spec)
        weights.check(model)
        weights.fill(model)


def save(model: Decoder, folder: str | os.PathLike[str], *, tokenizer: Any = None, generation: dict[str, Any] | None = None) -> None:
    """Writes config.json, model.safetensors (and the tokenizer's files) so that transformers opens the folder.

    The folder appears whole or not at all. `generation`: fields of generation_config.json, e.g. eos_token_id.
    """
    with atomic_folder(folder) as new:
        write_model(model, new, generation)
        if tokenizer is not None:
            tokenizer.save(new)


def write_model(model: Decoder, folder: Path, generation: dict[str, Any] | None = None) -> None:
    tensors: dict[str, Tensor] = {}
    for _, parameter, piece in targets(model):
        # safetensors refuses views that share storage
        tensors[piece.name] = piece.of(parameter.detach()).to("cpu").clone(memory_format=torch.contiguous_format)
    with torch.device("meta"):
        whole = {piece.name for _, _, piece in targets(Decoder(model.spec))}
    if whole != set(tensors):
        raise BadInput("this model cannot be saved as a float checkpoint", f"it lacks {min(whole ^ set(tensors))} as such",
                       "an INT8 folder is made from the float one: pellucid quantize")
    config = config_of(model.spec) | {"dtype": str(model.embed.weight.dtype).removeprefix("torch."), **(generation or {})}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if generation is not None:
        write_atomic(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
