"""Data-parallel attention (SGLang's): each process has its own requests and their cache, all share the feed-forwards and experts.

Tensor parallelism must hold the cache of latent attention (one head for all) in every process. Here mixers, norms, embedding
and head are whole in each, so that a token's cache lies in one process; the experts are shared out. One layer:

    attention on the tokens of this process -> gather all tokens -> its experts (its channels) on all -> sum, and back the own rows

All must meet in every layer: a process without work brings no rows and computes its experts for the others. How rows are
brought depends on how even they are (SGLang's rule):

    even     each brings as many as the fullest has, filled up; all-gather, then reduce-scatter     traffic W max(n)
    packed   each writes its rows into a buffer of zeros, which is summed; sum again, cut           traffic 2 sum(n)

Rows that fill up are padding: routers send them to no expert.

All rows of a pass go through the same matrices. A step has a pass for each adapter that anybody's requests have: what an adapter adds to
a feed-forward is added to everybody's rows, in parts as the matrices are. The model's own prediction layer shares its feed-forward too:
before each of its passes all meet, until nobody has another one to propose.

Groups of processes may stand in the place of each (`--dp-attention 2 --tp 2`): they have the same requests, and share heads. Experts are
shared out to all. Rows go round among those at the same place of each group; partial sums come back so, and are summed in the group.

Legend: W processes (groups), n rows of each, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.engine.adapters import Adapter, applied
from pellucid.engine.layer_groups import Group as LayerGroup
from pellucid.engine.predictor import Predictor
from pellucid.engine.request import Request
from pellucid.engine.runner import Logits, Runner
from pellucid.engine.scheduler import Part, Plan
from pellucid.engine.shared_adapters import AdapterTable
from pellucid.engine.tensor_parallel import LeadPredictor, LeadRunner
from pellucid.nn import Decoder
from pellucid.nn.context import Context
from pellucid.ops.cache_codes import CacheCodes
from pellucid.parallel import ALONE, Group

PLAIN = -1
"""In the place of an adapter's number: none."""


class Exchange:
    """Rows of all processes, for the feed-forwards of a model's layers.  group: of processes with other requests each.  within: with the same
    ones.  rows: of each in this pass."""

    def __init__(self, model: Decoder, group: Group, within: Group = ALONE):
        self.model, self.group, self.within = model, group, within
        self.rows: list[int] = [0] * group.size
        self.shape: tuple[int, ...] = ()  # of what this process brought
        layer: Any
        for layer in (*model.layers, *(ahead.block for ahead in model.mtp)):
            layer.ffn.register_forward_pre_hook(self._bring)
            layer.ffn.register_forward_hook(self._take_back)

    def meet(self, rows: int) -> int:
        """Every process tells how many rows it has for the next pass; the sum."""
        self.rows = self._gathered([rows]).flatten().tolist()
        return sum(self.rows)

    def agree(self, rows: Mapping[int, int]) -> list[tuple[int, list[int]]]:
        """Every process tells how many rows it has of which adapter (by its number, or PLAIN). The passes of the step, the same for all: an
        adapter, and the rows of each process."""
        others = [(number, count) for number, count in rows.items() if number != PLAIN]
        told = self._gathered([rows.get(PLAIN, 0), len(others)])
        plain, most = told[:, 0].tolist(), int(told[:, 1].max())
        found: dict[int, list[int]] = {}
        every = self._gathered([*others, *[(PLAIN, 0)] * (most - len(others))]).tolist() if most else ()
        for rank, pairs in enumerate(every):
            for number, count in pairs:
                if count:
                    found.setdefault(number, [0] * self.group.size)[rank] = count
        return [(PLAIN, plain)] * any(plain) + sorted(found.items())

    def _gathered(self, numbers: Sequence[Any]) -> Tensor:
        """(W, *) numbers of all processes."""
        return self.group.gather(torch.tensor(numbers, device=self.model.embed.weight.device))

    @property
    def even(self) -> bool:
        return 2 * sum(self.rows) >= self.group.size * max(self.rows)

    def idle(self, blocks: Iterable[Any]) -> None:
        """The part that a process without rows has in a pass of the others through these blocks."""
        weight = self.model.embed.weight
        nothing = torch.empty(1, 0, self.model.spec.dim, dtype=self.model.compute_dtype or weight.dtype, device=weight.device)
        for block in blocks:
            block.ffn(nothing, Context(torch.empty(0), nothing.dtype))

    def _bring(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """(x (..., D) of n rows, context) -> (rows of all (1, N, D), a context that says which are real)."""
        x, ctx = inputs
        self.shape, x = x.shape, x.flatten(0, -2)
        if self.even:
            most = max(self.rows)
            mine = x.new_zeros(most, x.shape[-1])
            mine[: len(x)] = x
            rows = self.group.gather(mine).flatten(0, 1)
            counts = torch.tensor(self.rows, device=x.device)
            real = (torch.arange(most, device=x.device)[None] < counts[:, None]).flatten() if min(self.rows) < most else None
            return rows[None], replace(ctx, real=None if real is None else real[None])
        rows = x.new_zeros(sum(self.rows), x.shape[-1])
        rows[self._own] = x
        return self.group.sum(rows)[None], ctx

    def _take_back(self, module: nn.Module, inputs: Any, partial: Tensor) -> Tensor:
        """Partial sums of all rows (1, N, D) -> the sums of the own rows (..., D)."""
        if self.even:
            return self.within.sum(self.group.sum_of_own(partial[0]))[: self.rows[self.group.rank]].view(self.shape)
        return self.within.sum(self.group.sum(partial[0])[self._own]).view(self.shape)

    @property
    def _own(self) -> slice:
        start = sum(self.rows[: self.group.rank])
        return slice(start, start + self.rows[self.group.rank])


class SharingPredictor(Predictor):
    """A prediction layer whose feed-forward is shared."""

    def __init__(self, model: Decoder, blocks: int, size: int, places: int, *, exchange: Exchange, **more: Any):
        super().__init__(model, blocks, size, places, **more)
        self.exchange = exchange

    def run(self, requests: Sequence[Request], tokens: Sequence[Sequence[int]], states: Tensor) -> Tensor:
        self.exchange.meet(len(requests) * len(tokens[0]))
        return super().run(requests, tokens, states)

    def finish(self) -> None:
        """This process has proposed what it could: it takes part in the passes of those that have not."""
        ahead: Any = self.model.mtp[0]
        while self.exchange.meet(0):
            self.exchange.idle([ahead.block])


class SharingRunner(Runner):
    """A runner that takes part in the others' passes. All of them step together, with or without work.  adapters: of this process, all of
    which have the same ones; whoever makes it gives it them."""

    def __init__(self, model: Decoder, blocks: int, size: int, places: int, codes: CacheCodes | None = None,
                 groups: Sequence[LayerGroup] | None = None, *, group: Group, within: Group = ALONE):
        self.exchange = Exchange(model, group, within)  # before the way of running is chosen: hooks decide it
        super().__init__(model, blocks, size, places, codes, groups)
        self.adapters: AdapterTable | None = None
        self.head: SharingPredictor | None = None
        self.passes: list[tuple[int, list[int]]] = []

    @torch.inference_mode()
    def step(self, plan: Plan, sources: Mapping[Request, int] | None = None) -> Logits:
        if self.head is not None:
            self.head.finish()
        rows: dict[int, int] = {}
        for part in plan.parts:
            number = number_of(part)
            rows[number] = rows.get(number, 0) + part.count
        self.passes = self.exchange.agree(rows)
        logits = super().step(plan, sources)
        if not plan.parts:
            list(self._apart(()))
        return logits

    def _apart(self, parts: Sequence[Part]) -> Iterator[tuple[Adapter | None, list[Part]]]:
        """As all have agreed; between the own passes those of the others."""
        for number, rows in self.passes:
            self.exchange.rows = rows
            if mine := [part for part in parts if number_of(part) == number]:
                yield mine[0].request.adapter, mine
                continue
            with applied(self.model, None if self.adapters is None else self.adapters.of(None if number == PLAIN else number)):
                self.exchange.idle(self.model.layers)

    def predictor(self, blocks: int, size: int, places: int) -> Predictor:
        self.head = SharingPredictor(self.model, blocks, size, places, exchange=self.exchange)
        return self.head


class SharingLead(LeadRunner, SharingRunner):
    """A group's lead: the others of its group take part as it does."""

    always = True

    def predictor(self, blocks: int, size: int, places: int) -> Predictor:
        self.head = SharingLeadPredictor(self.model, blocks, size, places, others=self.others, exchange=self.exchange)
        return self.head


class SharingLeadPredictor(LeadPredictor, SharingPredictor):
    """The others of the group make its passes too, and meet those of other groups in them."""


def number_of(part: Part) -> int:
    adapter = part.request.adapter
    return PLAIN if adapter is None else adapter.number
