"""Data-parallel attention (SGLang's): each process has its own requests and their cache, all share the feed-forwards and experts.

Tensor parallelism must hold the cache of latent attention (one head for all) in every process. Here mixers, norms, embedding
and head are whole in each, so that a token's cache lies in one process; the experts are shared out. One layer:

    attention on the tokens of this process -> gather all tokens -> its experts (its channels) on all -> sum, and back the own rows

All must meet in every layer: a process without work brings no rows and computes its experts for the others. How rows are
brought depends on how even they are (SGLang's rule):

    even     each brings as many as the fullest has, filled up; all-gather, then reduce-scatter     traffic W max(n)
    packed   each writes its rows into a buffer of zeros, which is summed; sum again, cut           traffic 2 sum(n)

Rows that fill up are padding: routers send them to no expert.

Groups of processes may stand in the place of each (`--dp-attention 2 --tp 2`): they have the same requests, and share heads. Experts are
shared out to all. Rows go round among those at the same place of each group; partial sums come back so, and are summed in the group.

Legend: W processes (groups), n rows of each, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.engine.layer_groups import Group as LayerGroup
from pellucid.engine.request import Request
from pellucid.engine.runner import Logits, Runner
from pellucid.engine.scheduler import Plan
from pellucid.engine.tensor_parallel import LeadRunner
from pellucid.nn import Decoder
from pellucid.nn.context import Context
from pellucid.ops.cache_codes import CacheCodes
from pellucid.parallel import ALONE, Group


class Exchange:
    """Rows of all processes, for the feed-forwards of a model's layers.  group: of processes with other requests each.  within: with the same
    ones.  rows: of each in this step."""

    def __init__(self, model: Decoder, group: Group, within: Group = ALONE):
        self.model, self.group, self.within = model, group, within
        self.rows: list[int] = [0] * group.size
        layer: Any
        for layer in model.layers:
            layer.ffn.register_forward_pre_hook(self._bring)
            layer.ffn.register_forward_hook(self._take_back)

    def agree(self, rows: int) -> int:
        """Every process tells how many rows it has; the sum."""
        self.rows = self.group.gather(torch.tensor([rows], device=self.model.embed.weight.device)).flatten().tolist()
        return sum(self.rows)

    @property
    def even(self) -> bool:
        return 2 * sum(self.rows) >= self.group.size * max(self.rows)

    def idle(self) -> None:
        """The part that a process without rows has in a pass of the others."""
        weight = self.model.embed.weight
        nothing = torch.empty(1, 0, self.model.spec.dim, dtype=self.model.compute_dtype or weight.dtype, device=weight.device)
        layer: Any
        for layer in self.model.layers:
            layer.ffn(nothing, Context(torch.empty(0), nothing.dtype))

    def _bring(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """(x (1, n, D), context) -> (rows of all (1, N, D), a context that says which are real)."""
        x, ctx = inputs
        if self.even:
            most = max(self.rows)
            mine = x.new_zeros(most, x.shape[-1])
            mine[: x.shape[1]] = x[0]
            rows = self.group.gather(mine).flatten(0, 1)
            counts = torch.tensor(self.rows, device=x.device)
            real = (torch.arange(most, device=x.device)[None] < counts[:, None]).flatten() if min(self.rows) < most else None
            return rows[None], replace(ctx, real=None if real is None else real[None])
        rows = x.new_zeros(sum(self.rows), x.shape[-1])
        rows[self._own] = x[0]
        return self.group.sum(rows)[None], ctx

    def _take_back(self, module: nn.Module, inputs: Any, partial: Tensor) -> Tensor:
        """Partial sums of all rows (1, N, D) -> the sums of the own rows (1, n, D)."""
        if self.even:
            return self.within.sum(self.group.sum_of_own(partial[0]))[None, : self.rows[self.group.rank]]
        return self.within.sum(self.group.sum(partial[0])[self._own])[None]

    @property
    def _own(self) -> slice:
        start = sum(self.rows[: self.group.rank])
        return slice(start, start + self.rows[self.group.rank])


class SharingRunner(Runner):
    """A runner that takes part in the others' passes. All of them step together, with or without work."""

    def __init__(self, model: Decoder, blocks: int, size: int, places: int, codes: CacheCodes | None = None,
                 groups: Sequence[LayerGroup] | None = None, *, group: Group, within: Group = ALONE):
        self.exchange = Exchange(model, group, within)  # before the way of running is chosen: hooks decide it
        super().__init__(model, blocks, size, places, codes, groups)

    @torch.inference_mode()
    def step(self, plan: Plan, sources: Mapping[Request, int] | None = None) -> Logits:
        rows = sum(part.count for part in plan.parts)
        total = self.exchange.agree(rows)
        logits = super().step(plan, sources)
        if total and not rows:
            self.exchange.idle()
        return logits


class SharingLead(LeadRunner, SharingRunner):
    """A group's lead: the others of its group take part as it does."""

    always = True
