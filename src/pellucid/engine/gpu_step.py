"""A step of the engine on a GPU: all layers over the tokens of all requests, with attention by Triton kernels that read the pages
where they lie. What stands between the products is fused where the model is plain (engine/gpu_pass.py).

All tokens of all requests are rows of one pass, whatever they belong to (ops/triton/paged.py); no entry is gathered. The readable
twin is the flat pass of engine/runner.py. A step in which every request gets one token is the same work each time: its launches are
recorded once for each number of rows (CUDA graphs) and replayed, so that Python's time between kernels, which is most of a small
model's step on a GPU, is paid once.

Run so far: on an H200 (`pellucid bench gpu`; experiments/LOG.md says where the time goes), and with the kernels interpreted on a CPU,
the padded batches of the graphs included.
Legend: N tokens of the step, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.engine.gpu_pass import POSITION, REAL, ROW, SOURCE, TOKEN, FusedPass, choose_fused
from pellucid.engine.paged_cache import Pages
from pellucid.engine.scheduler import Part
from pellucid.engine.transfer import to_device
from pellucid.nn import Decoder, MoE
from pellucid.nn.attention import Attention
from pellucid.nn.context import Context, Segment
from pellucid.ops.triton import paged
from pellucid.ops.triton.language import choose_triton
from pellucid.runtime import Choice


class PagesInPlace:
    """A step's tokens, and where their entries lie; speaks as a cache to `nn.attention.Attention`.  numbers (5, N) int64."""

    began = None

    def __init__(self, pages: Pages, numbers: Tensor, tiles: Sequence[paged.Tiles]):
        self.pages, self.tiles, self.request, self.positions = pages, tiles, numbers[ROW], numbers[POSITION]
        self.into = [slots[self.request, self.positions].where(numbers[REAL] > 0, -1) for slots in pages.table.slots]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, sinks: Tensor | None) -> Tensor:
        """q (N, H, 1, d), k, v (N, K, 1, d), of one token each -> (N, H, 1, d)"""
        group, (keys, values) = self.pages.group_of[layer], self.pages.entries[layer]
        paged.write(k[:, :, 0], v[:, :, 0], self.into[group], keys.codes, values.codes)
        return paged.attend(q[:, :, 0], keys.codes, values.codes, self.pages.table.slots[group], self.request, self.positions, self.tiles,
                            window, scale, sinks)[:, :, None]

    def advance(self, tokens: int) -> None:
        """Counters are the requests' own."""


class GpuStep:
    """`hidden(parts)` -> (N, D), rows in the parts' order. `logits` (N, V) of the same rows beside, where the step was recorded: a buffer
    that the next step writes over."""

    def __init__(self, model: Decoder, pages: Pages):
        self.model, self.pages = model, pages
        self.group = max(layer.mixer.heads // layer.mixer.kv_heads for layer in model.spec.layers)  # type: ignore[union-attr]
        self.graphs = choose_graphs(model)
        fused = choose_fused(model, pages)
        self.fused: FusedPass | None = fused.value
        self.reason = f"{fused.reason}; {self.graphs.reason}"
        self.recorded: dict[tuple[int, bool], Recorded] = {}  # by the number of rows, and whether any of them has a long context
        self.tables: list[int] = []  # where the tables of slots lay when they were recorded
        self.drawn = torch.full((pages.places,), -1, dtype=torch.int64, device=pages.device)  # the last step's tokens, by its rows
        self.logits: Tensor | None = None
        self.room: Tensor | None = None  # for the logits of recorded steps, which share it

    def hidden(self, parts: Sequence[Part], same: bool = True, sources: Sequence[int] | None = None) -> Tensor:
        """same: the model is as it always is (an adapter's pass is not).  sources: for each part the row of the last step that draws its
        last token, or -1."""
        numbers, self.logits = self._numbers(parts, sources), None
        if same and self.graphs.value and all(p.count == 1 for p in parts):
            return self._replay(numbers)
        counts, ones = [p.count for p in parts], sum(p.count == 1 for p in parts)
        firsts = np.cumsum([0, *counts[:-1]])
        return self.run(to_device(numbers, self.pages.device), self._tiles(firsts, counts, ones), same)

    def _numbers(self, parts: Sequence[Part], sources: Sequence[int] | None) -> Tensor:
        """(5, N) on the host."""
        stops = [p.start + p.count for p in parts]
        rows = self.pages.table.follow([p.request for p in parts], [p.start for p in parts], stops)
        last = [-1] * len(parts) if sources is None else list(sources)
        if all(p.count == 1 for p in parts):
            tokens = [p.request.tokens[p.start] for p in parts]
            return torch.tensor([tokens, rows, [p.start for p in parts], [1] * len(parts), last])
        tokens = [t for p, stop in zip(parts, stops, strict=True) for t in p.request.tokens[p.start : stop]]
        positions = np.concatenate([np.arange(p.start, stop) for p, stop in zip(parts, stops, strict=True)])
        counts = [p.count for p in parts]
        source = np.full(len(tokens), -1)
        source[np.cumsum(counts) - 1] = last
        return torch.from_numpy(np.stack([tokens, np.repeat(rows, counts), positions, np.ones_like(positions), source]))

    def _tiles(self, firsts: Any, counts: Sequence[int], ones: int) -> list[paged.Tiles]:
        """Parts of one token, which stand first, have tiles of one row; longer ones are cut. (See `segments_of`.)"""
        most, made = paged.chunk_rows(self.group), []
        if ones:
            made.append((firsts[:ones], np.ones(ones, np.int64), 1))
        if ones < len(counts):
            cut = [(first + at, min(most, n - at)) for first, n in zip(firsts[ones:], counts[ones:], strict=True) for at in range(0, n, most)]
            made.append((*np.array(cut, np.int64).T, most))
        arrays = [(to_device(torch.from_numpy(np.stack([f, c])), self.pages.device), most) for f, c, most in made]
        return [paged.Tiles(both[0], both[1], most) for both, most in arrays]

    def run(self, numbers: Tensor, tiles: Sequence[paged.Tiles], same: bool = True) -> Tensor:
        """numbers (5, N) on the device -> (N, D)"""
        if self.fused is not None and same:
            return self.fused.hidden(numbers, tiles, self.drawn)
        return self._layers(numbers, tiles)

    def _layers(self, numbers: Tensor, tiles: Sequence[paged.Tiles]) -> Tensor:
        """The model as it is written: each token a sequence of its own to the mixers, all of them in one segment."""
        dtype, N = self.model.compute_dtype or self.model.embed.weight.dtype, numbers.shape[1]
        cache: Any = PagesInPlace(self.pages, numbers, tiles)
        inner = Context(numbers[POSITION][:, None], dtype, cache=cache)
        flat = Context(numbers[POSITION][None], dtype, segments=[Segment(0, N, N, inner)])
        tokens = torch.where(numbers[SOURCE] < 0, numbers[TOKEN], self.drawn[numbers[SOURCE].clamp_min(0)].clamp_min(0))
        return self.model.run(tokens[None], flat)[0]

    def _replay(self, numbers: Tensor) -> Tensor:
        """The recorded pass of the next larger batch, filled up with rows that write and read nothing."""
        tables = [slots.data_ptr() for slots in self.pages.table.slots]
        if tables != self.tables:  # they have grown, and moved
            self.tables, self.recorded = tables, {}
        n = numbers.shape[1]
        kind = rows_recorded(n), int(numbers[POSITION].max()) >= paged.SHORT
        if kind not in self.recorded:
            self.recorded[kind] = Recorded(self, *kind)
        hidden, logits = self.recorded[kind](numbers)
        self.logits = logits[:n]
        return hidden[:n]

    def room_for(self, rows: int) -> Tensor:
        """(rows, V) for logits; one that a recorded pass holds on to stays where it is."""
        if self.room is None or len(self.room) < rows:
            weight = self.model.head_weight
            self.room = weight.new_empty(max(rows, rows_recorded(self.pages.places)), len(weight), dtype=self.model.compute_dtype or weight.dtype)
        return self.room[:rows]


class Recorded:
    """A pass over so many rows of one token each. On a GPU its launches are recorded when it is first called; on a CPU it just runs."""

    def __init__(self, step: GpuStep, rows: int, long: bool):
        """long: contexts are worth sharing between programs."""
        self.step, device = step, step.pages.device
        self.numbers = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self.tiles = [paged.Tiles(torch.arange(rows, device=device), self.numbers[REAL], 1, long)]
        self.room = step.room_for(rows)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out: tuple[Tensor, Tensor] | None = None

    def __call__(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """numbers (5, n) on the host, n up to `rows` -> hidden states (rows, D) and logits (rows, V), which the next call writes over"""
        n, rows = numbers.shape[1], self.numbers.shape[1]
        if n < rows:
            filler = torch.zeros(5, rows - n, dtype=torch.int64)
            filler[SOURCE] = -1
            numbers = torch.cat((numbers, filler), 1)
        if self.numbers.device.type != "cuda":
            self.numbers.copy_(numbers)
            return self._pass()
        self.numbers.copy_(numbers.pin_memory(), non_blocking=True)
        if self.graph is None:
            self._record()
        assert self.graph is not None and self.out is not None
        self.graph.replay()
        return self.out

    def _pass(self) -> tuple[Tensor, Tensor]:
        hidden = self.step.run(self.numbers, self.tiles)
        if self.step.fused is not None:
            return hidden, self.step.fused.logits(hidden, self.room)
        return hidden, self.room.copy_(self.step.model.logits(hidden))

    def _record(self) -> None:
        """Two passes first, on a stream of their own: kernels are compiled, libraries set up. They write what the replay will write."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._pass()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self._pass()


def rows_recorded(n: int) -> int:
    """1, 2, 4, then multiples of 8: what is filled up costs little, and few passes are recorded."""
    return 1 << (n - 1).bit_length() if n <= 4 else -(-n // 8) * 8


def choose_graphs(model: Decoder) -> Choice:
    """Whether a pass of this model can be recorded: nothing in it may wait for the GPU, or depend on what ran on the host."""
    if any(isinstance(layer.ffn, MoE) for layer in model.spec.layers):
        return Choice(False, "its experts' tokens are counted on the host")
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return Choice(False, "it has hooks, whose Python would run once only")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Choice(False, "it takes part in exchanges between processes")
    return Choice(True, "steps of one token for each request are recorded once and replayed")


def choose_gpu_step(model: Decoder, pages: Pages) -> Choice:
    """A GpuStep, or None, and why."""
    triton = choose_triton(pages.device)
    if not triton.value:
        return Choice(None, triton.reason)
    for layer in model.layers:
        if type(layer.mixer) is not Attention or hasattr(layer, "cross"):
            return Choice(None, f"{type(layer.mixer).__name__} has no Triton kernel over pages")
        spec = layer.mixer.spec
        if spec.rope.by_length or not spec.causal or spec.head_dim > 256:
            return Choice(None, "rotations by the sequence's length, sight of the future, or heads wider than 256 have no Triton kernel")
    if pages.codes.kept not in (torch.float32, torch.bfloat16):
        return Choice(None, f"a cache of {pages.codes.name} has no Triton kernel")
    step = GpuStep(model, pages)
    return Choice(step, f"{triton.reason}; attention reads the pages where they lie; {step.reason}")
