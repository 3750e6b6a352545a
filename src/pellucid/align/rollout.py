"""Rollouts: problems in, groups of sampled and graded completions out.

Token in, token out: the ids that were sampled are the ids that are trained on; text is for graders and people only.
The completions of a group share their prompt: it is prefilled once and its cache rows are repeated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.engine import Sample, SamplingParams, run_all
from pellucid.nn import Decoder
from pellucid.tasks import Completion, Problem, Task, finished_only
from pellucid.tokenizers import Tokenizer


@dataclass
class Group:
    """One problem with its G completions and their reward components."""

    problem: Problem
    samples: list[Sample]
    texts: list[str]
    rewards: list[dict[str, float]]


class Rollouts:
    """Samples and grades with the weights that the model has at the time of the call."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, task: Task, *, max_tokens: int, max_batch: int = 512):
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.max_tokens, self.max_batch = max_tokens, max_batch
        self._cast: Decoder | None = None

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
        made = []
        for problem, samples in zip(problems, self.sample(problems, n, temperature, seed)):
            texts = [self.text(s) for s in samples]
            rewards = [self.grade(problem, s, t) for s, t in zip(samples, texts)]
            made.append(Group(problem, samples, texts, rewards))
        return made

    def grade(self, problem: Problem, sample: Sample, text: str) -> dict[str, float]:
        """The task's components; a completion that was cut off has neither the form nor the answer."""
        return finished_only(self.task.grade(problem, text), sample.finish_reason == "stop")

    def for_evaluation(self, seed: int) -> Callable[[list[Problem], int, float], list[list[Completion]]]:
        """The `generate` that `tasks.evaluate` asks for."""

        def generate(problems: list[Problem], draws: int, temperature: float) -> list[list[Completion]]:
            return [[Completion(self.text(s), len(s.tokens), s.finish_reason == "stop") for s in group]
                    for group in self.sample(problems, draws, temperature, seed)]

        return generate


def components(groups: Sequence[Group]) -> dict[str, Tensor]:
    """name -> (N, G) float64; NaN where a task has no such component."""
    names = sorted({name for g in groups for r in g.rewards for name in r})
    return {name: torch.tensor([[r.get(name, float("nan")) for r in g.rewards] for g in groups], dtype=torch.float64)
            for name in names}
