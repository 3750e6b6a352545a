"""Rollouts: problems in, groups of sampled and graded completions out.

Token in, token out: the ids that were sampled are the ids that are trained on; text is for graders and people only.
The completions of a group share their prompt: it is prefilled once and its cache rows are repeated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.align.rewards import RewardSet, batch_of, task_reward
from pellucid.engine import Sample, SamplingParams, run_all
from pellucid.nn import Decoder
from pellucid.tasks import Completion, Problem, Task
from pellucid.tokenizers import Tokenizer


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


class Rollouts:
    """Samples and grades with the weights that the model has at the time of the call.

    rewards: what the completions are graded with; by default the task's own grades.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, task: Task, *, max_tokens: int, max_batch: int = 512,
                 rewards: RewardSet | None = None):
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.max_tokens, self.max_batch = max_tokens, max_batch
        self.state: Any = None  # handed to reward functions as `trainer_state`
        self._cast: Decoder | None = None
        self._rewards = rewards

    @property
    def rewards(self) -> RewardSet:
        if self._rewards is None:
            self._rewards = RewardSet([task_reward(self.task)])
        return self._rewards

    def prompt(self, problem: Problem) -> list[int]:
        """The ids up to where the assistant's turn begins. Tools are described only to models that need telling."""
        message = [{"role": "user", "content": problem.prompt}]
        return self.tokenizer.encode_chat(message, add_generation_prompt=True)[0]

    def sample(self, problems: Sequence[Problem], n: int, temperature: float, seed: int) -> list[list[Sample]]:
        """n samples of each problem, all problems in the same batches."""
        params = SamplingParams(max_tokens=self.max_tokens, temperature=temperature, logprobs=temperature > 0)
        groups = [[Sample(ids, params, seed + i * n + j) for j in range(n)]
                  for i, ids in enumerate(map(self.prompt, problems))]
        flat = [s for g in groups for s in g]
        run_all(self._runner(), flat, self.tokenizer.eos_ids, max_batch=self.max_batch)
        return groups

    @torch.no_grad()
    def _runner(self) -> Decoder:
        """The model, or a copy with its weights cast to the dtype it computes in: once here, not in every step."""
        dtype = self.model.compute_dtype
        if dtype is None or dtype == self.model.embed.weight.dtype:
            return self.model
        if self._cast is None or self._cast.embed.weight.dtype != dtype:
            self._cast = copy.deepcopy(self.model).to(dtype).requires_grad_(False).eval()
        for ours, theirs in zip(self._cast.parameters(), self.model.parameters()):
            ours.copy_(theirs)
        return self._cast

    def text(self, sample: Sample) -> str:
        """The completion without its end-of-turn token."""
        return self.tokenizer.decode(sample.tokens[:-1] if sample.finish_reason == "stop" else sample.tokens)

    def groups(self, problems: Sequence[Problem], n: int, temperature: float, seed: int) -> list[Group]:
        """n completions of each problem, all graded together; a component that nobody graded is not in `rewards`."""
        made = [Group(problem, samples, [self.text(s) for s in samples], [])
                for problem, samples in zip(problems, self.sample(problems, n, temperature, seed))]
        scores = self.rewards.score(batch_of(made), self.state)
        for i, group in enumerate(made):
            group.rewards = [{name: value for name, values in scores.components.items()
                              if (value := float(values[i * n + j])) == value} for j in range(n)]
        return made

    def for_evaluation(self, seed: int) -> Callable[[list[Problem], int, float], list[list[Completion]]]:
        """The `generate` that `tasks.evaluate` asks for."""

        def generate(problems: list[Problem], draws: int, temperature: float) -> list[list[Completion]]:
            return [[Completion(self.text(s), len(s.tokens), s.finish_reason == "stop") for s in group]
                    for group in self.sample(problems, draws, temperature, seed)]

        return generate


def trained_lengths(groups: Sequence[Group]) -> Tensor:
    """(N, G) int64: tokens of each completion that the model wrote."""
    return torch.tensor([[s.trained for s in g.samples] for g in groups])


def truncated(groups: Sequence[Group]) -> Tensor:
    """(N, G) bool: completions that were cut at the limit of their length."""
    return torch.tensor([[s.finish_reason == "length" for s in g.samples] for g in groups])


def components(groups: Sequence[Group]) -> dict[str, Tensor]:
    """name -> (N, G) float64; NaN where a task has no such component."""
    names = sorted({name for g in groups for r in g.rewards for name in r})
    return {name: torch.tensor([[r.get(name, float("nan")) for r in g.rewards] for g in groups], dtype=torch.float64)
            for name in names}
