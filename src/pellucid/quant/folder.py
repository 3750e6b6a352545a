"""INT8 and INT4 checkpoint folders: each matrix as codes under its own name, its scales as `<name>_scale`.

int8 codes have a scale for each row; 4-bit codes lie two to a byte (ops/int4.py), with a scale for each group of a row. Experts that
stand in one tensor (E, out, in) are as many matrices. Where a file holds a matrix transposed (GPT-2, gpt-oss), the scales of INT8
stand for its columns; in 4 bits it stays as it is and is rounded when the folder is opened.

Made from a float folder, tensor by tensor: no model is built, so a checkpoint larger than memory can be quantized.
Everything else (names, config.json, tokenizer) stays as it is in the Hugging Face folder; config.json gains
`quantization_config`. Reading multiplies codes by scales, which is exact (see `quantize_rows`), so `quantize` of the
model that was read gives the file's numbers again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pellucid.errors import BadInput
from pellucid.files import atomic_folder, write_atomic
from pellucid.ops.int4 import int4_pack
from pellucid.quant.int4 import GROUP, quantize_groups
from pellucid.quant.int8 import check_bits, quantize_rows

METHODS = {8: "pellucid-int8", 4: "pellucid-int4"}
WEIGHTS = {8: "symmetric, one scale a row", 4: f"symmetric, one scale for {GROUP} in a row; embedding and head as int8 with one scale a row"}
TABLES = re.compile(r"embed_tokens|lm_head|wte|word_embeddings")  # by their names, where nobody says what a tensor is
FLOAT = re.compile(r"\.(gate|router)\.weight$|wpe|position_embeddings|bias$")
KEPT = {".json", ".jinja", ".txt", ".model", ".tiktoken"}  # tokenizer, generation settings; weights are written anew


def bits_of(config: dict[str, Any]) -> int | None:
    """8 or 4 where config.json describes a folder that `compress` wrote."""
    about = config.get("quantization_config")
    method = about.get("quant_method") if isinstance(about, dict) else None
    return next((bits for bits, name in METHODS.items() if name == method), None)


def is_int8(config: dict[str, Any]) -> bool:
    return bits_of(config) == 8


@dataclass
class Compressed:
    """size: bytes of the folder's tensors.  kept: matrices of products that could not be written as codes, and why."""

    size: int = 0
    kept: dict[str, str] = field(default_factory=dict)


def compress(source: str | os.PathLike[str], out: str | os.PathLike[str], bits: int = 8, matrices: Mapping[str, str] | None = None) -> Compressed:
    """The float checkpoint in folder `source` as an INT8 or INT4 folder `out`.

    `out` appears whole or not at all; an earlier model folder there is replaced, any other folder is refused. matrices: which tensors
    are matrices of products, and how they lie, as `models.hub.matrices_of` tells; without it all that look like it by shape and name.
    """
    source, out = Path(source), Path(out)
    check_bits(bits)
    check_folders(source, out)
    config = read_config(source)
    skipped = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    tensors: dict[str, Tensor] = {}
    told = Compressed()
    for name, tensor in float_tensors(source):
        if name in skipped:
            continue
        kind = guessed(name, tensor) if matrices is None else matrices.get(name)
        if kind is None or not tensor.is_floating_point():
            tensors[name] = tensor
        elif kind == "columns" and bits == 4:
            tensors[name], told.kept[name] = tensor, "the file holds it transposed; it is rounded when the folder is opened"
        else:
            tensors[name], tensors[f"{name}_scale"] = rounded(tensor, kind, bits)
    with atomic_folder(out) as new:
        for entry in source.iterdir():
            if entry.is_file() and entry.suffix in KEPT and entry.name != "model.safetensors.index.json":
                shutil.copyfile(entry, new / entry.name)
            elif entry.name == "additional_chat_templates":
                shutil.copytree(entry, new / entry.name)
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        body = config | {"dtype": "float32", "quantization_config": description(bits)}
        write_atomic(new / "config.json", json.dumps(body, indent=2) + "\n")
    told.size = sum(t.numel() * t.element_size() for t in tensors.values())
    return told


def guessed(name: str, tensor: Tensor) -> str | None:
    """What a tensor is, by its name and shape alone."""
    if tensor.ndim != 2 or FLOAT.search(name):
        return None
    return "table" if TABLES.search(name) else "rows"


def rounded(weight: Tensor, kind: str, bits: int) -> tuple[Tensor, Tensor]:
    """What stands in the file: codes, and their scales.  weight (..., rows, columns)"""
    if kind == "columns":
        codes, scale = rounded(weight.mT, "rows", bits)
        return codes.mT.contiguous(), scale.mT.contiguous()
    lead, rows = weight.shape[:-1], weight.flatten(0, -2)
    if bits == 8 or kind == "table" or weight.shape[-1] % GROUP:
        codes, scale = quantize_rows(rows)
    else:
        codes, scale = quantize_groups(rows)
        codes = int4_pack(codes)
    return codes.unflatten(0, lead), scale.unflatten(0, lead)


def description(bits: int) -> dict[str, Any]:
    return {"quant_method": METHODS[bits], "bits": bits, "weights": WEIGHTS[bits], "scale_suffix": "_scale"}


def check_folders(source: Path, out: Path) -> None:
    """Refuse to write over what is read, or over a folder that holds no model."""
    if out.exists() and (not out.is_dir() or out.resolve() == source.resolve()):
        raise BadInput(f"cannot write the quantized model to {out}", "it is the source itself" if out.is_dir() else "it is a file",
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
