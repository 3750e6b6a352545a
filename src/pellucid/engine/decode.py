"""One token for every sequence, on a CPU: what `Decoder.forward` computes, in a tenth of the calls.

`Decoder` is the definition and the readable twin. In bfloat16 this is the finer of the two: the residual, norms and
rotations stay in float32 between the products. Here the matrix products are PyTorch's and everything between them
is `ops.jit.decode`; buffers are made once for a batch. `choose_step` says which of the two runs, and why.
Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, KVCache, Layer, Linear, Rope
from pellucid.nn.attention import Attention
from pellucid.nn.block import Block
from pellucid.nn.feedforward import FeedForward
from pellucid.nn.linear import RMSNorm
from pellucid.ops import choose_jit, rope_angles
from pellucid.ops.compiled import same_threads
from pellucid.ops.rope import rope_frequencies
from pellucid.quant import Int4Linear, Int8Linear
from pellucid.runtime import Choice, keep_freed_memory

Step = Callable[[Tensor, KVCache], Tensor]

# Fields of the specs that the compiled step knows. Whoever adds a field gets the plain step until it is taught here.
KNOWN = {"heads", "kv_heads", "head_dim", "rope", "qkv_bias", "out_bias", "qk_norm", "window", "hidden", "act", "bias", "mixer",
         "ffn", "vocab", "dim", "layers", "eps", "tied", "context", "family", "extra", "mtp"}


PLAIN = {Decoder, Block, Attention, FeedForward, Linear, RMSNorm, Int8Linear, Int4Linear, nn.Embedding, nn.ModuleList}


def choose_step(model: Decoder) -> Choice:
    """A function (tokens (B,), cache) -> logits (B, V), by compiled kernels where they can serve this model."""
    why = unsuited(model)
    return Choice(plain_step(model), why) if why else Choice(CompiledStep(model), choose_jit().reason)


def plain_step(model: Decoder) -> Step:
    """The readable twin: the model itself."""
    return lambda tokens, cache: model(tokens[:, None], cache=cache)[:, -1]


def unsuited(model: Decoder) -> str | None:
    """Why the step compiled by numba cannot run this model; None if it can."""
    jit = choose_jit()
    return unusual(model) or (None if jit.value else jit.reason)


def unusual(model: Decoder, device: str = "cpu") -> str | None:
    """What in this model no compiled step knows; None if there is nothing.  device: where that step runs."""
    weight = model.embed.weight
    for name, module in model.named_modules():
        if type(module) not in PLAIN or "forward" in vars(module) or "hidden" in vars(module):
            return f"{name or 'the model'} ({type(module).__name__}) may compute something of its own"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has hooks, which only its own forward calls"
    if weight.device.type != device:
        return f"{weight.device.type} has its own fused kernels"
    if weight.dtype not in (torch.float32, torch.bfloat16) or model.compute_dtype not in (None, weight.dtype):
        return f"weights of {weight.dtype} computed in {model.compute_dtype or weight.dtype}"
    for layer in model.spec.layers:
        for part, kind in ((layer.mixer, Attn), (layer.ffn, MLP), (layer, Layer), (model.spec, DecoderSpec)):
            if type(part) is not kind:
                return f"{type(part).__name__} has no compiled kernel"
            unknown = [f.name for f in fields(part) if f.name not in KNOWN and getattr(part, f.name) != f.default]
            if unknown:
                return f"{kind.__name__} with {', '.join(unknown)} has no compiled kernel"
        if layer.ffn.act != "silu" or layer.mixer.rope.interleaved:
            return "an activation or a rotary layout without a compiled kernel"
    return None


class CompiledStep:
    """Call it with tokens (B,) and the cache: it extends the cache by one column and returns logits (B, V).

    Parameters are read where they are: a model whose weights change in place needs no new step. The logits are a
    buffer that the next call overwrites.
    """

    def __init__(self, model: Decoder):
        from pellucid.ops.jit import decode, lanes

        self.model, self.kernels, self.array = model, decode, lanes.array
        keep_freed_memory()
        self.batch = self.room = 0  # rows of this step, and rows that buffers have
        self.buffers: dict[tuple[str, int], Tensor] = {}
        self.tables: dict[Rope, list[Any]] = {}
        self.rows = 0  # of the tables
        self.nothing = self.array(torch.empty(0))

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        return self.logits(self.hidden(tokens, cache))

    def hidden(self, tokens: Tensor, cache: Any) -> Tensor:
        """tokens (B,) -> the last hidden state (B, D), normed: a buffer."""
        model, array, kernels = self.model, self.array, self.kernels
        cache.reserve(1)
        self._prepare(len(tokens), cache)
        torch.index_select(model.embed.weight, 0, tokens, out=self.delta)
        delta = self.delta
        self.x.zero_()
        x, h, h_array = array(self.x), self.h, array(self.h)
        first = self.zeros if cache.first is None else array(cache.first)
        layer: Any  # a Block
        for i, layer in enumerate(model.layers):
            kernels.add_and_norm(x, array(delta), array(layer.norm1.weight), layer.norm1.eps, h_array)
            self._attend(layer.mixer, layer.mixer.spec, h, i, first, cache)
            delta = self._product(layer.mixer.o, self.attended)
            kernels.add_and_norm(x, array(delta), array(layer.norm2.weight), layer.norm2.eps, h_array)
            gate_up = self._product(layer.ffn.gate_up, h)
            gated = self._buffer("gated", layer.ffn.spec.hidden)
            kernels.gate(array(gate_up), array(gated))
            delta = self._product(layer.ffn.down, gated)
        kernels.add_and_norm(x, array(delta), array(model.norm.weight), model.norm.eps, h_array)
        cache.advance(1)
        return h  # type: ignore[no-any-return]

    def logits(self, h: Tensor) -> Tensor:
        """(B, D) -> (B, V)"""
        if self.model.head is None:
            return torch.mm(h, self.model.embed.weight.t(), out=self._buffer("logits", self.model.spec.vocab)[: len(h)])
        return self._product(self.model.head, h)

    def _attend(self, mixer: Any, spec: Attn, h: Tensor, index: int, first: Any, cache: Any) -> None:
        array = self.array
        qkv = self._product(mixer.qkv, h)
        self.attended = self._buffer("attended", spec.heads * spec.head_dim)
        norms = (mixer.q_norm.weight, mixer.k_norm.weight) if spec.qk_norm else None
        q_weight, k_weight = (self.nothing, self.nothing) if norms is None else map(array, norms)
        attend = self.kernels.attend_kernel(spec.head_dim, spec.heads // spec.kv_heads)
        attend(
            array(qkv), q_weight, k_weight, mixer.q_norm.eps if norms else 0.0, *self.tables[spec.rope], first,
            cache.length, spec.window or 0, spec.head_dim**-0.5, array(cache.keys[index]), array(cache.values[index]),
            array(self.attended))

    def _product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """layer(x), written into a buffer where the layer is a plain matrix; quantized layers bring their own."""
        if type(layer) is not Linear:
            return layer(x)  # type: ignore[no-any-return]
        out = self._buffer(f"{id(layer)}", layer.weight.shape[0])[: len(x)]
        if layer.bias is not None:
            return torch.addmm(layer.bias, x, layer.weight.t(), out=out)
        return torch.mm(x, layer.weight.t(), out=out)

    def _prepare(self, batch: int, cache: KVCache) -> None:
        """Buffers for this many sequences (those of a larger batch serve), rotations for all positions of the cache."""
        same_threads()
        if batch > self.room:
            self.room, self.buffers = batch, {}
        D, self.batch = self.model.spec.dim, batch
        self.x = self._buffer("x", D, torch.float32)
        self.h, self.delta = self._buffer("h", D), self._buffer("delta", D)
        self.zeros = self.array(self._buffer("zeros", 1, torch.int64).zero_()[:, 0])
        if cache.capacity > self.rows:
            self.rows = cache.capacity
            for rope in {layer.mixer.rope for layer in self.model.spec.layers}:
                cos, sin = rope_angles(torch.arange(self.rows), rope_frequencies(rope.dim, rope.theta, rope.scaling_dict))
                self.tables[rope] = [self.array(t[:, : rope.dim // 2].contiguous()) for t in (cos, sin)]

    def _buffer(self, name: str, width: int, dtype: torch.dtype | None = None) -> Tensor:
        key = (name, width)
        if key not in self.buffers:
            self.buffers[key] = torch.empty(self.room, width, dtype=dtype or self.model.embed.weight.dtype)
        return self.buffers[key][: self.batch]
