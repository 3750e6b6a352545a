"""Tensor-parallel serving: one process plans, all compute.

The lead has the scheduler, the prefix cache and the sampler. Before each step it sends the others its plan, as far as a runner
needs it: which tokens of which requests, and the blocks that are new to them. They could plan for themselves, each with all
requests (SGLang does); but then a difference of one bit or of one clock tick leaves processes waiting for each other in different
steps, and each of them needs tokenizer, grammars and sampler. A plan is some hundred bytes: it is sent (as vLLM does).

Legend of a message of a step:
    parts      [number, start, count, drafts, tokens beyond the prompt, whether logits are asked for]
    new        number -> the prompt, how many log-probabilities of it are asked for, the number of its adapter
    tables     number -> what has changed in its tables of blocks (engine/mirror.py)

Drafts are the lead's alone: a draft model, or what stood in the text before, is not shared. The model's own layer of multi-token
prediction is cut as its other layers are: its passes are told too, with the states that go into them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.engine.layer_groups import Group as LayerGroup
from pellucid.engine.mirror import Mirror, Mirrored
from pellucid.engine.params import SamplingParams
from pellucid.engine.predictor import Predictor
from pellucid.engine.request import Request
from pellucid.engine.runner import Logits, Runner
from pellucid.engine.scheduler import Part, Plan
from pellucid.engine.shared_adapters import AdapterTable
from pellucid.nn import Decoder
from pellucid.ops.cache_codes import CacheCodes
from pellucid.parallel import Channel


class LeadRunner(Runner):
    """A runner whose steps the others compute too.  always: also those without work."""

    always = False

    def __init__(self, model: Decoder, blocks: int, size: int, places: int, codes: CacheCodes | None = None,
                 groups: Sequence[LayerGroup] | None = None, *, others: Sequence[Channel], **more: Any):
        super().__init__(model, blocks, size, places, codes, groups, **more)
        self.others, self.mirror = others, Mirror()
        tell(others, {"do": "begin", "blocks": blocks, "size": size, "places": places, "apart": groups is not None})

    @torch.inference_mode()
    def step(self, plan: Plan, sources: Mapping[Request, int] | None = None) -> Logits:
        if self.always or plan.parts or plan.preempted or plan.swapped_out or plan.swapped_in:
            tell(self.others, self._message(plan))
        return super().step(plan, sources)

    def predictor(self, blocks: int, size: int, places: int) -> Predictor:
        return LeadPredictor(self.model, blocks, size, places, others=self.others)

    def forget(self, request: Request) -> None:
        super().forget(request)
        self.mirror.forget(request)

    def finish(self) -> None:
        tell(self.others, {"do": "end"})

    def _message(self, plan: Plan) -> dict[str, Any]:
        new: dict[int, Any] = {}
        parts = []
        tables = {}
        for part in plan.parts:
            r = part.request
            number = self._number(r, new)
            beyond = r.tokens[max(part.start, len(r.prompt)) : part.start + part.count]
            parts.append([number, part.start, part.count, r.drafts, beyond, part.samples])
            tables[number] = self.mirror.changes(r)
        known = self.mirror.numbers
        return {"do": "step", "left": self.mirror.take_left(), "new": new, "parts": parts, "tables": tables,
                "preempted": [known[r] for r in plan.preempted if r in known],
                "out": [[self._number(r, new), old, r.computed] for r, old in plan.swapped_out],
                "in": [[self._number(r, new), now] for r, now in plan.swapped_in]}

    def _number(self, r: Request, new: dict[int, Any]) -> int:
        number, is_new = self.mirror.number(r)
        if is_new:
            new[number] = [r.prompt, r.params.prompt_logprobs, None if r.adapter is None else r.adapter.number]
        return number


class LeadPredictor(Predictor):
    """A prediction layer whose passes the others compute too."""

    def __init__(self, model: Decoder, blocks: int, size: int, places: int, *, others: Sequence[Channel], **more: Any):
        super().__init__(model, blocks, size, places, **more)
        self.others, self.mirror = others, Mirror()
        tell(others, {"do": "begin_prediction", "blocks": blocks, "size": size, "places": places})

    def run(self, requests: Sequence[Request], tokens: Sequence[Sequence[int]], states: Tensor) -> Tensor:
        rows = [[self.mirror.number(r)[0], len(r.prompt), r.computed, self.mirror.changes(r)] for r in requests]
        tell(self.others, {"do": "predict", "left": self.mirror.take_left(), "rows": rows, "tokens": tokens}, [states])
        return super().run(requests, tokens, states)

    def logits(self, states: Tensor) -> Tensor:
        tell(self.others, {"do": "predict_logits"}, [states])
        return super().logits(states)

    def forget(self, request: Request) -> None:
        super().forget(request)
        self.mirror.forget(request)


def tell(others: Sequence[Channel], message: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
    for other in others:
        other.send(message, tensors)


@dataclass(frozen=True)
class Told(Part):
    """A part of the lead's plan."""

    asked: bool = False

    @property
    def samples(self) -> bool:
        return self.asked


class Follower:
    """Computes the lead's steps, until it ends."""

    def __init__(self, runner: Runner, lead: Channel):
        self.runner, self.lead, self.mirrored = runner, lead, Mirrored()
        self.adapters = AdapterTable(runner.model)
        self.handlers = {"step": self.step, "begin_prediction": self.begin_prediction, "predict": self.predict, "predict_logits": self.predict_logits,
                         "load_adapter": self.load_adapter, "drop_adapter": lambda message, _: self.adapters.drop(message["number"])}

    def run(self) -> None:
        while True:
            message, tensors = self.lead.receive()
            if message["do"] == "end":
                return
            self.handlers[message["do"]](message, [t.to(self.runner.device) for t in tensors])

    def step(self, message: dict[str, Any], _: list[Tensor]) -> None:
        self.runner.step(self.plan(message))

    def plan(self, message: dict[str, Any]) -> Plan:
        known = self.mirrored
        for r in known.leave(message["left"]):
            self.runner.forget(r)
        for number, (prompt, logprobs, adapter) in message["new"].items():
            known.requests[int(number)] = Request(prompt, SamplingParams(prompt_logprobs=logprobs), adapter=self.adapters.of(adapter))
        for number, changes in message["tables"].items():
            known.change(int(number), changes)
        plan = Plan(preempted=[known[n] for n in message["preempted"]], swapped_in=[(known[n], tables) for n, tables in message["in"]])
        for number, tables, computed in message["out"]:
            known[number].computed = computed
            plan.swapped_out.append((known[number], tables))
        for number, start, count, drafts, beyond, asked in message["parts"]:
            r = known[number]
            at = max(start, len(r.prompt))
            r.tokens += [0] * (at - len(r.tokens))  # what a prefix hit skipped is not read
            r.tokens[at:] = beyond
            r.computed, r.drafts = start, drafts
            plan.parts.append(Told(r, start, count, asked))
        return plan

    def load_adapter(self, message: dict[str, Any], _: list[Tensor]) -> None:
        self.lead.send(self.adapters.load(message["number"], message["path"], message["name"]))

    def begin_prediction(self, message: dict[str, Any], _: list[Tensor]) -> None:
        self.predictor = self.runner.predictor(message["blocks"], message["size"], message["places"])
        self.twins = Mirrored()

    def predict(self, message: dict[str, Any], tensors: list[Tensor]) -> None:
        for twin in self.twins.leave(message["left"]):
            self.predictor.forget(twin)
        twins = []
        for number, length, computed, changes in message["rows"]:
            if number not in self.twins.requests:
                self.twins.requests[number] = Request([0] * length, SamplingParams())
            twins.append(self.twins.change(number, changes))
            twins[-1].computed = computed
        self.predictor.run(twins, message["tokens"], tensors[0])

    def predict_logits(self, message: dict[str, Any], tensors: list[Tensor]) -> None:
        self.predictor.logits(tensors[0])
