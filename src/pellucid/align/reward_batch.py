"""Completions to be graded: their texts, ids and columns, from a table or from sampled groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pellucid.align.prompts import content_of

if TYPE_CHECKING:
    from pellucid.align.rollout import Group

Content = str | list[dict[str, Any]]
RESERVED = ("prompts", "completions", "completion_ids", "prompt_ids", "trainer_state", "log_metric", "log_extra")


@dataclass
class Batch:
    """The completions to be graded, S of them, and what belongs to each; completions of a group stand together."""

    prompts: list[Content]
    completions: list[Content]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    completion_ids: list[list[int]] | None = None
    prompt_ids: list[list[int]] | None = None

    def __post_init__(self) -> None:
        lists = {"completions": self.completions, "completion_ids": self.completion_ids, "prompt_ids": self.prompt_ids, **self.columns}
        for name, values in lists.items():
            if values is not None and len(values) != len(self.prompts):
                raise ValueError(f"{len(self.prompts)} prompts but {len(values)} {name}")

    def __len__(self) -> int:
        return len(self.prompts)

    def arguments(self, at: Sequence[int]) -> dict[str, list[Any]]:
        """The lists that a reward function gets, for the completions at these places."""
        every: dict[str, list[Any] | None] = {
            **{name: values for name, values in self.columns.items() if name not in RESERVED}, "prompts": self.prompts,
            "completions": self.completions, "completion_ids": self.completion_ids, "prompt_ids": self.prompt_ids}
        return {name: [values[i] for i in at] for name, values in every.items() if values is not None}


def text_of(content: Content) -> str:
    """A completion's text: itself, or what the assistant said last."""
    if isinstance(content, str):
        return content
    spoken = [m.get("content") for m in content if m.get("role", "assistant") == "assistant"] or [m.get("content") for m in content]
    return spoken[-1] if spoken and isinstance(spoken[-1], str) else ""


def batch_of(groups: Sequence[Group]) -> Batch:
    """The completions of sampled groups. Columns: `problem`, `answer`, `finished` (False: cut off), `turns` (of dialogues),
    and those that the data have, which win."""
    every = [(group, i) for group in groups for i in range(len(group.samples))]
    rows = [dict(getattr(group.problem, "columns", {})) for group, _ in every]
    shared = set.intersection(*map(set, rows)) if rows else set()
    columns: dict[str, list[Any]] = {"problem": [group.problem for group, _ in every], "answer": [group.problem.answer for group, _ in every],
                                     "finished": [group.samples[i].finish_reason == "stop" for group, i in every],
                                     "turns": [group.turns(i) for group, i in every]}
    columns |= {name: [row[name] for row in rows] for name in sorted(shared)}
    return Batch([content_of(group.problem) for group, _ in every], [_completion(group, i) for group, i in every], columns,
                 [group.samples[i].tokens for group, i in every], [group.samples[i].prompt for group, i in every])


def _completion(group: Group, i: int) -> Content:
    """A text behind a text, messages behind messages: all of a dialogue's."""
    if isinstance(content_of(group.problem), str):
        return group.texts[i]
    return group.episodes[i] if group.episodes else [{"role": "assistant", "content": group.texts[i]}]
