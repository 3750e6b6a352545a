"""INT8 checkpoint folders: each matrix as int8 codes under its own name, its row scales as `<name>_scale`.

Made from a float folder, tensor by tensor: no model is built, so a checkpoint larger than memory can be quantized.
Everything else (names, config.json, tokenizer) stays as it is in the Hugging Face folder; config.json gains
`quantization_config`. Reading multiplies codes by scales, which is exact (see `quantize_rows`), so `quantize` of the
model that was read gives the file's codes again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pellucid.errors import BadInput
from pellucid.files import atomic_folder, write_atomic
from pellucid.quant.int8 import quantize_rows

METHOD = "pellucid-int8"
DESCRIPTION = {"quant_method": METHOD, "bits": 8, "weights": "symmetric, one scale a row", "scale_suffix": "_scale"}
KEPT = {".json", ".jinja", ".txt", ".model", ".tiktoken"}  # tokenizer, generation settings; weights are written anew


def is_int8(config: dict[str, Any]) -> bool:
    """Whether config.json describes a folder that `compress` wrote."""
    about = config.get("quantization_config")
    return isinstance(about, dict) and about.get("quant_method") == METHOD


def compress(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> int:
    """The float checkpoint in folder `source` as an INT8 folder `out`; returns the bytes of its tensors.

    `out` appears whole or not at all; an earlier model folder there is replaced, any other folder is refused.
    """
    source, out = Path(source), Path(out)
    check_folders(source, out)
    config = read_config(source)
    skipped = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in float_tensors(source):
        if name in skipped:
            continue
        if tensor.ndim == 2 and tensor.is_floating_point():
            tensors[name], tensors[f"{name}_scale"] = quantize_rows(tensor)
        else:
            tensors[name] = tensor
    with atomic_folder(out) as new:
        for entry in source.iterdir():
            if entry.is_file() and entry.suffix in KEPT and entry.name != "model.safetensors.index.json":
                shutil.copyfile(entry, new / entry.name)
            elif entry.name == "additional_chat_templates":
                shutil.copytree(entry, new / entry.name)
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        body = config | {"dtype": "float32", "quantization_config": DESCRIPTION}
        write_atomic(new / "config.json", json.dumps(body, indent=2) + "\n")
    return sum(t.numel() * t.element_size() for t in tensors.values())


def check_folders(source: Path, out: Path) -> None:
    """Refuse to write over what is read, or over a folder that holds no model."""
    if out.exists() and (not out.is_dir() or out.resolve() == source.resolve()):
        raise BadInput(f"cannot write the INT8 model to {out}", "it is the source itself" if out.is_dir() else "it is a file",
                       "choose another folder with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").exists():
        raise BadInput(f"{out} holds something else than a model", "it would be replaced as a whole",
                       "choose a new or empty folder with --out")


def read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} has no readable config.json", str(error), "give a Hugging Face checkpoint folder") from error
    if not isinstance(config, dict) or "quantization_config" in config:
        raise BadInput(f"the model in {folder} is quantized already", str(config)[:80], "give the float checkpoint")
    return config


def float_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the folder's safetensors files, one at a time."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadInput(f"{folder} holds no *.safetensors", next="give a Hugging Face checkpoint folder")
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path.name} is not a whole safetensors file", str(error), "fetch the file again") from error
