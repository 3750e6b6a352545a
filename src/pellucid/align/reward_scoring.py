"""A trained reward model as a reward: its score of prompt and completion, for any model that `align rm` or others trained.

    --reward-model runs/rm/model                 named reward_model, weight 1
    --reward-model helpful=runs/rm/model*0.5     named, weighted

Where its tokenizer is the policy's own, it reads the very ids that were sampled; else it reads the conversation through its
own template. The score is that of the completion's last token, as in training (`reward_model.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pellucid import events
from pellucid.align.answers import Answer
from pellucid.align.examples import encode_answer
from pellucid.align.reward_model import RewardModel, load_reward_model
from pellucid.data.formats import Content
from pellucid.tokenizers import Tokenizer


class Judge:
    """A reward function. tokenizer: the reward model's; policy: that of the ids that it is given."""

    def __init__(self, model: RewardModel, tokenizer: Tokenizer, policy: Tokenizer, tokens: int = 16_384):
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        self.same = same_ids(tokenizer, policy)
        self._told = False

    @classmethod
    def load(cls, folder: str | Path, policy: Tokenizer, device: str = "cpu") -> Judge:
        """Errors: BadInput for a model without a score."""
        return cls(load_reward_model(folder, device=device), Tokenizer.load(str(folder)), policy)

    def __call__(self, prompts: list[Content], completions: list[Content], prompt_ids: list[list[int]],
                 completion_ids: list[list[int]]) -> list[float | None]:
        """None for what is longer than the model's context."""
        if self.same:
            answers = [Answer(p, c) for p, c in zip(prompt_ids, completion_ids)]
        else:
            answers = [encode_answer(self.tokenizer, p, c) for p, c in zip(prompts, completions)]
        fits = [len(a) <= self.model.spec.limit for a in answers]
        if not all(fits) and not self._told:
            self._told = True
            events.note(f"{fits.count(False)} of {len(fits)} completions exceed the reward model's context of {self.model.spec.limit} "
                        "tokens, and are not graded", "warning")
        found: list[float | None] = [None] * len(answers)
        for batch in self._batches([i for i, fit in enumerate(fits) if fit], answers):
            with torch.no_grad():
                for i, score in zip(batch, self.model.scores([answers[i] for i in batch]).tolist()):
                    found[i] = score
        return found

    def _batches(self, which: list[int], answers: list[Answer]) -> list[list[int]]:
        """Similar lengths together, about so many tokens each."""
        batches: list[list[int]] = [[]]
        for i in sorted(which, key=lambda i: len(answers[i])):
            if batches[-1] and len(answers[i]) * (len(batches[-1]) + 1) > self.tokens:
                batches.append([])
            batches[-1].append(i)
        return [batch for batch in batches if batch]


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether both give the same ids for the same conversation: equal vocabularies, merges and templates."""
    def parts(tokenizer: Tokenizer) -> Any:
        source = tokenizer.source
        return source.data["model"], source.data.get("pre_tokenizer"), source.data.get("normalizer"), source.templates, sorted(
            tokenizer.special.items())

    return one is other or parts(one) == parts(other)
