"""The offline loop: learning from given answers, in pairs (the DPO family) or labelled one by one (KTO).

    answers -> packed rows -> log-probabilities -> loss of a pair -> one step

The reference is the weights as they were GIVEN, never re-read from a file that may differ: either their log-probabilities
of all answers are computed once before the first step (reference="precompute"), or a copy of the weights answers in
every step ("live"). The numbers are the same; see which is cheaper for your number of epochs.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from pellucid.align import metrics as tables
from pellucid.align.aggregation import Counts, sequence_sums
from pellucid.align.answers import Answer, Flat, Shuffled, logprobs_of
from pellucid.align.preference import preference_objective
from pellucid.align.preference_config import PreferenceConfig
from pellucid.align.unpaired import UnpairedConfig, kl_reference_point, unpaired_objective
from pellucid.errors import BadInput
from pellucid.nn import Decoder
from pellucid.optim import OptimConfig, Schedule
from pellucid.train import Evaluate, Run, RunConfig, RunHistory
from pellucid.train.loss import balance_share, routing_of
from pellucid.train.ranks import ALONE, Ranks

I = TypeVar("I")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first preferred. margin: by how much, where that is known (reward models)."""

    chosen: Answer
    rejected: Answer
    margin: float = 0.0


@dataclass(frozen=True)
class Labelled:
    """One answer that is good or bad."""

    answer: Answer
    good: bool


@dataclass
class OfflineConfig(RunConfig):
    """How the offline loop goes through its data."""

    stage: str = "dpo"
    """Name in events and messages."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(name="adamw", lr=1e-6))
    """The optimizer."""
    schedule: Schedule = field(default_factory=lambda: Schedule("linear", warmup=0.1, floor=0.0))
    """The learning-rate schedule."""
    batch: int = 32
    """Items (pairs, or labelled answers) in a step."""
    micro: int | None = None
    """Items in a micro-batch (memory only); by default all of the step's."""
    reference: Literal["precompute", "live"] = "precompute"
    """Where the reference's log-probabilities come from: computed once before the run, or in every step."""


@dataclass
class OfflineHistory(RunHistory):
    losses: list[tuple[float, float]] = field(default_factory=list)  # (progress, loss)
    metrics: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # (progress, the table of the step)


class OfflineLoop(Run[OfflineConfig, OfflineHistory], Generic[I]):
    """What the offline trainers share: the order of the data, micro-batches, the reference, resume."""

    def __init__(self, model: Decoder, items: Sequence[I], config: OfflineConfig, *, evaluate: Evaluate | None = None,
                 checkpoint: str | Path | None = None, tokenizer: Any = None, resume_hint: str = "--resume", ranks: Ranks = ALONE):
        if config.batch < 1 or (config.micro is not None and config.micro < 1):
            raise BadInput("batch and micro are at least 1", next="change the one that is not")
        super().__init__(model, config, OfflineHistory(), evaluate=evaluate, checkpoint=checkpoint, tokenizer=tokenizer,
                         resume_hint=resume_hint, ranks=ranks)
        self.items, self.order = items, Shuffled(len(items), config.batch, config.seed)

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    def step(self, progress: float) -> dict[str, float]:
        h, ids = self.history, self.order.next()
        self.model.train()
        share_of, parts = self.prepare(ids)
        result = self.stepper.step(self._micro(ids), share_of, progress)
        self.count()
        numbers = self.table(tables.merge(self.ranks.gathered(tables.merge(parts)))) | {"loss": result.loss, "grad_norm": result.grad_norm, "update/ratio": result.ratio,
                                                     "lr": result.lr, "epoch": self.order.taken / self.order.items}
        numbers |= tables.memory_table(self.device)
        h.losses.append((progress, result.loss))
        h.metrics.append((progress, numbers))
        return numbers

    @abstractmethod
    def prepare(self, ids: list[int]) -> tuple[Callable[[list[int]], Tensor], list[dict[str, Tensor]]]:
        """The loss of a micro-batch of these items as a share of the step's, and the list that its metrics go to."""

    def table(self, merged: dict[str, float]) -> dict[str, float]:
        """The step's metrics from the sums of its shares."""
        return merged

    def _micro(self, ids: list[int]) -> Iterator[list[int]]:
        size = self.ranks.rows(len(ids), self.config.micro)
        for start in range(0, len(ids), size):
            yield ids[start : start + size]

    def state(self) -> dict[str, Any]:
        return {"order": self.order.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.order.load_state(state["order"])


class Reference:
    """Log-probabilities of answers under the weights that `model` has now."""

    def __init__(self, model: Decoder, answers: Sequence[Answer], how: str):
        self.model = copy.deepcopy(model).requires_grad_(False).eval() if how == "live" else None
        self.known = {} if how == "live" else {id(a): x for a, x in zip(answers, logprobs_of(model.eval(), answers))}
        self.answers = answers  # so that their ids stay theirs

    @torch.no_grad()
    def __call__(self, flat: Flat) -> Tensor:
        """(M,)"""
        if self.model is not None:
            return flat.logprobs(self.model)
        return flat.spread([self.known[id(a)] for a in flat.answers])


class PreferenceLoop(OfflineLoop[Pair]):
    """`PreferenceLoop(...).run()` trains on pairs by a loss of the DPO family, or a mixture of several."""

    def __init__(self, model: Decoder, pairs: Sequence[Pair], objective: PreferenceConfig, config: OfflineConfig, **how: Any):
        _check_answers([a for p in pairs for a in (p.chosen, p.rejected)])
        if objective.whole_batch and config.micro is not None and config.micro < config.batch:
            raise BadInput("this loss sorts the pairs of a step", "micro-batches would change what it computes",
                           "leave micro out, or choose a loss that looks at one pair at a time")
        super().__init__(model, pairs, config, **how)
        if objective.whole_batch and self.ranks.size > 1:
            raise BadInput("this loss sorts the pairs of a step", "no process sees them all", "leave --processes out, or choose another loss")
        self.objective = objective
        answers = [a for p in pairs for a in (p.chosen, p.rejected)]
        self.reference = Reference(model, answers, config.reference) if objective.needs_reference else None

    def prepare(self, ids: list[int]) -> tuple[Callable[[list[int]], Tensor], list[dict[str, Tensor]]]:
        counts = Counts(tokens=sum(self.items[i].chosen.trained for i in ids), sequences=len(ids))
        parts: list[dict[str, Tensor]] = []

        def share(micro: list[int]) -> Tensor:
            flat = Flat([a for i in micro for a in (self.items[i].chosen, self.items[i].rejected)], self.device)
            routing = routing_of(self.model)
            logp, squares = flat.logprobs_and_squares(self.model, routing) if self.objective.weighting == "wpo" else (
                flat.logprobs(self.model, routing), None)
            ref = self.reference(flat) if self.reference else None
            loss, numbers = preference_objective(logp, ref, flat.sequence, self.objective, counts, log_square=squares)
            parts.append(numbers)
            return loss + balance_share(routing, len(micro) / len(ids))

        return share, parts


class UnpairedLoop(OfflineLoop[Labelled]):
    """`UnpairedLoop(...).run()` trains on single answers that are good or bad (KTO)."""

    def __init__(self, model: Decoder, items: Sequence[Labelled], objective: UnpairedConfig, config: OfflineConfig, **how: Any):
        answers = [x.answer for x in items]
        _check_answers(answers)
        if objective.loss == "kto" and (len(items) < 2 or config.batch < 2):
            raise BadInput("KTO compares with the answers of other prompts", "a step of one example has none",
                           "use a batch of two examples or more")
        super().__init__(model, items, config, **how)
        self.objective = objective
        self.mismatched = mismatched(answers) if objective.loss == "kto" else []
        self.reference = Reference(model, [*answers, *self.mismatched], config.reference)

    def prepare(self, ids: list[int]) -> tuple[Callable[[list[int]], Tensor], list[dict[str, Tensor]]]:
        counts = Counts(tokens=sum(self.items[i].answer.trained for i in ids), sequences=len(ids))
        z = self._reference_point(ids) if self.mismatched else torch.zeros((), device=self.device)
        parts: list[dict[str, Tensor]] = [{"kl": z / self.ranks.size}]  # every process has it

        def share(micro: list[int]) -> Tensor:
            flat = Flat([self.items[i].answer for i in micro], self.device)
            good = torch.tensor([self.items[i].good for i in micro], device=self.device)
            routing = routing_of(self.model)
            loss, numbers = unpaired_objective(flat.logprobs(self.model, routing), self.reference(flat), flat.sequence, good, z,
                                               self.objective, counts)
            parts.append(numbers)
            return loss + balance_share(routing, len(micro) / len(ids))

        return share, parts

    def table(self, merged: dict[str, float]) -> dict[str, float]:
        good = merged.pop("share/good")
        for name in ("rewards", "logps"):
            for label, share in (("good", good), ("bad", 1 - good)):
                total = merged.pop(f"{name}/{label}_sum")
                merged[f"{name}/{label}"] = total / share if share > 1e-9 else math.nan
        return merged

    @torch.no_grad()
    def _reference_point(self, ids: list[int]) -> Tensor:
        """z of the whole step, before its first micro-batch."""
        ratios = [torch.zeros(0, device=self.device)]
        for micro in self.ranks.mine(self._micro(ids)):
            flat = Flat([self.mismatched[i] for i in micro], self.device)
            ratios.append(sequence_sums(flat.logprobs(self.model) - self.reference(flat), flat.sequence))
        return kl_reference_point(self.ranks.cat(torch.cat(ratios)).to(self.device))


def mismatched(answers: Sequence[Answer]) -> list[Answer]:
    """Every prompt with the nearest answer before it that another prompt got: the two answers of a pair that was taken apart stand side
    by side, and one of them is no stranger to the other's prompt."""
    if all(a.prompt == answers[0].prompt for a in answers):
        raise BadInput("KTO compares with the answers of other prompts", "all examples have the same prompt", "give more prompts")
    others = (next(answers[i - k] for k in range(1, len(answers)) if answers[i - k].prompt != a.prompt) for i, a in enumerate(answers))
    return [Answer(a.prompt, b.tokens, b.mask) for a, b in zip(answers, others)]


@torch.no_grad()
def pair_accuracy(model: Decoder, pairs: Sequence[Pair], reference: list[Tensor] | None = None) -> tuple[float, dict[str, Any]]:
    """In how many held-out pairs the policy raised the chosen answer more than the rejected, against the reference's
    log-probabilities (`logprobs_of` the answers, chosen and rejected in turn); without: by mean log-probability."""
    answers = [a for p in pairs for a in (p.chosen, p.rejected)]
    own = torch.tensor([float(x.sum()) for x in logprobs_of(model.eval(), answers)])
    if reference is None:
        score = own / torch.tensor([max(a.trained, 1) for a in answers])
    else:
        score = own - torch.tensor([float(x.sum()) for x in reference])
    c, r = score[0::2], score[1::2]
    return float((c > r).float().mean()), {"margin": float((c - r).mean()), "logps/chosen": float(own[0::2].mean()),
                                           "logps/rejected": float(own[1::2].mean())}


def _check_answers(answers: Sequence[Answer]) -> None:
    for number, a in enumerate(answers):
        if not a.prompt or not a.trained:
            raise BadInput(f"answer {number} has no {'prompt' if not a.prompt else 'token to learn from'}",
                           "nothing predicts its first token" if not a.prompt else "", "leave it out of the data")
