"""A trained reward model as a reward: its score of prompt and completion, for any model that `align rm` or others trained.

    --reward-model runs/rm/model                 named reward_model, weight 1
    --reward-model helpful=runs/rm/model*0.5     named, weighted

Where its tokenizer is the policy's own, it reads the very ids that were sampled; else it reads the conversation through its
own template. The score is that of the completion's last token, as in training (`reward_model.py`).

A process model (`align prm`) is recognised by its folder. It reads the steps of the thought, where there is one, and their
probabilities become one number (`selection.process_reward`); by default their minimum:

    --reward-model runs/prm/model
    --reward-model "runs/prm/model?combine=product"     or last, mean
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pellucid import events
from pellucid.align.answers import Answer
from pellucid.align.examples import encode_answer, encode_prompt, laid_out
from pellucid.align.reward_model import RewardModel, StepFormat, load_reward_model, step_format
from pellucid.align.rewards import text_of
from pellucid.data.formats import Content
from pellucid.errors import BadInput
from pellucid.messages import add, say, three_parts
from pellucid.tokenizers import Tokenizer

add({
    "judge.longer": ("{left} of {count} completions exceed the reward model's context of {limit} tokens, and are not graded",
                     "{count} 个回答中有 {left} 个超出奖励模型 {limit} 词元的上下文，未评分"),
    "prm.other": ("{folder} does not judge steps", "{folder} 不评判步骤"),
    "prm.other.why": ("its config.json has no process_reward: it scores whole answers", "其 config.json 中没有 process_reward：它给整个回答打分"),
    "prm.other.next": ("train one: pellucid align prm MODEL --data stepwise.jsonl", "请训练一个：pellucid align prm 模型 --data stepwise.jsonl"),
})


class _Reader:
    """A reward model with its tokenizer; answers of similar lengths are read together, about `tokens` at once."""

    def __init__(self, model: RewardModel, tokenizer: Tokenizer, tokens: int = 16_384):
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        self._told = False

    def batches(self, answers: Sequence[Answer]) -> Iterator[list[int]]:
        """The places of the answers that fit into the model's context; of the others a note says once that there are some."""
        fits = [len(a) <= self.model.spec.limit for a in answers]
        if not all(fits) and not self._told:
            self._told = True
            events.note(say("judge.longer", left=fits.count(False), count=len(fits), limit=self.model.spec.limit), "warning")
        batch: list[int] = []
        for i in sorted((i for i, fit in enumerate(fits) if fit), key=lambda i: len(answers[i])):
            if batch and len(answers[i]) * (len(batch) + 1) > self.tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


class Judge(_Reader):
    """A reward function. tokenizer: the reward model's; policy: that of the ids that it is given."""

    def __init__(self, model: RewardModel, tokenizer: Tokenizer, policy: Tokenizer, tokens: int = 16_384):
        super().__init__(model, tokenizer, tokens)
        self.same = same_ids(tokenizer, policy)

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
        found: list[float | None] = [None] * len(answers)
        for batch in self.batches(answers):
            with torch.no_grad():
                for i, score in zip(batch, self.model.scores([answers[i] for i in batch]).tolist()):
                    found[i] = score
        return found


class StepJudge(_Reader):
    """A process model: how likely each step of a solution is right. What `selection.process_reward` asks."""

    reads_messages = True

    def __init__(self, model: RewardModel, tokenizer: Tokenizer, form: StepFormat, tokens: int = 16_384):
        super().__init__(model, tokenizer, tokens)
        self.form = form

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> StepJudge:
        """Errors: BadInput for a model of whole answers, and all of `load_reward_model`."""
        form = step_format(folder)
        if form is None:
            raise BadInput(*three_parts("prm.other", folder=folder))
        return cls(load_reward_model(folder, device=device), Tokenizer.load(str(folder)), form)

    def score_steps(self, prompts: Sequence[Content], steps: Sequence[Sequence[str]]) -> list[list[float]]:
        """steps[i]: of the i-th solution -> their probabilities; none for a solution longer than the model's context."""
        laid = [laid_out(self.tokenizer, some, self.form.separator) for some in steps]
        answers = [Answer(encode_prompt(self.tokenizer, self._asked(p)), tokens) for p, (tokens, _) in zip(prompts, laid)]
        whole = [i for i, (tokens, _) in enumerate(laid) if tokens]
        found: list[list[float]] = [[] for _ in laid]
        for batch in self.batches([answers[i] for i in whole]):
            places = [whole[j] for j in batch]
            with torch.no_grad():
                scores, _ = self.model.scores_at([answers[i] for i in places], [laid[i][1] for i in places])
            for i, own in zip(places, scores.sigmoid().split([len(laid[i][1]) for i in places])):
                found[i] = own.tolist()
        return found

    def _asked(self, prompt: Content) -> Content:
        """As in training: messages for the template, or the text that was asked last."""
        if self.form.conversational:
            return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return prompt if isinstance(prompt, str) else text_of([m for m in prompt if m.get("role") == "user"])


def judge_of(folder: str, policy: Tokenizer, device: str = "cpu") -> Judge | StepJudge:
    """The kind of reward model that the folder holds."""
    return Judge.load(folder, policy, device) if step_format(folder) is None else StepJudge.load(folder, device)


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether both give the same ids for the same conversation: equal vocabularies, merges and templates."""
    def parts(tokenizer: Tokenizer) -> Any:
        source = tokenizer.source
        return source.data["model"], source.data.get("pre_tokenizer"), source.data.get("normalizer"), source.templates, sorted(
            tokenizer.special.items())

    return one is other or parts(one) == parts(other)
