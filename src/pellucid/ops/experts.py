"""A mixture of experts: every token through the experts it was given, and the weighted sum of what they say.

    y[n] = sum over n's pairs (n, e, w) of  w (down[e] h + down_bias[e]),   h = gated(gate_up[e] x[n] + gate_up_bias[e])

Legend: N tokens, D model width, E experts, I their width, P pairs sorted by expert (ops/dispatch.py), R rows of a block.
    x (N, D)   gate_up (E, 2I, D): gate rows, then up rows   down (E, D, I)   gate_up_bias (E, 2I)   down_bias (E, D)

All work of an expert is one product of the rows that it was given. Sums over experts are float32 at least. Weights may be
of another dtype than x (float32 under bfloat16 activations): those that are used are cast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pellucid.ops.activation import ACTIVATIONS
from pellucid.ops.compiled import jit_serves
from pellucid.ops.dispatch import Pairs

Clamp = tuple[float, float]
BLOCK_BYTES = 4 * 2**20  # of rows that are worked on at a time: they stay in the caches, and no pages are touched anew
FEW = {torch.float32: 16, torch.bfloat16: 8}  # rows an expert has on average, up to which our kernels are faster than products


@dataclass(frozen=True)
class ExpertWeights:
    """The parameters of all experts, stacked, and what stands between their two products."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    act: str = "silu"
    clamp: Clamp | None = None  # (alpha, limit) of gpt-oss's gate


@dataclass(frozen=True)
class ExpertLayers:
    """Experts whose matrices are layers of their own (quantized ones): rows -> product, with what bias they have."""

    gate_up: Sequence[Callable[[Tensor], Tensor]]
    down: Sequence[Callable[[Tensor], Tensor]]
    act: str = "silu"
    clamp: Clamp | None = None


def gated(gate_up: Tensor, act: str = "silu", clamp: Clamp | None = None) -> Tensor:
    """(..., 2I) -> (..., I): act(gate) * up, or gpt-oss's (up + 1) * gate * sigmoid(alpha gate), where the gate is at most
    `limit` and up within +-limit."""
    gate, up = gate_up.chunk(2, -1)
    if clamp is None:
        return ACTIVATIONS[act](gate) * up
    alpha, limit = clamp
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(alpha * gate))


def experts_reference(x: Tensor, pairs: Pairs, w: ExpertWeights) -> Tensor:
    """One expert after the other, as the formula says. (N, D) -> (N, D)."""
    out = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for e, (tokens, weights) in enumerate(zip(pairs.tokens.split(pairs.counts), pairs.weights.split(pairs.counts), strict=True)):
        h = gated(F.linear(x[tokens], w.gate_up[e].to(x.dtype), _row(w.gate_up_bias, e, x)), w.act, w.clamp)
        y = F.linear(h, w.down[e].to(x.dtype), _row(w.down_bias, e, x))
        out = out.index_add(0, tokens, weights[:, None].to(out.dtype) * y)
    return out.to(x.dtype)


def experts_of_layers(x: Tensor, pairs: Pairs, w: ExpertLayers) -> Tensor:
    """The same through layers; experts without tokens are passed over."""
    out = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for e, (tokens, weights) in enumerate(zip(pairs.tokens.split(pairs.counts), pairs.weights.split(pairs.counts), strict=True)):
        if len(tokens):
            y = w.down[e](gated(w.gate_up[e](x[tokens]), w.act, w.clamp))
            out.index_add_(0, tokens, weights[:, None].to(out.dtype) * y)
    return out.to(x.dtype)


def experts_grouped(x: Tensor, pairs: Pairs, w: ExpertWeights) -> Tensor:
    """The same with all experts' products in one call (for GPUs)."""
    counts = torch.tensor(pairs.counts, device=x.device)
    ends, expert = counts.cumsum(0).int(), torch.arange(len(counts), device=x.device).repeat_interleave(counts)

    def product(rows: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
        y = F.grouped_mm(rows, matrices.to(x.dtype).mT, offs=ends)
        return y if bias is None else y + bias.to(x.dtype)[expert]

    h = gated(product(x[pairs.tokens], w.gate_up, w.gate_up_bias), w.act, w.clamp)
    y = product(h, w.down, w.down_bias)
    out = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return out.index_add(0, pairs.tokens, pairs.weights[:, None].to(out.dtype) * y).to(x.dtype)


def experts_sorted(x: Tensor, pairs: Pairs, w: ExpertWeights) -> Tensor:
    """The same in blocks of rows that stay in the caches, one product for each expert of a block (for CPUs)."""
    tensors = [x, pairs.weights, w.gate_up, w.down, w.gate_up_bias, w.down_bias]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Experts.apply(*tensors, pairs, w)  # type: ignore[no-any-return]
    return _forward(x, pairs, w, None)


def experts_few(x: Tensor, pairs: Pairs, w: ExpertWeights) -> Tensor:
    """The same for few rows an expert, without gradients, by compiled kernels: each weight is read once, and threads share
    the experts instead of waiting for each other in every small product."""
    from pellucid.ops.jit import experts as kernels
    from pellucid.ops.jit.lanes import array

    D, width = x.shape[1], w.down.shape[2]
    limit = min(_limit(D, width, 4), len(pairs.tokens))
    none = w.down.new_empty(len(w.down), 0)
    gate_up_bias, down_bias = (array(none if b is None else b) for b in (w.gate_up_bias, w.down_bias))
    gate_up, down, wide = array(w.gate_up), array(w.down), array(x.float())
    hidden, rows, out = torch.empty(limit, width), torch.empty(limit, D), torch.zeros(x.shape)
    for block in blocks(pairs.counts, limit):
        here, n = slice(block.start, block.stop), block.stop - block.start
        tokens, weights = array(pairs.tokens[here]), array(pairs.weights[here].float())
        used = array(torch.tensor([e for e, _, _ in block.parts]))
        starts = array(torch.tensor([*(a for _, a, _ in block.parts), n]))
        kernels.hidden(wide, tokens, weights, used, starts, gate_up, gate_up_bias, *(w.clamp or (0.0, 0.0)), array(hidden[:n]))
        kernels.results(array(hidden[:n]), weights, used, starts, down, down_bias, array(rows[:n]))
        kernels.add_rows(array(rows[:n]), tokens, array(out))
    return out.to(x.dtype)


def choose_experts(x: Tensor, pairs: Pairs, w: ExpertWeights) -> tuple[str, str]:
    """('grouped' | 'few' | 'sorted', why). Measured with PyTorch 2.13 on two cores (`benchmarks/forward.py --experts`
    repeats it): on a CPU `grouped_mm` is a loop over experts too, and no faster than ours."""
    if x.device.type != "cpu":
        size = x.element_size()
        if any(n * size % 16 for n in (x.shape[1], w.down.shape[2])):
            return "sorted", "the kernel for all experts at once wants rows of whole 16 bytes"
        return "grouped", f"{x.device.type} has a kernel for all experts at once"
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, pairs.weights, w.gate_up, w.down))
    used, P = sum(n > 0 for n in pairs.counts), len(pairs.tokens)
    if not wanted and 0 < P <= FEW.get(x.dtype, 0) * used and _compiled_gate(w) and jit_serves(x, w.gate_up, w.down):
        return "few", f"{P} rows for {used} experts: reading their weights is the work"
    return "sorted", f"{P} rows for {used} experts: a product for each"


def experts(x: Tensor, pairs: Pairs, w: ExpertWeights | ExpertLayers) -> Tensor:
    """The fast path of this machine; `experts_reference` is what it must equal."""
    if isinstance(w, ExpertLayers):
        return experts_of_layers(x, pairs, w)
    paths = {"grouped": experts_grouped, "few": experts_few, "sorted": experts_sorted}
    return paths[choose_experts(x, pairs, w)[0]](x, pairs, w)


def _row(bias: Tensor | None, e: int, like: Tensor) -> Tensor | None:
    return None if bias is None else bias[e].to(like.dtype)


def _compiled_gate(w: ExpertWeights) -> bool:
    return w.clamp is not None or w.act == "silu"


# --- the sorted path --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Rows start to stop of the pairs, and the experts in it: (expert, its first row, behind its last), counted from start."""

    start: int
    stop: int
    parts: list[tuple[int, int, int]]


def blocks(counts: list[int], limit: int) -> Iterator[Block]:
    """Cuts the pairs into blocks of at most `limit` rows; an expert with more rows stands in several."""
    start = row = 0
    parts: list[tuple[int, int, int]] = []
    for e, n in enumerate(counts):
        while n:
            taken = min(n, start + limit - row)
            parts.append((e, row - start, row - start + taken))
            row, n = row + taken, n - taken
            if row - start == limit:
                yield Block(start, row, parts)
                start, parts = row, []
    if parts:
        yield Block(start, row, parts)


def _limit(D: int, width: int, itemsize: int) -> int:
    return max(256, BLOCK_BYTES // ((2 * D + 3 * width) * itemsize))


def _forward(x: Tensor, pairs: Pairs, w: ExpertWeights, products: Tensor | None) -> Tensor:
    """products (P, 2I): is filled with gate and up of every pair, for the backward pass; None: they are not kept."""
    D, width = x.shape[1], w.down.shape[2]
    limit = min(_limit(D, width, x.element_size()), len(pairs.tokens))
    rows, hidden = x.new_empty(limit, D), x.new_empty(limit, width)
    scratch = x.new_empty(limit if products is None else 0, 2 * width)
    out = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for block in blocks(pairs.counts, limit):
        here, n = slice(block.start, block.stop), block.stop - block.start
        tokens, weights = pairs.tokens[here], pairs.weights[here]
        gate_up = scratch[:n] if products is None else products[here]
        torch.index_select(x, 0, tokens, out=rows[:n])
        for e, a, b in block.parts:
            _product(rows[a:b], w.gate_up[e].to(x.dtype), _row(w.gate_up_bias, e, x), gate_up[a:b])
        _weighted_gate(gate_up, weights, w, hidden[:n])
        for e, a, b in block.parts:  # the rows of x are done with: their place takes the results
            torch.mm(hidden[a:b], w.down[e].to(x.dtype).T, out=rows[a:b])
            if w.down_bias is not None:
                rows[a:b].addr_(weights[a:b].to(x.dtype), w.down_bias[e].to(x.dtype))
        _add_rows(out, tokens, rows[:n])
    return out.to(x.dtype)


class _Experts(torch.autograd.Function):
    """Only the first products are kept; results are not: the gradient of a pair's weight is found before `down`, as
    <down^T g, h> = <g, down h>."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
                down_bias: Tensor | None, pairs: Pairs, w: ExpertWeights) -> Tensor:
        products = x.new_empty(len(pairs.tokens), gate_up.shape[1])
        out = _forward(x, pairs, w, products)
        ctx.save_for_backward(x, weights, gate_up, down, gate_up_bias, down_bias, pairs.tokens, products)
        ctx.counts, ctx.act, ctx.clamp = pairs.counts, w.act, w.clamp
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate_up, down, gate_up_bias, down_bias, tokens, products = ctx.saved_tensors
        w = ExpertWeights(gate_up, down, gate_up_bias, down_bias, ctx.act, ctx.clamp)
        found = _backward(grads[0], x, Pairs(tokens, weights, ctx.counts), w, products, ctx.needs_input_grad)
        return (*found, None, None)


def _backward(
    g: Tensor, x: Tensor, pairs: Pairs, w: ExpertWeights, products: Tensor, wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """g (N, D) -> gradients of x, weights, gate_up, down, gate_up_bias, down_bias, where wanted."""
    D, width = x.shape[1], w.down.shape[2]
    limit = min(_limit(2 * D, 2 * width, x.element_size()), len(pairs.tokens))
    rows, d_rows = x.new_empty(limit, D), x.new_empty(limit, D)
    hidden, d_hidden, d_products = x.new_empty(limit, width), x.new_empty(limit, width), x.new_empty(limit, 2 * width)
    d_x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if wanted[0] else None
    d_weights = torch.zeros_like(pairs.weights)
    d_gate_up, d_down, d_gate_up_bias, d_down_bias = (
        _Sum(p, pairs.counts) if p is not None and wanted[i] else None
        for i, p in enumerate((w.gate_up, w.down, w.gate_up_bias, w.down_bias), 2))
    for block in blocks(pairs.counts, limit):
        here, n = slice(block.start, block.stop), block.stop - block.start
        tokens, weights = pairs.tokens[here], pairs.weights[here]
        torch.index_select(g, 0, tokens, out=d_rows[:n])
        for e, a, b in block.parts:
            torch.mm(d_rows[a:b], w.down[e].to(x.dtype), out=d_hidden[a:b])
        _gate_backward(d_hidden[:n], products[here], weights, w, hidden[:n], d_products[:n], d_weights[here])
        if d_gate_up is not None:
            torch.index_select(x, 0, tokens, out=rows[:n])
        for e, a, b in block.parts:
            if d_down is not None:
                d_down.add(e, d_rows[a:b].T, hidden[a:b])
            if d_gate_up is not None:
                d_gate_up.add(e, d_products[a:b].T, rows[a:b])
            if d_gate_up_bias is not None:
                d_gate_up_bias.add(e, d_products[a:b].T)
            if w.down_bias is not None:
                d_weights[here][a:b] += d_rows[a:b] @ w.down_bias[e].to(x.dtype)
            if d_down_bias is not None:
                d_down_bias.add(e, d_rows[a:b].T, weights[a:b].to(x.dtype))
        if d_x is not None:
            for e, a, b in block.parts:
                torch.mm(d_products[a:b], w.gate_up[e].to(x.dtype), out=d_rows[a:b])
            _add_rows(d_x, tokens, d_rows[:n])
    sums = (s if s is None else s.total for s in (d_gate_up, d_down, d_gate_up_bias, d_down_bias))
    return (None if d_x is None else d_x.to(x.dtype), d_weights, *sums)


class _Sum:
    """The gradient of one parameter of all experts. An expert's slice is written by its first block and added to by the
    others; experts without rows have zeros."""

    def __init__(self, parameter: Tensor, counts: list[int]):
        self.total = torch.empty_like(parameter, memory_format=torch.contiguous_format)
        self.seen = [False] * len(counts)
        for e, n in enumerate(counts):
            if not n:
                self.total[e].zero_()

    def add(self, e: int, left: Tensor, right: Tensor | None = None) -> None:
        """left @ right, or the sum of left's columns."""
        mine, first = self.total[e], not self.seen[e]
        self.seen[e] = True
        if right is not None and right.dim() == 2 and mine.dtype == left.dtype:
            if first:
                torch.mm(left, right, out=mine)
            else:
                mine.addmm_(left, right)
            return
        new = left.sum(1) if right is None else left @ right
        mine.copy_(new) if first else mine.add_(new)


def _product(rows: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, matrix.T, out=out)
    else:
        torch.addmm(bias, rows, matrix.T, out=out)


def _weighted_gate(gate_up: Tensor, weights: Tensor, w: ExpertWeights, out: Tensor) -> None:
    """out = weight * gated(gate_up), rounded once."""
    if _compiled_gate(w) and weights.dtype == torch.float32 and jit_serves(gate_up, out):
        from pellucid.ops.jit import experts as kernels
        from pellucid.ops.jit.lanes import array

        kernels.gate(array(gate_up), array(weights), *(w.clamp or (0.0, 0.0)), array(out))
    else:
        torch.mul(gated(gate_up, w.act, w.clamp), weights[:, None].to(out.dtype), out=out)


def _gate_backward(g: Tensor, gate_up: Tensor, weights: Tensor, w: ExpertWeights, out: Tensor, d_gate_up: Tensor, d_weights: Tensor) -> None:
    """g: the gradient at weight * gated(gate_up). Fills out = weight * gated(gate_up) and d_gate_up, adds to d_weights."""
    if _compiled_gate(w) and weights.dtype == torch.float32 and jit_serves(gate_up, g, out, d_gate_up):
        from pellucid.ops.jit import experts as kernels
        from pellucid.ops.jit.lanes import array

        kernels.gate_backward(array(g), array(gate_up), array(weights), *(w.clamp or (0.0, 0.0)), array(out), array(d_gate_up),
                              array(d_weights))
        return
    with torch.enable_grad():
        inner = gate_up.detach().requires_grad_()
        h = gated(inner, w.act, w.clamp)
        (found,) = torch.autograd.grad(h, inner, g * weights[:, None].to(g.dtype))
    h = h.detach()
    torch.mul(h, weights[:, None].to(h.dtype), out=out)
    d_gate_up.copy_(found)
    d_weights += (g * h).sum(-1)


def _add_rows(out: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """out[tokens[p]] += rows[p]; out is wide."""
    if out.dtype == torch.float32 and jit_serves(rows):
        from pellucid.ops.jit import experts as kernels
        from pellucid.ops.jit.lanes import array

        kernels.add_rows(array(rows), array(tokens), array(out))
    else:
        out.index_add_(0, tokens, rows.to(out.dtype))
