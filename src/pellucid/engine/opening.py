"""The model of a folder or Hub id as an engine is to run it."""

from __future__ import annotations

import os
from pathlib import Path

from pellucid.errors import BadInput
from pellucid.events import note
from pellucid.messages import add, say
from pellucid.models import load
from pellucid.models.hub import local_folder, read_config, spec_of
from pellucid.nn import Decoder, DecoderSpec
from pellucid.quant import bits_of, held_bytes, left_float, quantize
from pellucid.runtime import choose_device
from pellucid.tokenizers import Tokenizer

add({
    "llm.quantized": ("{folder}: INT{bits} weights made while loading, {after} MB in memory ({before} MB as stored)",
                      "{folder}：加载时量化为 INT{bits}，内存中 {after} MB（原为 {before} MB）"),
    "llm.left": ("; not quantized: {names}", "；未量化：{names}"),
})


def spec_at(model: str | os.PathLike[str] | Decoder) -> DecoderSpec:
    """Without loading it."""
    spec = model.spec if isinstance(model, Decoder) else spec_of(read_config(local_folder(model, weights=False)))
    if not isinstance(spec, DecoderSpec):
        raise BadInput(f"{model} generates no text", f"it is a {type(spec).__name__.removesuffix('Spec').lower()} model", "give a language model")
    return spec


def common_ids(tokenizer: Tokenizer, draft: Tokenizer) -> int:
    """Ids below it mean the same to both tokenizers; added tokens may differ. BadInput where their vocabularies are two."""
    if tokenizer.source.data["model"].get("vocab") != draft.source.data["model"].get("vocab"):
        raise BadInput("the draft model has another vocabulary", f"{draft.vocab_size} tokens and {tokenizer.vocab_size}: the same id is not the same text",
                       "use two models of one family")
    return min(tokenizer.vocab_size, draft.vocab_size)


def open_draft(path_or_id: str | os.PathLike[str], dtype: str, device: str, allow_missing: bool, bits: int | None) -> Decoder:
    """A draft model beside one that is opened with the same options: its folder may hold other bits than are asked for."""
    stored = bits_of(read_config(local_folder(path_or_id)))
    return open_model(path_or_id, dtype, device, allow_missing, None if stored else bits)


def bits_to_run(folder: Path, asked: int | None, device: str) -> int | None:
    """Of the weights in products: 8 or 4 where the folder holds such, or they are asked for; else None. BadInput where that cannot be."""
    stored = bits_of(read_config(folder))
    if stored and asked not in (None, stored):
        raise BadInput(f"{folder} holds INT{stored} weights", f"INT{asked} was asked for", "leave out --quantize, or give the float checkpoint")
    if (bits := stored or asked) and device != "auto" and choose_device(device).value.type != "cpu":
        raise BadInput(f"INT{bits} models do not run on {device} yet", "their products are made for the CPU",
                       "use --device cpu, or the float checkpoint")
    return bits


def open_model(
    path_or_id: str | os.PathLike[str], dtype: str = "float32", device: str = "cpu", allow_missing: bool = False, bits: int | None = None,
) -> Decoder:
    """The model of a folder or Hub id as it is to run: with INT8 or INT4 products where the folder holds such weights, or `bits` asks
    for them. Then each matrix is rounded from the file's own numbers, and its float form given back: both are never there as a whole."""
    folder = local_folder(path_or_id)
    stored, bits = bits_of(read_config(folder)), bits_to_run(folder, bits, device)
    if bits is None:
        return load(folder, dtype=dtype, device=device, allow_missing=allow_missing)  # type: ignore[no-any-return]
    model = load(folder, dtype="float32" if stored else "auto", allow_missing=allow_missing)
    before = sum(p.nbytes for p in model.parameters())
    small = quantize(model, bits=bits, consume=True)
    if not stored:
        left = ", ".join(f"{name} ({count:,})" for name, count in left_float(small).items())
        note(say("llm.quantized", folder=folder.name, bits=bits, after=f"{held_bytes(small) / 1e6:,.0f}", before=f"{before / 1e6:,.0f}")
             + (say("llm.left", names=left) if left else ""))
    return small
