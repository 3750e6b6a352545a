"""Tensor-parallel serving: one process plans, all compute.

The lead has the scheduler, the prefix cache and the sampler. Before each step it sends the others its plan, as far as a runner
needs it: which tokens of which requests, and the blocks that are new to them. They could plan for themselves, each with all
requests (SGLang does); but then a difference of one bit or of one clock tick leaves processes waiting for each other in different
steps, and each of them needs tokenizer, grammars and sampler. A plan is some hundred bytes: it is sent (as vLLM does).

Legend of a message:
    parts      [number, start, count, drafts, tokens beyond the prompt, whether logits are asked for]
    new        number -> the prompt, and how many log-probabilities of it are asked for
    tables     number -> for each group of layers [how many of the blocks that are known stand, those behind them]
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.engine.layer_groups import Group as LayerGroup
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import GONE, Request
from pellucid.engine.runner import Runner
from pellucid.engine.scheduler import Part, Plan
from pellucid.nn import Decoder
from pellucid.ops.cache_codes import CacheCodes
from pellucid.parallel import Channel


class LeadRunner(Runner):
    """A runner whose steps the others compute too."""

    def __init__(self, model: Decoder, blocks: int, size: int, places: int, codes: CacheCodes | None = None,
                 groups: Sequence[LayerGroup] | None = None, *, others: Sequence[Channel]):
        super().__init__(model, blocks, size, places, codes, groups)
        self.others = others
        self.numbers: dict[Request, int] = {}
        self.count = itertools.count()
        self.known: dict[Request, list[list[int]]] = {}  # tables of each that the others know
        self.left: list[int] = []  # since the last message
        for other in others:
            other.send({"do": "begin", "blocks": blocks, "size": size, "places": places, "apart": groups is not None})

    @torch.inference_mode()
    def step(self, plan: Plan) -> dict[Request, Tensor]:
        if plan.parts or plan.preempted or plan.swapped_out or plan.swapped_in:
            message = self._message(plan)
            for other in self.others:
                other.send(message)
        return super().step(plan)

    def forget(self, request: Request) -> None:
        super().forget(request)
        if request in self.numbers:
            self.left.append(self.numbers.pop(request))
            self.known.pop(request, None)

    def finish(self) -> None:
        for other in self.others:
            other.send({"do": "end"})

    def _message(self, plan: Plan) -> dict[str, Any]:
        new: dict[int, Any] = {}
        parts = []
        tables = {}
        for part in plan.parts:
            r = part.request
            number = self._number(r, new)
            beyond = r.tokens[max(part.start, len(r.prompt)) : part.start + part.count]
            parts.append([number, part.start, part.count, r.drafts, beyond, part.samples])
            tables[number] = self._changes(r)
        message = {"do": "step", "left": self.left, "new": new, "parts": parts, "tables": tables,
                   "preempted": [self.numbers[r] for r in plan.preempted if r in self.numbers],
                   "out": [[self._number(r, new), old, r.computed] for r, old in plan.swapped_out],
                   "in": [[self._number(r, new), now] for r, now in plan.swapped_in]}
        self.left = []
        return message

    def _number(self, r: Request, new: dict[int, Any]) -> int:
        if r not in self.numbers:
            self.numbers[r] = next(self.count)
            new[self.numbers[r]] = [r.prompt, r.params.prompt_logprobs]
        return self.numbers[r]

    def _changes(self, r: Request) -> list[list[Any]]:
        """Mostly nothing, or one block more; a prefix cache may also put equal blocks in the place of a request's own. What a window has
        left behind is read no more: whether it is still there makes no difference to the others."""
        known = self.known.setdefault(r, [[] for _ in r.tables])
        changes = []
        for old, table in zip(known, r.tables, strict=True):
            same = min(len(old), len(table))
            if old[:same] != table[:same]:
                same = next((i for i in range(same) if old[i] != table[i] and table[i] != GONE), same)
            changes.append([same, table[same:]])
            if same != len(old) or old != table:
                old[:] = table
        return changes


@dataclass(frozen=True)
class Told(Part):
    """A part of the lead's plan."""

    asked: bool = False

    @property
    def samples(self) -> bool:
        return self.asked


class Follower:
    """Computes the lead's steps, until it ends."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self.requests: dict[int, Request] = {}

    def run(self, lead: Channel) -> None:
        while (message := lead.receive()[0])["do"] != "end":
            self.runner.step(self.plan(message))

    def plan(self, message: dict[str, Any]) -> Plan:
        for number in message["left"]:
            self.runner.forget(self.requests.pop(number))
        for number, (prompt, logprobs) in message["new"].items():
            self.requests[int(number)] = Request(prompt, SamplingParams(prompt_logprobs=logprobs))
        for number, changes in message["tables"].items():
            r = self.requests[int(number)]
            r.tables += [[] for _ in changes[len(r.tables) :]]
            for table, (same, more) in zip(r.tables, changes, strict=True):
                table[same:], r.moved = more, min(r.moved, same)
        plan = Plan(preempted=[self.requests[n] for n in message["preempted"]],
                    swapped_in=[(self.requests[n], tables) for n, tables in message["in"]])
        for number, tables, computed in message["out"]:
            self.requests[number].computed = computed
            plan.swapped_out.append((self.requests[number], tables))
        for number, start, count, drafts, beyond, asked in message["parts"]:
            r = self.requests[number]
            at = max(start, len(r.prompt))
            r.tokens += [0] * (at - len(r.tokens))  # what a prefix hit skipped is not read
            r.tokens[at:] = beyond
            r.computed, r.drafts = start, drafts
            plan.parts.append(Told(r, start, count, asked))
        return plan
