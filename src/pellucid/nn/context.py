"""What all layers of one forward pass share: rotations, the mask, the cache. Made once, read by every block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from pellucid.nn.cache import KVCache
from pellucid.nn.specs import MLA, Attn, DecoderSpec, MoE, Rope
from pellucid.ops import bias_of, rope_angles, rope_frequencies, visible


@dataclass
class Routing:
    """What the routers of one forward pass decided, layer by layer, for balance losses and for what is shown.

    specs: of the layers. logits: (N, E) each, before scores are made. chosen: (N, k) expert ids each; empty where experts
    choose. real (N,): False for padding, None if all are. rows: sequences that the N tokens are.
    """

    specs: list[MoE] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    real: Tensor | None = None
    rows: int = 1

    def add(self, spec: MoE, logits: Tensor, chosen: Tensor) -> None:
        self.specs.append(spec)
        self.logits.append(logits)
        self.chosen.append(chosen)


@dataclass
class Context:
    """mask: (B or 1, 1, T or 1, S) bool, True = visible; None when nothing is hidden but the future. causal: False when
    the mask holds causality already (attention applies it in any case: it changes nothing then, and lets whole tiles
    be skipped). real: (B, T) bool, False for new tokens that are padding; None when all are real. documents: (B, T) ids of
    packed documents. segments: of a flat pass over tokens of many sequences (an engine's step): mixers see each apart, all
    else runs over all tokens at once. memory: (B, S, D), an encoder's output for cross-attention; memory_mask: as mask, for its tokens."""

    positions: Tensor  # (B or 1, T)
    dtype: torch.dtype
    mask: Tensor | None = None
    cache: KVCache | None = None
    causal: bool = True
    real: Tensor | None = None
    documents: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    routing: Routing | None = None
    segments: list[Segment] | None = None
    _angles: dict[Rope, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _bias: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def through(self, mixer: Callable[[Tensor, Context], Tensor], x: Tensor) -> Tensor:
        """mixer(x); in a flat pass (1, N, D) each segment by itself, as its own batch and with its own context."""
        if self.segments is None:
            return mixer(x, self)
        parts = [mixer(x[0, s.start : s.stop].unflatten(0, (s.rows, -1)), s.ctx).flatten(0, 1) for s in self.segments]
        return torch.cat(parts)[None]

    def rotation(self, rope: Rope) -> tuple[Tensor | None, Tensor | None]:
        """cos, sin (B or 1, T, r) of this pass's positions; None where nothing is turned."""
        if rope.dim == 0:
            return None, None
        if rope not in self._angles:
            self._angles[rope] = self.angles(rope, self.positions)
        return self._angles[rope]

    def angles(self, rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin (B or 1, T, r) of any positions (B or 1, T)."""
        if rope.by_row:
            each = [_frequencies(rope, positions.device, n) for n in self.lengths().tolist()]
            frequencies = torch.stack(each)[:, None]
        else:  # the longest sequence of the batch decides, and only where it matters (on a GPU, asking is a wait)
            frequencies = _frequencies(rope, positions.device, int(positions.max()) + 1 if rope.by_length else 0)
        return rope_angles(positions, frequencies, self.dtype, rope.attention_factor)

    def lengths(self) -> Tensor:
        """(B or 1,) tokens of each sequence of this pass; with a cache, of the first pass that it saw (the prompt)."""
        found = self.positions.amax(-1) + 1
        if self.cache is None:
            return found
        if self.cache.began is None:
            self.cache.began = found
        return self.cache.began

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The mask as 0 and -inf, to be added to scores: made once, not in every layer."""
        return self._as_bias("mask", dtype)

    def memory_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The same of the mask of `memory`."""
        return self._as_bias("memory_mask", dtype)

    def _as_bias(self, which: str, dtype: torch.dtype) -> Tensor | None:
        mask: Tensor | None = getattr(self, which)
        if mask is None:
            return None
        if (which, dtype) not in self._bias:
            self._bias[which, dtype] = bias_of(mask, dtype)
        return self._bias[which, dtype]


@dataclass
class Segment:
    """Tokens start..stop of a flat pass: `rows` sequences with equally many new tokens each, which mix among themselves."""

    start: int
    stop: int
    rows: int
    ctx: Context


def open_context(
    tokens: Tensor, dtype: torch.dtype, positions: Tensor | None = None, documents: Tensor | None = None,
    cache: KVCache | None = None, mask: Tensor | None = None, causal: bool = True, parents: Tensor | None = None,
) -> Context:
    """The context of a pass over `tokens` (B, T, ...): default positions 0, 1, ... or those behind the cache; what each may
    see from documents and their parents (B, T), padding mask (B, T; 1 = real) or cache; causality folded in once instead of once
    a layer."""
    T = tokens.shape[1]
    if cache is not None and (documents is not None or mask is not None):
        raise ValueError("a cache carries its own mask: documents and mask cannot be given with it")
    if positions is None:
        positions = torch.arange(T, device=tokens.device)[None] if cache is None else cache.positions(T)
    seen, real = None, None if mask is None else mask.bool()
    if documents is not None:
        seen = document_mask(documents, parents)
    if real is not None:
        keys = real[:, None, None, :]
        seen = keys if seen is None else seen & keys
    if cache is not None:
        seen, real = cache.key_mask(T), cache.real(T)
    if seen is not None and causal and T > 1:
        seen = seen & visible(T, seen.shape[-1], device=tokens.device)
    return Context(positions, dtype, seen, cache, causal=causal and seen is None, real=real, documents=documents)


@lru_cache(maxsize=16)
def _frequencies(rope: Rope, device: torch.device, length: int) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used for training later
        return rope_frequencies(rope.dim, rope.theta, rope.scaling_dict, length).to(device)


def document_mask(documents: Tensor, parents: Tensor | None = None) -> Tensor:
    """documents (B, T) -> (B, 1, T, T): tokens see only their own document, and the one that it goes on from (`parents`, (B, T)).
    Padding (-1) sees padding only."""
    keys = documents[:, None, None, :]
    seen = documents[:, None, :, None] == keys
    return seen if parents is None else seen | (parents[:, None, :, None] == keys)


def branching(spec: DecoderSpec) -> str | None:
    """Why a model cannot compute several continuations of one text in a row (`parents`); None if it can.

    Mixers must follow the mask and the positions: a window counts keys, a state of constant size knows only the token before,
    and where experts have limited room, or choose, what a token gets depends on how often the shared ones are there.
    """
    for layer in spec.layers:
        mixer, ffn = layer.mixer, layer.ffn
        plain = isinstance(mixer, Attn) and mixer.window is None and mixer.reach is None and mixer.causal
        if not plain and not (isinstance(mixer, MLA) and mixer.indexer is None):
            return f"{type(mixer).__name__} does not see what a mask and positions say alone"
        if isinstance(ffn, MoE) and (ffn.capacity is not None or ffn.expert_choice or ffn.select_bias):
            return "its experts count the tokens"
    return None


def padding_positions(mask: Tensor) -> Tensor:
    """mask (B, T), 1 = real -> positions counted over real tokens only, 0 on left padding."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)
