"""Distillation by logits: the student moves towards the teacher's whole distribution at every token of some text.

    on-policy (on_policy = 1)   the text is the student's own samples; by default with the reverse KL (arXiv 2306.13649, 2306.08543):
                                the student learns what the teacher would have said in the places where the student gets to
    off-policy (on_policy = 0)  the text is given, as a rule traces of the teacher; by default with the forward KL
    between                     each step draws which of the two it is (lambda of GKD)

    loss = mean over the trained tokens of D_beta(teacher || student)

`divergence.py` has the divergences: forward and reverse KL, generalised JSD, over the whole vocabulary or over the teacher's
k likeliest tokens. `estimate="sampled"` is the policy gradient of the reverse KL with the sampled token alone,
sg[log p - log p_teacher] log p: it needs no distribution of the teacher, and is noisier.
Sequence-level distillation is supervised learning on `traces.py`'s file; different vocabularies can only be distilled so.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pellucid.align import metrics as tables
from pellucid.align.choices import check_name
from pellucid.align.divergence import Tail, distill_logits, distill_top_k, top_k_of
from pellucid.align.rollout import Rollouts, completions
from pellucid.align.rows import pack_completions
from pellucid.align.sharing import for_evaluation, ungraded
from pellucid.data.packing import IGNORE, Batches, Packed
from pellucid.errors import BadInput
from pellucid.nn import Decoder, Routing
from pellucid.ops import token_logprobs
from pellucid.optim import OptimConfig, Schedule
from pellucid.tasks import Completion, Problem, Task, finished_only
from pellucid.tasks.evaluate import grade
from pellucid.tokenizers import Tokenizer
from pellucid.train import Evaluate, Run, RunConfig, RunHistory
from pellucid.train.loss import balance_share, routing_of
from pellucid.train.ranks import ALONE, Ranks

Estimate = Literal["full", "top-k", "sampled"]


@dataclass
class DistillConfig(RunConfig):
    """How a student learns from a teacher's logits."""

    stage: str = "distill"
    """Name in events and messages."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(name="adamw", lr=4e-4))
    """The optimizer."""
    schedule: Schedule = field(default_factory=lambda: Schedule("linear", warmup=0.05, floor=0.1))
    """The learning-rate schedule."""
    on_policy: float = 1.0
    """Share of the steps that learn from the student's own samples; the others learn from the given rows."""
    beta: float = 1.0
    """1: reverse KL, 0: forward KL, between: generalised JSD."""
    estimate: Estimate = "full"
    """Over the whole vocabulary, the teacher's k likeliest tokens, or the sampled token alone (reverse KL on own samples only)."""
    top_k: int = 64
    """The k of "top-k"."""
    tail: Tail = "bucket"
    """top-k: what becomes of the probability outside: one more event, renormalised away, or dropped."""
    prompts: int = 32
    """Problems in an on-policy step."""
    group: int = 1
    """Samples of each problem."""
    max_tokens: int = 96
    """Longest sample."""
    temperature: float = 1.0
    """Of the samples, and of both distributions."""
    rows: int = 16
    """Given rows in an off-policy step."""
    micro_rows: int = 32
    """Rows in a micro-batch (memory only)."""

    def __post_init__(self) -> None:
        check_name("estimate", self.estimate, Estimate)
        check_name("tail", self.tail, Tail)
        if not 0 <= self.on_policy <= 1 or not 0 <= self.beta <= 1:
            raise BadInput(f"on_policy = {self.on_policy:g} and beta = {self.beta:g} must lie in [0, 1]", next="change the one that does not")
        if min(self.prompts, self.group, self.rows, self.micro_rows, self.max_tokens, self.top_k) < 1 or not self.temperature > 0:
            raise BadInput("prompts, group, rows, micro_rows, max_tokens and top_k are at least 1, and the temperature is above 0",
                           next="change the one that is not")
        if self.estimate == "sampled" and (self.beta != 1 or self.on_policy != 1):
            raise BadInput("the sampled estimate is of the reverse KL on the student's own samples",
                           f"beta is {self.beta:g} and on_policy {self.on_policy:g}", "leave both at 1, or use estimate='full'")


@dataclass
class DistillHistory(RunHistory):
    sampled: int = 0  # tokens
    metrics: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # (progress, the table of the step)


class DistillLoop(Run[DistillConfig, DistillHistory]):
    """`DistillLoop(...).run()` moves the student towards the teacher until the budget is spent.

    teacher_tokenizer: must say the same of every token as the student's. task: where on-policy problems come from.
    data: rows for the off-policy steps.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, teacher: Decoder, teacher_tokenizer: Tokenizer, config: DistillConfig, *,
                 task: Task | None = None, data: Packed | None = None, evaluate: Evaluate | None = None,
                 checkpoint: str | Path | None = None, resume_hint: str = "--resume", ranks: Ranks = ALONE):
        check_vocabularies(tokenizer, teacher_tokenizer)
        if config.on_policy > 0 and task is None:
            raise BadInput("the student samples answers, but there are no problems", next="give a task, or on_policy=0 and rows")
        if config.on_policy < 1 and data is None:
            raise BadInput("some steps learn from given text, but there is none", next="give traces of the teacher, or on_policy=1")
        if config.on_policy > 0 and config.prompts < ranks.size:
            raise BadInput(f"{ranks.size} processes share {config.prompts} prompts", "each of them samples at least one",
                           "use more prompts, or fewer processes")
        super().__init__(model, config, DistillHistory(), evaluate=evaluate, checkpoint=checkpoint, tokenizer=tokenizer,
                         resume_hint=resume_hint, ranks=ranks)
        self.teacher, self.task = teacher.requires_grad_(False).eval(), task
        self.rollouts = None if task is None else Rollouts(model, tokenizer, task, max_tokens=config.max_tokens)
        self.batches = None if data is None else Batches(data, config.rows, config.seed)
        self.rng = random.Random(config.seed)
        self.vocab = min(model.head_weight.shape[0], teacher.head_weight.shape[0])  # what stands behind is padding of the matrices

    def step(self, progress: float) -> dict[str, float]:
        c, h = self.config, self.history
        numbers: dict[str, float] = {}
        if own := self.rng.random() < c.on_policy:
            rows, numbers = self._sampled()
        else:
            assert self.batches is not None
            rows = self.batches.next().to(self.model.embed.weight.device)
        total = int((rows.labels != IGNORE).sum())
        parts: list[dict[str, Tensor]] = []
        self.model.train()

        def share(micro: Packed) -> Tensor:
            loss, shown = self.divergence(micro)
            parts.append({k: v / total for k, v in shown.items()})
            return loss / total

        size = self.ranks.rows(len(rows), c.micro_rows)
        result = self.stepper.step((rows.rows(slice(i, i + size)) for i in range(0, len(rows), size)), share, progress)
        self.count()
        numbers = tables.merge(self.ranks.gathered(tables.merge(parts))) | numbers | {"on_policy": float(own), "grad_norm": result.grad_norm, "update/ratio": result.ratio,
                                                "lr": result.lr} | tables.memory_table(rows.tokens.device)
        h.metrics.append((progress, numbers))
        return numbers

    def _sampled(self) -> tuple[Packed, dict[str, float]]:
        """The student's samples as rows, and how good they are."""
        assert self.rollouts is not None and self.task is not None
        c = self.config
        problems = [self.task.sample(self.rng, "train") for _ in range(c.prompts)]
        groups = ungraded(self.rollouts, self.ranks, problems, c.group, c.temperature, self.rng.getrandbits(62))
        said = [(g.problem, s, said) for g, answers in zip(groups, completions(groups)) for s, said in zip(g.samples, answers) if s.trained]
        samples = [s for _, s, _ in said]
        self.history.sampled += sum(s.trained for s in samples)
        lengths = torch.tensor([s.trained for s in samples])
        cut = torch.tensor([s.finish_reason == "length" for s in samples])
        graded = [finished_only(grade(self.task, problem, completion), completion.finished) for problem, _, completion in said]
        right = torch.tensor([g.get("correct", 0.0) == 1.0 for g in graded])
        numbers = {"accuracy": float(right.double().mean())} | tables.length_table(lengths, cut, right)
        return pack_completions(samples).to(self.model.embed.weight.device), numbers

    def for_evaluation(self, seed: int) -> Callable[[list[Problem], int, float], list[list[Completion]]]:
        """The `generate` that `tasks.evaluate` asks for, of all processes together."""
        assert self.rollouts is not None
        return for_evaluation(self.rollouts, self.ranks, seed)

    def divergence(self, rows: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over the labelled positions of what is minimised (nats), and sums that are shown."""
        c = self.config
        routing = routing_of(self.model)
        mine, labels, head = self._states(self.model, rows, routing)
        with torch.no_grad():
            theirs, _, their_head = self._states(self.teacher, rows)
        logp, entropy = token_logprobs(mine.detach(), head.detach(), labels, c.temperature, True)
        if c.estimate == "sampled":
            own, _ = token_logprobs(mine, head, labels, c.temperature)
            gap = own.detach() - token_logprobs(theirs, their_head, labels, c.temperature)[0].to(own.dtype)
            values, shown = gap * own, gap
        elif c.estimate == "top-k":
            ids, known = top_k_of(theirs, their_head, min(c.top_k, self.vocab), c.temperature)
            values = shown = distill_top_k(mine, head, ids, known, beta=c.beta, tail=c.tail, temperature=c.temperature)
        else:
            values = shown = distill_logits(mine, theirs, head, their_head, beta=c.beta, temperature=c.temperature)
        assert entropy is not None
        return values.sum() + balance_share(routing, len(labels)), {"divergence": shown.detach().sum(), "entropy/mean": entropy.sum(), "nll": -logp.sum()}

    def _states(self, model: Decoder, rows: Packed, routing: Routing | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states of the labelled positions, their labels, and the head's rows of tokens that exist."""
        hidden = model.hidden(rows.tokens, positions=rows.positions, documents=rows.documents, routing=routing).flatten(0, 1)
        labels = rows.labels.flatten()
        on = labels != IGNORE
        return hidden[on], labels[on], model.head_weight[: self.vocab].to(hidden.dtype)

    # --- stop and go on -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        version, numbers, gauss = self.rng.getstate()
        return {"rng": [version, list(numbers), gauss], "batches": None if self.batches is None else self.batches.state()}

    def restore(self, state: dict[str, Any]) -> None:
        version, numbers, gauss = state["rng"]
        self.rng.setstate((version, tuple(numbers), gauss))
        if self.batches is not None:
            self.batches.load_state(state["batches"])


def check_vocabularies(student: Tokenizer, teacher: Tokenizer) -> None:
    """Both must mean the same by every token, or their distributions cannot be compared. Errors: BadInput."""
    advice = "distil over text (--method traces), which any two models can, or choose a teacher of the student's family"
    if student.vocab_size != teacher.vocab_size:
        raise BadInput(f"teacher and student differ in vocabulary: {teacher.vocab_size:,} and {student.vocab_size:,} tokens",
                       "a divergence compares their probabilities token by token", advice)
    for i in range(student.vocab_size):
        if student.token_bytes(i) != teacher.token_bytes(i):
            raise BadInput(f"teacher and student differ in vocabulary: token {i} is {teacher.token_bytes(i)!r} for one and "
                           f"{student.token_bytes(i)!r} for the other", "a divergence compares their probabilities token by token", advice)
