"""The inspector: what is in a model, from its config.json alone.

Everything is counted from the specs that build the model (nn/count.py). Weights are not needed and not read; where
files are there, their headers tell in which formats the weights are stored.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pellucid.errors import BadInput
from pellucid.models import known
from pellucid.models.families import unwrapped
from pellucid.models.hub import local_folder, read_config, shape_of, spec_of
from pellucid.models.weights import stored_dtypes
from pellucid.nn.count import cache_bytes, count, forward_flops, image_flops, layer_norms
from pellucid.nn.specs import DecoderSpec, DualEncoderSpec, EncoderDecoderSpec, Layer, MoE
from pellucid.ops.cache_codes import CacheCodes, cache_codes
from pellucid.tokenizers import Tokenizer

AHEAD = "multi-token prediction"
OUTER = {"embedding", "embed", "target_embed", "positions", "types", "head"}
"""Words in the names of parts that are left out of `active_without_embeddings`."""


@dataclass(frozen=True)
class Part:
    """Parameters of one kind, and how many of them one token meets."""

    name: str
    parameters: int
    active: int


@dataclass(frozen=True)
class Kind:
    """Layers that are all alike.  cache_bytes: of one token in all of them;  state_bytes: what they keep whatever the length."""

    layers: list[int]
    mixer: str
    ffn: str
    cache_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    active_parameters: those that one token meets, embedding and head counted (see `active_without_embeddings`).
    kv_bytes_per_token: in `cache_dtype`.  flops_per_token: forward, beside an empty cache; `flops(context)` beside a
    longer one.  stored: format -> parameters in the files, empty without files.
    """

    name: str
    spec: Any
    shape: str
    parts: list[Part]
    dtype: str
    cache_dtype: str
    kinds: list[Kind] = field(default_factory=list)
    stored: dict[str, int] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Of the model itself: each tensor once, layers of multi-token prediction apart (`ahead_parameters`)."""
        return sum(part.parameters for part in self.parts if part.name != AHEAD)

    @property
    def ahead_parameters(self) -> int:
        return sum(part.parameters for part in self.parts if part.name == AHEAD)

    @property
    def active_parameters(self) -> int:
        return sum(part.active for part in self.parts)

    @property
    def active_without_embeddings(self) -> int:
        return sum(part.active for part in self.parts if OUTER.isdisjoint(part.name.split()))

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(kind.cache_bytes for kind in self.kinds)

    @property
    def state_bytes(self) -> int:
        """Of one sequence, whatever its length (linear attention)."""
        return sum(kind.state_bytes for kind in self.kinds)

    @property
    def flops_per_token(self) -> int:
        return self.flops(1)

    @property
    def training_flops_per_token(self) -> int:
        """Forward and backward: three times forward."""
        return 3 * self.flops_per_token

    def flops(self, context: int) -> int:
        """Forward FLOPs of one token that sees `context` tokens, itself included; of shapes of two sides: see `forward_flops`."""
        return forward_flops(self.spec, context)

    @property
    def flops_per_image(self) -> int | None:
        return image_flops(self.spec) if isinstance(self.spec, DualEncoderSpec) else None

    @property
    def context(self) -> int:
        """Of two encoders: of the text's."""
        return int(self.spec.text.context if isinstance(self.spec, DualEncoderSpec) else self.spec.context)

    @property
    def cross_bytes_per_source_token(self) -> int:
        """What a token of the source leaves for the attentions that cross, in `cache_dtype`; 0 where there are none."""
        crossing = [layer.cross for layer in self.spec.decoder if layer.cross] if isinstance(self.spec, EncoderDecoderSpec) else []
        return sum(cache_bytes(mixer, cache_codes(self.cache_dtype)) for mixer in crossing)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return {
            "name": self.name, "family": self.spec.family, "shape": self.shape, "dtype": self.dtype,
            "parameters": self.parameters, "active_parameters": self.active_parameters,
            "ahead_parameters": self.ahead_parameters,
            "active_without_embeddings": self.active_without_embeddings, "parts": [asdict(part) for part in self.parts],
            "kv_bytes_per_token": self.kv_bytes_per_token, "state_bytes": self.state_bytes, "cache_dtype": self.cache_dtype,
            "cross_bytes_per_source_token": self.cross_bytes_per_source_token,
            "kinds": [asdict(kind) for kind in self.kinds], "context": self.context,
            "flops_per_token": self.flops_per_token, "training_flops_per_token": self.training_flops_per_token,
            "flops_at_full_context": self.flops(self.context), "flops_per_image": self.flops_per_image,
            "stored": self.stored, "tokenizer": self.tokenizer, "spec": asdict(self.spec),
        }


def inspect(target: str | os.PathLike[str], *, cache_dtype: str = "bfloat16") -> Inspection:
    """What is in a model: `target` is a checkpoint folder, a Hub id or the name of a well-known model (`known.names()`).

    Nothing is built but the shapes of models that are no decoder. Raises BadInput for what is none of the three.
    """
    folder, fields = found(target)
    spec = spec_of(fields)
    text = unwrapped(fields)
    codes = cache_codes(cache_dtype)
    decoder = isinstance(spec, DecoderSpec)
    quantization = fields.get("quantization_config")
    quantized = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return Inspection(
        name=str(target), spec=spec, shape=shape_of(spec).__name__, cache_dtype=cache_dtype,
        dtype=str(quantized or text.get("dtype") or text.get("torch_dtype") or "unknown"),
        parts=decoder_parts(spec) if decoder else built_parts(spec),
        kinds=kinds_of(spec, codes) if isinstance(spec, DecoderSpec | EncoderDecoderSpec) else [],
        stored=stored_dtypes(folder) if folder else {}, tokenizer=tokenizer_facts(folder) if folder else {})


def found(target: str | os.PathLike[str]) -> tuple[Path | None, dict[str, Any]]:
    """(the folder if there is one, the fields of config.json)"""
    if not Path(target).exists() and str(target).lower() in known.names():
        return None, known.find_config(str(target))
    try:
        folder = local_folder(target, weights=False)
    except BadInput as error:
        close = known.nearest_name(str(target))
        raise BadInput(error.what, error.why, f"{error.next}{', or a well-known model: ' + close if close else ''}") from error
    return folder, read_config(folder)


def tokenizer_facts(folder: Path) -> dict[str, Any]:
    """What the folder's tokenizer is, or why it cannot be read."""
    try:
        return Tokenizer.load(folder).facts()
    except BadInput as error:
        return {"error": error.what}


# --- counting ---------------------------------------------------------------------------------------------------------


def decoder_parts(spec: DecoderSpec) -> list[Part]:
    """By kind of part. Norms inside mixers (of queries, keys, latents) count with the mixers."""
    D, norm = spec.dim, spec.dim * (2 if spec.norm == "layer" else 1)
    total: Counter[str] = Counter({"embedding": spec.vocab * D, "positions": spec.context * D * (spec.positions == "learned"),
                                   "head": 0 if spec.tied else spec.vocab * D, "norms": norm})
    active = Counter(total)
    for layer in spec.layers:
        for name, parameters, met in layer_parts(layer, D, norm):
            total[name] += parameters
            active[name] += met
    for layer in spec.mtp:  # eh_proj (2D -> D), three norms and a whole layer for each further token; embedding and head are shared
        total[AHEAD] += 2 * D * D + 3 * norm + sum(p for _, p, _ in layer_parts(layer, D, norm))
    return [Part(name, parameters, active[name]) for name, parameters in total.items() if parameters]


def layer_parts(layer: Layer, D: int, norm: int) -> list[tuple[str, int, int]]:
    """(name, parameters, active ones) of one layer."""
    mixer, ffn = count(layer.mixer, D), count(layer.ffn, D)
    rows = [(type(layer.mixer).__name__.lower(), mixer.parameters, mixer.parameters), ("norms", layer_norms(layer, norm), layer_norms(layer, norm))]
    if not isinstance(layer.ffn, MoE):
        return [*rows, ("feed-forward", ffn.parameters, ffn.parameters)]
    m = layer.ffn
    router = m.experts * D + m.experts * (m.select_bias + m.router_bias)
    shared = 3 * D * m.shared + D * m.shared_gate
    routed = ffn.parameters - router - shared
    return [*rows, ("router", router, router), ("shared expert", shared, shared),
            ("experts", routed, routed * m.top_k // m.experts)]


def built_parts(spec: Any) -> list[Part]:
    """By the model's own modules, built without memory: for shapes other than the decoder."""
    with torch.device("meta"):
        model = shape_of(spec)(spec)
    total: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        total[" ".join(word for word in name.split(".")[:-1] if not word.isdigit()) or name] += parameter.numel()
    return [Part(name, parameters, parameters) for name, parameters in total.items()]


def kinds_of(spec: DecoderSpec | EncoderDecoderSpec, codes: CacheCodes) -> list[Kind]:
    """Layers that write and are alike stand together, with what they keep (cache entries in that format, states in 4 bytes)."""
    alike: dict[Layer, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        alike.setdefault(layer, []).append(index)
    return [Kind(numbers, type(layer.mixer).__name__, type(layer.ffn).__name__,
                 cache_bytes(layer.mixer, codes) * len(numbers), 4 * count(layer.mixer, spec.dim).state * len(numbers))
            for layer, numbers in alike.items()]
