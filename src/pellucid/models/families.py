"""The table of families: `model_type` -> how to read its config.json and what its tensors are called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pellucid.errors import BadInput, nearest
from pellucid.models.config import Config, dual_chunk_fields
from pellucid.models.names import Names

T = TypeVar("T")
MODULES = ("bert", "clip", "deepseek", "gemma", "gpt2", "gpt_oss", "llama", "mistral", "mixtral", "phi",
           "qwen", "qwen1", "qwen_moe", "qwen_next", "transformer")
"""The files of families."""


@dataclass(frozen=True)
class Family:
    model_type: str
    architecture: str | Callable[[Any], str]  # the class that transformers opens it with, perhaps by the spec
    names: Names
    spec: Callable[[Config], Any]
    fields: Callable[[Any], dict[str, Any]]  # the inverse: what of config.json a spec decides
    renames: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) for names of files that spell them otherwise
    ignored: tuple[str, ...] = ()  # patterns of names that stand in files and fill nothing
    variant: Callable[[Any], dict[str, Any]] = lambda spec: {}  # fields of this record that are otherwise for some specs

    @property
    def prefix(self) -> str:
        """What files of the bare base model lack (`model.`, `transformer.`)."""
        first = next(iter(self.names.values()))[0]
        return (first if isinstance(first, str) else first[0]).split(".")[0] + "."


FAMILIES: dict[str, Family] = {}


def family(
    model_type: str, architecture: str | Callable[[Any], str], names: Names, fields: Callable[[Any], dict[str, Any]],
    renames: tuple[tuple[str, str], ...] = (), ignored: tuple[str, ...] = (),
    variant: Callable[[Any], dict[str, Any]] = lambda spec: {},
) -> Callable[[Callable[[Config], T]], Callable[[Config], T]]:
    """Registers a function config -> spec, and the one that goes back."""

    def register(spec: Callable[[Config], T]) -> Callable[[Config], T]:
        FAMILIES[model_type] = Family(model_type, architecture, names, spec, fields, renames, ignored, variant)
        return spec

    return register


def find_all() -> dict[str, Family]:
    """All families; their files register themselves."""
    for module in MODULES:
        importlib.import_module(f"pellucid.models.{module}")
    return FAMILIES


def find(model_type: str) -> Family:
    find_all()
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = sorted(FAMILIES)
        raise BadInput(f"model_type {model_type!r} is not supported{nearest(str(model_type), known)}",
                       next=f"supported families: {', '.join(known)}")
    return FAMILIES[model_type]


def family_of(spec: Any) -> Family:
    """The family of a spec, as it is for this one."""
    found = find(spec.family)
    return replace(found, **found.variant(spec))


def unwrapped(fields: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes a language model: multimodal files keep it under `text_config`."""
    text = fields.get("text_config")
    if not isinstance(text, dict) or fields.get("model_type") in FAMILIES:
        return fields
    outer = {name: fields[name] for name in ("tie_word_embeddings", "dtype", "torch_dtype", "eos_token_id") if name in fields}
    return {**outer, **text}


def config_of(spec: Any) -> dict[str, Any]:
    """The config.json (transformers 5 spelling) of a spec: the inverse of the family's function."""
    f = find(spec.family)
    architecture = f.architecture if isinstance(f.architecture, str) else f.architecture(spec)
    return {**dict(spec.extra), "architectures": [architecture], "model_type": spec.family, **f.fields(spec), **dual_chunk_fields(spec)}
