"""Rollouts: problems in, groups of sampled and graded completions out.

Token in, token out: the ids that were sampled are the ids that are trained on; text is for graders and people only.
The completions of a group share their prompt: it is prefilled once and its cache rows are repeated. Dialogues with an
environment (tools) go on in the same cache; see `dialogue.py`.

They run in the static batch (`engine/batch.py`), not in the engine of pages that serves: for 32 groups of 8 it gave 1.7
times the tokens per second of the paged engine for a model of a million parameters, and 1.3 times for one of 30 million (one
thread; `engine/core.py` wins where requests come at any time, or prompts differ much in length).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pellucid import events
from pellucid.align.dialogue import Replies
from pellucid.align.examples import encode_prompt
from pellucid.align.prompts import Prompts, Row, content_of, schemas_of
from pellucid.align.reward_sources import task_reward
from pellucid.align.rewards import RewardSet, batch_of
from pellucid.engine import Sample, SamplingParams, run_all
from pellucid.nn import Decoder
from pellucid.tasks import Completion, Problem, Task, dialogue_of
from pellucid.tokenizers import Tokenizer
from pellucid.train import Run


@dataclass
class Graded(events.Event):
    """A rollout was graded. means, weights: by component; failed, seconds: by reward; metrics: what functions logged."""

    kind = "graded"
    completions: int
    means: dict[str, float]
    weights: dict[str, float]
    failed: dict[str, int]
    seconds: dict[str, float]
    metrics: dict[str, float]


@dataclass
class Group:
    """One problem with its G completions and their reward components.

    A sample's `tokens` are what followed the prompt; in a dialogue the tokens of tools and users lie among them, and its
    `mask` says which ones the model wrote: only these are trained, counted and given advantages. `logprobs` stand beside
    all tokens, 0 where nothing was sampled.
    """

    problem: Problem
    samples: list[Sample]
    texts: list[str]
    rewards: list[dict[str, float]]
    episodes: list[list[dict[str, Any]]] = field(default_factory=list)
    """Of dialogues: each completion as messages, the assistant's and those that it was given."""
    extra: list[dict[str, Any]] = field(default_factory=list)
    """What reward functions logged of each completion (`log_extra`), as JSON values."""

    def turns(self, i: int) -> tuple[str, ...]:
        """The assistant's turns in completion i, where it is a dialogue."""
        return tuple(m["content"] for m in self.episodes[i] if m["role"] == "assistant") if self.episodes else ()


class TrainerState:
    """What reward functions are handed as `trainer_state` (trl's names): where the run is."""

    def __init__(self, run: Run[Any, Any]):
        self._run = run

    @property
    def global_step(self) -> int:
        return int(self._run.history.steps)

    @property
    def max_steps(self) -> int | None:
        """None in a run by the clock."""
        return self._run.config.steps  # type: ignore[no-any-return]


class Rollouts:
    """Samples and grades with the weights that the model has at the time of the call.

    rewards: what the completions are graded with; by default the task's own grades. max_tokens: of a completion; of a whole
    dialogue behind its prompt, replies included. tools: whether the chat template is told of the tools that a problem may
    use; by default in dialogues only (the tasks of one turn describe them themselves, where they must be). top_p, top_k: of the
    groups to learn from; what could be drawn is then kept with each token (see `support.py`). Evaluation draws from all tokens.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, task: Task, *, max_tokens: int, max_batch: int = 512,
                 rewards: RewardSet | None = None, tools: bool | None = None, top_p: float | None = None, top_k: int | None = None):
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.max_tokens, self.max_batch, self.tools = max_tokens, max_batch, tools
        self.limits: dict[str, Any] = {name: x for name, x in (("top_p", top_p), ("top_k", top_k)) if x not in (None, 1.0)}
        self.state: Any = None  # handed to reward functions as `trainer_state`
        self.metrics: dict[str, float] = {}  # of the latest groups: what rewards logged, and how often they failed
        self._copied: Decoder | None = None
        self._held = False  # whether the copy samples, whatever becomes of the model
        self._rewards = rewards
        if isinstance(task, Prompts):
            task.keep(lambda row: len(self.prompt(row)) + max_tokens <= model.spec.limit,
                      f"with {max_tokens} tokens of completion exceed the model's context of {model.spec.limit}")

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def rewards(self) -> RewardSet:
        if self._rewards is None:
            self._rewards = RewardSet([task_reward(self.task)])
        return self._rewards

    def prompt(self, problem: Problem) -> list[int]:
        """The ids up to where the assistant's turn begins."""
        return encode_prompt(self.tokenizer, content_of(problem), self.schemas(problem))

    def schemas(self, problem: Problem) -> list[dict[str, Any]] | None:
        """What the chat template is told of the tools."""
        dialogue = dialogue_of(self.task, problem)
        if self.tools is False or (self.tools is None and dialogue is None and not isinstance(problem, Row)):
            return None
        return schemas_of(problem, dialogue)

    def sample(self, problems: Sequence[Problem], n: int, temperature: float, seed: int) -> list[list[Sample]]:
        """n samples of each problem, all problems in the same batches."""
        return self._sampled(problems, n, temperature, seed)[0]

    def _sampled(self, problems: Sequence[Problem], n: int, temperature: float, seed: int, limits: dict[str, Any] | None = None,
                 numbers: Sequence[int] | None = None, each: Callable[[], None] | None = None) -> tuple[list[list[Sample]], Replies]:
        """numbers: of these problems among those of all processes; what is drawn depends on them. each: called after every token."""
        params = SamplingParams(max_tokens=self.max_tokens, temperature=temperature, logprobs=temperature > 0, **(limits or {}))
        groups = [[Sample(ids, params, seed + i * n + j) for j in range(n)]
                  for i, ids in zip(range(len(problems)) if numbers is None else numbers, map(self.prompt, problems))]
        replies = Replies(self.tokenizer, self.task, [(s, p) for p, group in zip(problems, groups) for s in group])
        with _evaluating(self._runner()) as model:
            run_all(model, [s for g in groups for s in g], self.tokenizer.eos_ids, max_batch=self.max_batch,
                    reply=replies if replies.needed else None, support=bool(limits), each=each)
        return groups, replies

    def _runner(self) -> Decoder:
        """The model, or a copy with its weights cast to the dtype it computes in: once here, not in every step."""
        if self._held:
            assert self._copied is not None
            return self._copied
        own = self.model.compute_dtype in (None, self.model.embed.weight.dtype)
        return self.model if own else self._copy()

    @torch.no_grad()
    def _copy(self) -> Decoder:
        """The weights as they are now, in the dtype that the model computes in."""
        dtype = self.model.compute_dtype or self.model.embed.weight.dtype
        if self._copied is None or self._copied.embed.weight.dtype != dtype:
            self._copied = copy.deepcopy(self.model).to(dtype).requires_grad_(False)
        for ours, theirs in zip(self._copied.parameters(), self.model.parameters()):
            ours.copy_(theirs)
        return self._copied

    def hold(self) -> None:
        """From here on a copy of the weights as they are now samples, whatever becomes of the model's, until `let_go`."""
        self._copy()
        self._held = True

    def let_go(self) -> None:
        self._held = False

    def text(self, sample: Sample) -> str:
        """The completion without its end-of-turn token."""
        return self.tokenizer.decode(sample.tokens[:-1] if sample.finish_reason == "stop" else sample.tokens)

    def groups(self, problems: Sequence[Problem], n: int, temperature: float, seed: int, numbers: Sequence[int] | None = None,
               each: Callable[[], None] | None = None) -> list[Group]:
        """n completions of each problem, all graded together; a component that nobody graded is not in `rewards`."""
        if not problems:
            self.metrics = {}
            return []
        made = self.ungraded(problems, n, temperature, seed, self.limits, numbers, each)
        scores = self.rewards.score(batch_of(made), self.state)
        events.emit(Graded(len(made) * n, {k: v for k, x in scores.components.items() if (v := float(x.nanmean())) == v}, scores.weights,
                           scores.failed, scores.seconds, scores.metrics))
        self.metrics = scores.metrics | {f"reward/{name}/failed": failed / (len(made) * n) for name, failed in scores.failed.items() if failed}
        for i, group in enumerate(made):
            group.rewards = [{name: value for name, values in scores.components.items()
                              if (value := float(values[i * n + j])) == value} for j in range(n)]
            group.extra = [{name: events.plain(column[i * n + j]) for name, column in scores.extra.items() if column[i * n + j] is not None}
                           for j in range(n)] if scores.extra else []
        return made

    def ungraded(self, problems: Sequence[Problem], n: int, temperature: float, seed: int, limits: dict[str, Any] | None = None,
                 numbers: Sequence[int] | None = None, each: Callable[[], None] | None = None) -> list[Group]:
        """Without their grades."""
        groups, replies = self._sampled(problems, n, temperature, seed, limits, numbers, each)
        return [Group(problem, samples, [self.text(s) for s in samples], [],
                      [replies.messages(s) for s in samples] if dialogue_of(self.task, problem) else [])
                for problem, samples in zip(problems, groups)]

    def for_evaluation(self, seed: int) -> Callable[[list[Problem], int, float], list[list[Completion]]]:
        """The `generate` that `tasks.evaluate` asks for."""

        return lambda problems, draws, temperature: completions(self.ungraded(problems, draws, temperature, seed))


@contextlib.contextmanager
def _evaluating(model: Decoder) -> Iterator[Decoder]:
    """A model that is being trained samples as it will be used: experts with a capacity drop no token then."""
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


def completions(groups: Sequence[Group]) -> list[list[Completion]]:
    """Groups as a task's grader takes them."""
    return [[Completion(g.texts[i], s.trained, s.finish_reason == "stop", g.turns(i)) for i, s in enumerate(g.samples)] for g in groups]


def trained_lengths(groups: Sequence[Group]) -> Tensor:
    """(N, G) int64: tokens of each completion that the model wrote."""
    return torch.tensor([[s.trained for s in g.samples] for g in groups])


def truncated(groups: Sequence[Group]) -> Tensor:
    """(N, G) bool: completions that were cut at the limit of their length."""
    return torch.tensor([[s.finish_reason == "length" for s in g.samples] for g in groups])


def dialogue_table(groups: Sequence[Group]) -> dict[str, float]:
    """Of dialogues: their mean number of turns, and the share of their tokens that was given and not sampled."""
    several = [(g, i) for g in groups if g.episodes for i in range(len(g.samples))]
    if not several:
        return {}
    tokens, given = sum(len(g.samples[i].tokens) for g, i in several), sum(len(g.samples[i].tokens) - g.samples[i].trained for g, i in several)
    return {"turns/mean": sum(len(g.turns(i)) for g, i in several) / len(several), "turns/given_tokens": given / max(tokens, 1)}


def components(groups: Sequence[Group], asked: Sequence[str] = ()) -> dict[str, Tensor]:
    """name -> (N, G) float64; NaN where a task has no such component. asked: what they were to be graded with, which is there (as NaN)
    where every reward failed."""
    names = sorted({name for g in groups for r in g.rewards for name in r}) or sorted(asked)
    return {name: torch.tensor([[r.get(name, float("nan")) for r in g.rewards] for g in groups], dtype=torch.float64)
            for name in names}
