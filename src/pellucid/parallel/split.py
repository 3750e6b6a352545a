"""What one of several processes holds of a model: names as data, and the spec of its part.

A part is an ordinary model with fewer heads, narrower feed-forwards and fewer experts, so that its blocks are the ordinary
blocks; what its mixer and its feed-forward give is a partial sum (see parallel/tensor.py). `HOW` says along which dimension
each parameter is cut; where exactly follows from the shapes of the whole and of the part:

    ROWS         the rows of each matrix that is stacked in it (q, k, v; gate, up): outputs, that is heads or channels
    COLUMNS      the columns: inputs; its bias belongs to the first process alone, or the sum would hold it several times
    EXPERTS      whole experts (expert parallelism: products stay as large as they were, and files are read by whole tensors)
    VOCABULARY   rows of the embedding and of the head, in equal shares, the last one filled up with zeros

What is not named is held by all: norms, routers, what makes the latents of latent attention (they are small, and their results
are needed whole). With fewer key/value heads than processes, several hold the same one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from pellucid.errors import BadInput
from pellucid.nn import GDN, MLA, MLP, Attn, Decoder, DecoderSpec, Layer, MoE
from pellucid.nn.delta_net import GatedDeltaNet

ROWS, COLUMNS, EXPERTS, VOCABULARY = "rows", "columns", "experts", "vocabulary"
MIXERS = {
    **dict.fromkeys(("qkv", "sinks"), ROWS), "o": COLUMNS,  # attention; o also of latent attention
    **dict.fromkeys(("q", "q_b", "kv_b"), ROWS),  # latent attention
    **dict.fromkeys(("in_proj", "conv", "A_log", "dt_bias"), ROWS), "out": COLUMNS,  # gated delta net
}
FEED_FORWARDS = {
    **dict.fromkeys(("gate_up", "up", "shared.gate_up"), ROWS), **dict.fromkeys(("down", "shared.down"), COLUMNS),
    **dict.fromkeys(("experts.gate_up", "experts.down"), EXPERTS),
}


@dataclass(frozen=True)
class Slice:
    """Which part: `rank` of `size`.  mixers: neighbours that share mixers, embedding and head, where those are fewer (attention is shared out
    by requests instead, see engine/dp_attention.py; with 1 each process holds them whole)."""

    rank: int
    size: int
    mixers: int | None = None

    @property
    def inner(self) -> Slice:
        """Of mixers, embedding and head."""
        return self if self.mixers is None else Slice(self.rank % self.mixers, self.mixers)

    def of(self, total: int) -> tuple[int, int]:
        """(start, stop) of this process's share of `total` things, as equal as they go."""
        return self.rank * total // self.size, (self.rank + 1) * total // self.size

    def how(self, name: str) -> str | None:
        """How one of our parameters is cut; None: everybody holds it."""
        return self.cut(name)[0]

    def cut(self, name: str) -> tuple[str | None, Slice]:
        """How one of our parameters is cut (None: everybody holds it), and among whom."""
        module = name.removesuffix(".weight").removesuffix(".bias")
        inner = self.inner
        if module in ("embed", "head"):
            return VOCABULARY if inner.size > 1 or self.mixers is None else None, inner
        parts = re.sub(r"^mtp\.(\d+)\.block\.", r"layers.\1.", module).split(".", 3)
        if parts[0] != "layers" or len(parts) < 4:
            return None, self
        if parts[2] == "mixer":
            return MIXERS.get(parts[3]) if inner.size > 1 or self.mixers is None else None, inner
        return FEED_FORWARDS.get(parts[3]) if parts[2] == "ffn" else None, self


# --- the part as a spec -------------------------------------------------------------------------------------------------


def part_spec(spec: DecoderSpec, share: Slice) -> DecoderSpec:
    """The spec of the part: the ordinary one, of a smaller model; `vocab` is still that of the whole. BadInput where it cannot be cut
    so, with the numbers that work."""
    return replace(spec, layers=tuple(_layer(layer, share) for layer in spec.layers), mtp=tuple(_layer(layer, share) for layer in spec.mtp))


def check_split(spec: DecoderSpec, size: int, mixers: int | None = None) -> None:
    """BadInput where a model cannot be run by so many processes."""
    part_spec(spec, Slice(0, size, mixers))


def _layer(layer: Layer, share: Slice) -> Layer:
    if layer.cross is not None:
        raise BadInput("an encoder-decoder cannot be split over processes yet", next="use one process")
    mixer = MIXER_PARTS[type(layer.mixer)](layer.mixer, share.inner.size)
    return replace(layer, mixer=mixer, ffn=FFN_PARTS[type(layer.ffn)](layer.ffn, share))


def _attn(m: Attn, size: int) -> Attn:
    _divide(m.heads, size, "attention heads")
    if m.kv_heads % size and size % m.kv_heads:
        raise BadInput(f"{m.kv_heads} key/value heads cannot be shared out to {size} processes",
                       "each holds equally many, or several hold the same one", f"use {fitting(m.heads, lambda n: m.kv_heads % n == 0 or n % m.kv_heads == 0)}")
    return replace(m, heads=m.heads // size, kv_heads=max(1, m.kv_heads // size))


def _mla(m: MLA, size: int) -> MLA:
    return replace(m, heads=_divide(m.heads, size, "attention heads"))


def _gdn(m: GDN, size: int) -> GDN:
    return replace(m, k_heads=_divide(m.k_heads, size, "key heads of linear attention"), v_heads=_divide(m.v_heads, size, "its value heads"))


def _mlp(m: MLP, share: Slice) -> MLP:
    return replace(m, hidden=_divide(m.hidden, share.size, "channels of a feed-forward layer"))


def _moe(m: MoE, share: Slice) -> MoE:
    if m.experts < share.size:
        raise BadInput(f"{m.experts} experts cannot be shared out to {share.size} processes", "each holds some of them", f"use at most {m.experts}")
    return replace(m, held=share.of(m.experts), shared=_divide(m.shared, share.size, "channels of the shared expert"))


MIXER_PARTS: dict[type, Callable[[Any, int], Any]] = {Attn: _attn, MLA: _mla, GDN: _gdn}
FFN_PARTS: dict[type, Callable[[Any, Slice], Any]] = {MLP: _mlp, MoE: _moe}


def _divide(total: int, size: int, what: str) -> int:
    if total % size:
        raise BadInput(f"{total} {what} cannot be shared out to {size} processes", "each holds equally many", f"use {fitting(total)}")
    return total // size


def fitting(total: int, fits: Callable[[int], bool] = lambda n: True) -> str:
    """'1, 2 or 4'"""
    numbers = [str(n) for n in range(1, total + 1) if total % n == 0 and fits(n)]
    return " or ".join(filter(None, (", ".join(numbers[:-1][:6]), numbers[-1])))


# --- where the part's parameters stand in the whole ----------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """What a part holds of a parameter.  rows: (start, stop) in the whole, one behind the other in the part; None: all.  columns,
    experts: (start, stop); None: all.  empty: nothing (zeros stand there)."""

    rows: tuple[tuple[int, int], ...] | None = None
    columns: tuple[int, int] | None = None
    experts: tuple[int, int] | None = None
    empty: bool = False

    @property
    def all(self) -> bool:
        return self == Cut()


def cuts(whole: Decoder, part: nn.Module, share: Slice) -> Iterator[tuple[str, Cut]]:
    """For each parameter of the part. Both may be on the meta device."""
    modules = dict(whole.named_modules())
    for prefix, module in part.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            how, among = share.cut(name)
            yield name, _cut(how, leaf, modules[prefix], module, parameter, among)


def _cut(how: str | None, leaf: str, whole: nn.Module, part: nn.Module, parameter: Tensor, share: Slice) -> Cut:
    shape = getattr(whole, leaf).shape
    if how is None:
        return Cut()
    if how == EXPERTS:
        return Cut(experts=share.of(shape[0]))
    if how == VOCABULARY:
        start = share.rank * len(parameter)
        return Cut(rows=((start, max(start, min(start + len(parameter), shape[0]))),))
    if how == COLUMNS:
        return Cut(empty=share.rank > 0) if leaf == "bias" else Cut(columns=_spot(shape[-1], parameter.shape[-1], share))
    ranges, at = [], 0
    for rows, mine in zip(_stacked(whole, leaf), _stacked(part, leaf), strict=True):
        start, stop = _spot(rows, mine, share)
        ranges.append((at + start, at + stop))
        at += rows
    return Cut(rows=tuple(ranges))


def _spot(total: int, mine: int, share: Slice) -> tuple[int, int]:
    """Of `total` in pieces of `mine`, of which there are as many as processes, or fewer."""
    start = share.rank * (total // mine) // share.size * mine
    return start, start + mine


def _stacked(module: nn.Module, leaf: str) -> tuple[int, ...]:
    if isinstance(module, GatedDeltaNet) and leaf == "conv":  # channels of q, k and v
        return module.keys, module.keys, module.values
    parts: dict[str, tuple[int, ...]] = getattr(module, "stacked", {})
    return parts.get(leaf, (len(getattr(module, leaf)),))


