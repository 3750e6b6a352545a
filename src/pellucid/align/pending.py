"""Rollouts that wait to be learned from, as plain JSON values and back: part of a run's state.

Problems are not written: a task's own answers have any form. They are drawn again from where the rollout began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pellucid.align.rollout import Group
from pellucid.engine import Sample, SamplingParams
from pellucid.errors import BadInput
from pellucid.tasks import Problem


@dataclass
class Pending:
    """A rollout.

    source: the state of what its problems were drawn from, before they were. metrics: what rewards logged. step: of the run, whose
    weights sampled it. seconds: of sampling and grading.
    """

    source: dict[str, Any]
    groups: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Sampled ones."""
        return sum(s.trained for g in self.groups for s in g.samples)

    def state(self) -> dict[str, Any]:
        return {"source": self.source, "groups": groups_state(self.groups), "metrics": self.metrics, "step": self.step, "seconds": self.seconds}

    @classmethod
    def of(cls, saved: dict[str, Any], problems: Sequence[Problem], max_tokens: int) -> Pending:
        """The inverse of `state`, with the problems, which are drawn again."""
        return cls(saved["source"], groups_from(saved["groups"], problems, max_tokens), saved.get("metrics", {}), saved.get("step", 0),
                   saved.get("seconds", 0.0))


def groups_state(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [{"asked": g.problem.prompt, "prompt": g.samples[0].prompt, "texts": g.texts, "rewards": g.rewards, "episodes": g.episodes, "extra": g.extra,
             "samples": [{"seed": s.seed, "tokens": s.tokens, "logprobs": s.logprobs, "finish_reason": s.finish_reason, "mask": s.mask,
                          "support": None if s.support is None else [ids.tolist() for ids in s.support]} for s in g.samples]}
            for g in groups]


def groups_from(saved: Sequence[dict[str, Any]], problems: Sequence[Problem], max_tokens: int) -> list[Group]:
    """Errors: BadInput where the task gives other problems than those that were answered."""
    if len(problems) != len(saved) or any(p.prompt != g["asked"] for p, g in zip(problems, saved)):
        raise BadInput("the samples that wait to be learned from answer other problems", "the task has changed",
                       "resume with the task of the interrupted run, or start again without --resume")
    return [Group(problem, [_sample(g["prompt"], s, max_tokens) for s in g["samples"]], g["texts"], g["rewards"], g["episodes"], g.get("extra", []))
            for problem, g in zip(problems, saved)]


def _sample(prompt: list[int], saved: dict[str, Any], max_tokens: int) -> Sample:
    support = None if saved["support"] is None else [torch.tensor(ids, dtype=torch.int64) for ids in saved["support"]]
    return Sample(prompt, SamplingParams(max_tokens=max_tokens), **(saved | {"support": support}))
