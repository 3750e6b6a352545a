"""LoRA adapters (arXiv 2106.09685) beside one model: requests with different ones, and with none, run in one engine.

    adapter = read_adapter("my-lora", model)     # PEFT's adapter_config.json and adapter_model.safetensors
    Request(prompt, params, namespace="my-lora", adapter=adapter)

A linear layer computes x W^T + x A^T B^T, with small A and B. The weights stay as they are: an adapter is applied for the
length of one forward pass. (For training adapters see nn/lora.py.) Read: LORA on linear layers, with rsLoRA's scaling and
patterns of rank and alpha. Refused, by name: DoRA, trained biases, modules saved whole, adapters of embeddings, of the head
and of experts.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.errors import BadInput
from pellucid.models.families import family_of
from pellucid.models.hub import blank, local_folder, main_layers
from pellucid.models.lora import read_peft, scale_of
from pellucid.models.names import Piece, targets
from pellucid.parallel import DecoderPart
from pellucid.parallel.split import Cut

LEFT, RIGHT = ".lora_A.weight", ".lora_B.weight"
UNCALLED = ".kv_b.weight"  # latent attention multiplies parts of it by themselves


@dataclass(frozen=True)
class LowRank:
    """What is added to a linear layer: A (r, in), B (out, r), already scaled. A layer of several stacked matrices (q, k, v) has the
    A of each stacked, and B in blocks."""

    A: Tensor
    B: Tensor

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """A forward hook."""
        x = inputs[0]
        return output + (x.to(self.A.dtype) @ self.A.mT @ self.B.mT).to(output.dtype)


@dataclass(frozen=True, eq=False)
class Adapter:
    """layers: by the name of the linear module that they change.  number: among those of several processes (engine/shared_adapters.py)."""

    name: str
    layers: Mapping[str, LowRank]
    number: int = -1


@contextlib.contextmanager
def applied(model: nn.Module, adapter: Adapter | None) -> Iterator[None]:
    """Inside, the model's own forward computes with the adapter. Not for two threads at once."""
    changes = {} if adapter is None else adapter.layers
    handles = [model.get_submodule(name).register_forward_hook(change) for name, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_adapter(path: str | os.PathLike[str], model: nn.Module, name: str = "") -> Adapter:
    """BadInput where it is no adapter, asks for what is not supported, or does not fit the model. Of a part of a model it is cut as the
    matrices are."""
    folder = local_folder(path, weights=False)
    config, tensors = read_peft(folder)
    part, weight = model if isinstance(model, DecoderPart) else None, next(model.parameters())
    layers = placed(tensors, config, model.spec if part is None else part.whole, folder.name)
    if part is not None:
        layers = {module: cut_like(change, part.cuts[f"{module}.weight"]) for module, change in layers.items()}
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    return Adapter(name or folder.name, {module: LowRank(change.A.to(weight.device, dtype), change.B.to(weight.device, dtype))
                                         for module, change in layers.items()})


def cut_like(change: LowRank, cut: Cut) -> LowRank:
    """What a process adds that holds `cut` of the matrix: the same rows of B; or the same columns of A, whose products are a partial sum."""
    A = change.A if cut.columns is None else change.A[:, cut.columns[0] : cut.columns[1]].contiguous()
    return LowRank(A, change.B if cut.rows is None else torch.cat([change.B[start:stop] for start, stop in cut.rows]))


def placed(tensors: dict[str, Tensor], config: dict[str, Any], spec: Any, name: str) -> dict[str, LowRank]:
    """Each pair A, B at the rows of our module that its matrix fills, in a model of `spec`."""
    family, model = family_of(spec), blank(spec)
    spots: dict[str, list[tuple[str, tuple[int, ...], Piece]]] = defaultdict(list)
    for ours, parameter, piece in targets(model, family.names, main_layers(model)):
        spots[piece.name].append((ours, tuple(parameter.shape), piece))
    found: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    left = set(tensors)
    for key in sorted(k for k in tensors if k.endswith(LEFT)):
        stem = key.removesuffix(LEFT)
        module = stem.removeprefix("base_model.model.")
        hub = f"{module}.weight"
        for pattern, replacement in family.renames:
            hub = re.sub(pattern, replacement, hub)
        pieces = spots.get(hub, [])
        fits = pieces and all(len(shape) == 2 and piece.expert is None and ours.startswith("layers.") and not ours.endswith(UNCALLED)
                              for ours, shape, piece in pieces)
        if not fits or stem + RIGHT not in tensors:
            continue
        left -= {key, stem + RIGHT}
        ours, shape, piece = pieces[0]
        A, B = tensors[key], tensors[stem + RIGHT]
        rows = [spread(B * scale_of(config, module, len(A)), piece, shape) for _, _, piece in pieces]
        if any(r is None for r in rows) or A.shape != (B.shape[1], shape[1]):
            raise BadInput(f"{module} of the adapter {name} is {tuple(A.shape)} and {tuple(B.shape)}", f"the model's matrix is {piece.shape}",
                           "use the adapter with the model that it was trained on")
        found[ours.removesuffix(".weight")].append((A, torch.stack([r for r in rows if r is not None]).sum(0)))
    if left or not found:
        raise BadInput(f"the adapter {name} does not fit this model", f"no place for {', '.join(sorted(left)[:4]) or 'anything'}"
                       + (" ..." if len(left) > 4 else ""), "use it with the model that it was trained on")
    return {module: LowRank(torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], 1)) for module, pairs in found.items()}


def spread(B: Tensor, piece: Piece, shape: tuple[int, ...]) -> Tensor | None:
    """B (rows of the Hub's matrix, r) as (rows of ours, r), zero where other matrices stand; None where it does not fit."""
    out = torch.zeros(shape[0], B.shape[1])
    try:
        ours, theirs = piece.ours(out), piece.theirs(B.float().mT if piece.transposed else B.float())
        if ours.shape != theirs.shape:
            return None
        ours.copy_(theirs)
    except RuntimeError:  # rows that no view can cut so
        return None
    return out
