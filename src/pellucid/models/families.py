"""The table of families: `model_type` -> how to read its config.json and what its tensors are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pellucid.errors import BadInput, nearest
from pellucid.models.config import Config
from pellucid.models.names import Names
from pellucid.nn.specs import DecoderSpec


@dataclass(frozen=True)
class Family:
    model_type: str
    architecture: str  # the class that transformers opens it with
    names: Names
    spec: Callable[[Config], DecoderSpec]
    fields: Callable[[DecoderSpec], dict[str, Any]]  # the inverse: what of config.json a spec decides


FAMILIES: dict[str, Family] = {}


def family(
    model_type: str, architecture: str, names: Names, fields: Callable[[DecoderSpec], dict[str, Any]],
) -> Callable[[Callable[[Config], DecoderSpec]], Callable[[Config], DecoderSpec]]:
    """Registers a function config -> spec, and the one that goes back."""

    def register(spec: Callable[[Config], DecoderSpec]) -> Callable[[Config], DecoderSpec]:
        FAMILIES[model_type] = Family(model_type, architecture, names, spec, fields)
        return spec

    return register


def find(model_type: str) -> Family:
    from pellucid.models import gemma, gpt2, llama, mistral, phi, qwen  # noqa: F401  (they register themselves)

    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = sorted(FAMILIES)
        raise BadInput(f"model_type {model_type!r} is not supported{nearest(str(model_type), known)}",
                       next=f"supported families: {', '.join(known)}")
    return FAMILIES[model_type]


def config_of(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json (transformers 5 spelling) of a spec: the inverse of the family's function."""
    f = find(spec.family)
    return {**dict(spec.extra), "architectures": [f.architecture], "model_type": spec.family, **f.fields(spec)}
