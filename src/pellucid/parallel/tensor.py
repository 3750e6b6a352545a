"""Tensor parallelism: every process computes with its part of each layer, and sums make the results whole.

    q, k, v = rows of W x        heads of this process            partial = o[:, mine] heads        x + sum of partials
    gate, up = rows of W x       channels, or experts, of it      partial = down[:, mine] ...       x + sum of partials

So a layer needs two sums over the processes (Megatron-LM, arXiv 1909.08053). They stand in hooks on mixer and feed-forward: the
blocks are the ordinary ones. The embedding looks up its own rows and sums; the head gives the logits of its own rows, which
are gathered. All that is computed from whole states (norms, routers) is computed by all, and is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.errors import BadInput
from pellucid.models.families import family_of
from pellucid.models.hub import allocate, blank, main_layers, read_config, spec_of, stated_dtype, tied_as_stored
from pellucid.models.names import Piece, targets
from pellucid.models.weights import Weights
from pellucid.nn import Decoder, DecoderSpec
from pellucid.parallel.group import ALONE, Group
from pellucid.parallel.rounded import Rounding, check_groups
from pellucid.parallel.split import Cut, Slice, cuts, part_spec
from pellucid.quant import bits_of
from pellucid.runtime import dtype_of, forget_pages


class DecoderPart(Decoder):
    """What one process holds and computes of a decoder: called by all of them with the same tokens, it gives the whole's results.

    spec: of the part (heads and widths are its own; `vocab` is the whole's).  whole: the spec of all together.  mixing: the group that shares
    mixers, embedding and head, where it is a smaller one; what feed-forwards give is left a partial sum then.
    """

    def __init__(self, whole: DecoderSpec, share: Slice, group: Group, mixing: Group | None = None):
        spec = part_spec(whole, share)
        rows = -(-whole.vocab // share.inner.size)
        super().__init__(replace(spec, vocab=rows))
        self.spec, self.whole, self.share, self.inner, self.group = spec, whole, share, share.inner, group
        self.mixing = mixing or (group if share.mixers is None else ALONE)
        self.rows = rows
        self.cuts: dict[str, Cut] = {}  # what it holds of each parameter of the whole
        layer: Any
        for layer in (*self.layers, *(ahead.block for ahead in self.mtp)):
            if share.inner.size > 1:
                layer.mixer.register_forward_hook(self._summed)
            if share.mixers is None:
                layer.ffn.register_forward_hook(self._summed)

    def _summed(self, module: nn.Module, inputs: Any, partial: Tensor) -> Tensor:
        return self.mixing.sum(partial)

    def embedded(self, tokens: Tensor) -> Tensor:
        if self.inner.size == 1:
            return super().embedded(tokens)
        own = tokens - self.inner.rank * self.rows
        here = (own >= 0) & (own < self.rows)
        return self.mixing.sum(super().embedded(own.clamp(0, self.rows - 1)) * here[..., None])

    def logits(self, hidden: Tensor) -> Tensor:
        own = super().logits(hidden)
        if self.inner.size == 1:
            return own
        return self.mixing.gather(own).movedim(0, -2).flatten(-2)[..., : self.whole.vocab]


def load_part(
    folder: Path, share: Slice, group: Group, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", bits: int | None = None,
    mtp: bool = False, mixing: Group | None = None,
) -> tuple[DecoderPart, int]:
    """The part of a checkpoint's model, in eval mode, and the bytes that were read for it: of unquantized tensors its own slices.
    bits: of its matrices, 8 or 4 (then `dtype` is not asked; see parallel/rounded.py); None: as the dtype says.
    mtp: with the layers of multi-token prediction.  mixing: as in `DecoderPart`.
    Raises BadInput where the model cannot be cut so, and for what `pellucid.load` refuses."""
    fields = read_config(folder)
    spec = spec_of(fields)
    if not isinstance(spec, DecoderSpec):
        raise BadInput(f"{folder} holds no decoder", "only decoders are served by several processes", "use one process")
    with ExitStack() as stack:
        weights = Weights(folder, stack, family_of(spec))
        spec = tied_as_stored(spec, weights)
        whole: Any = blank(spec)
        if spec.mtp and not weights.hold(whole, "mtp.", main_layers(whole)):
            spec = replace(spec, mtp=())
            whole = blank(spec)
        weights.check(whole, main_layers(whole))
        with torch.device("meta"):
            part = DecoderPart(spec if mtp else replace(spec, mtp=()), share, group, mixing)
        if bits == 4:
            check_groups(whole, share)
        if bits is not None:  # rounded from the file's own numbers
            dtype = torch.float32 if bits_of(fields) else dtype_of(stated_dtype(fields, weights))
        allocate(part, dtype, torch.device(device))  # memory that is used when it is filled
        part.cuts = dict(cuts(whole, part, share))
        read = fill_part(part, whole, weights, share, None if bits is None else Rounding(part, share, bits))
    if bits is not None:
        part.float().requires_grad_(False)
    return part.eval(), read


@torch.no_grad()
def fill_part(part: DecoderPart, whole: Decoder, weights: Weights, share: Slice, filled: Callable[[str], None] | None = None) -> int:
    """Every parameter pulls its slices of the Hub's tensors; returns the bytes read.  filled: is told each module of the part when its own
    parameters are."""
    found, parameters, read = part.cuts, dict(part.named_parameters()), 0
    for name, cut in found.items():
        rows = None if cut.rows is None else sum(stop - start for start, stop in cut.rows)
        if cut.empty or (rows is not None and rows < len(parameters[name])):  # zeros where nothing comes: rows that fill up the vocabulary
            parameters[name].zero_()
    modules = {name.rpartition(".")[0] for name in found}
    pieces = targets(whole, weights.family.names, main_layers(whole), weights)
    for module, group in groupby(pieces, key=lambda target: target[0].rpartition(".")[0]):
        for name, parameter, piece in group:
            read += _fill(found.get(name, Cut(empty=True)), piece, parameter, parameters.get(name), weights)  # empty: of a layer left out
        if filled is not None and module in modules:
            for name in [name for name in parameters if name.rpartition(".")[0] == module]:
                del parameters[name]
            filled(module)
    return read


def _fill(cut: Cut, piece: Piece, whole: Tensor, part: Tensor | None, weights: Weights) -> int:
    """Copies what the part holds of one of the Hub's tensors; the bytes that were read."""
    if part is None or cut.empty or (cut.experts is not None and piece.expert is not None and not cut.experts[0] <= piece.expert < cut.experts[1]):
        return 0
    coded = piece.name not in weights.where or any(scales in weights.where for scales in weights.companions(piece.name))
    tensor, read = weights.get(piece.name), 0
    for mine, theirs in _pairs(cut, piece, whole, part, tensor):
        mine.copy_(theirs)
        read += theirs.nbytes
    if coded:  # codes are decoded whole
        return tensor.nbytes
    forget_pages(tensor.data_ptr(), tensor.nbytes)
    return read


def _pairs(cut: Cut, piece: Piece, whole: Tensor, part: Tensor, tensor: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(view of the part's parameter, view of the Hub's tensor) of one shape, for what both hold."""
    if cut.experts is not None:
        start, stop = cut.experts
        if piece.expert is not None:
            return [(replace(piece, expert=piece.expert - start).ours(part), piece.theirs(tensor))]
        return [(piece.ours(part), piece.theirs(tensor)[start:stop])]
    if cut.rows is None and cut.columns is None:
        return [(piece.ours(part), piece.theirs(tensor))]
    a, b = piece.rows or (0, len(whole))
    theirs = piece.theirs(tensor)
    if piece.transposed and piece.within is None:
        theirs = theirs.mT
    if cut.columns is not None:
        assert piece.within is None, "no file stores grouped rows of a matrix that is cut by columns"
        return [(part[a:b], theirs.narrow(-1, cut.columns[0], cut.columns[1] - cut.columns[0]))]
    views, at, width = [], 0, piece.within[1] if piece.within else 1
    for start, stop in cut.rows or ():
        x, y = max(a, start), min(b, stop)
        if x < y:
            mine = part.narrow(0, at + x - start, y - x)
            views.append((mine.unflatten(0, (-1, width)) if piece.within else mine, theirs.narrow(0, (x - a) // width, (y - x) // width)))
        at += stop - start
    return views
