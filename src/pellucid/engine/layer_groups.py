"""Groups of layers that share a table of blocks: those that read every token before them, and those that read a window of the last.

A block holds `size` tokens of one group's layers. All layers of a group need the same tokens, so that a request has one table of
blocks for each group, and the table of a window gives back what fell behind: the memory of window layers does not grow with
the context. Groups have equally many layers (the last of a kind may have fewer), so that any block serves any group: one pool,
and no share to be guessed (vLLM's hybrid groups, transformers' sectors).

    Gemma 3, 1B    26 layers, 22 of them with a window, n = 4    windows 4 4 4 4 4 2, full 4
    gpt-oss        half and half                                 windows 12, full 12
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pellucid.nn.count import cache_shapes
from pellucid.nn.specs import DecoderSpec
from pellucid.runtime import Choice

MOST_GROUPS = 8
"""A step notes the new tokens of every group: more groups would save little more."""


@dataclass(frozen=True)
class Group:
    """window: tokens that its layers read, the reading one included; None: all."""

    window: int | None
    layers: tuple[int, ...]


def one_group(spec: DecoderSpec) -> list[Group]:
    """All layers keep all tokens."""
    return [Group(None, tuple(range(len(spec.layers))))]


def layer_groups(spec: DecoderSpec, apart: bool = True) -> Choice:
    """The groups of a model's layers, and why.  apart False: windows keep all tokens."""
    kinds: dict[int | None, list[int]] = {}
    for i, layer in enumerate(spec.layers):
        if cache_shapes(layer.mixer):
            kinds.setdefault(window_of(layer.mixer, spec.limit), []).append(i)
    if not any(kinds):
        return Choice(one_group(spec), "no layer has a window that is shorter than the context")
    if not apart:
        return Choice(one_group(spec), "layers with a window keep all tokens: so it was asked")
    if len({tuple(cache_shapes(spec.layers[i].mixer)) for layers in kinds.values() for i in layers}) > 1:
        return Choice(one_group(spec), "layers with a window keep all tokens: the layers' entries differ in shape, and could not share blocks")
    total = sum(map(len, kinds.values()))
    n = max(min(map(len, kinds.values())), -(-total // MOST_GROUPS))
    groups = [Group(window, tuple(layers[at : at + n])) for window, layers in kinds.items() for at in range(0, len(layers), n)]
    return Choice(groups, "layers with a window give back what falls behind it")


def window_of(mixer: Any, context: int) -> int | None:
    """None where a mixer reads everything."""
    window = None if getattr(mixer, "reach", None) is not None else getattr(mixer, "window", None)
    return None if window is None or window >= context else window


def windows_of(groups: Sequence[Group]) -> tuple[int | None, ...]:
    return tuple(group.window for group in groups)
