"""Tokenised answers to prompts, packed for training: the raw material of the preference and reward trainers.

Several answers lie in one row, each a document of its own: packing computes what each would alone. The tokens to learn
from are then taken out flat: M tokens end to end, `sequence` (M,) the number of their answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.align.head import by_rows, log_square_rows
from pellucid.align.rows import pack_completions
from pellucid.data.packing import IGNORE
from pellucid.errors import BadInput
from pellucid.nn import Decoder, Routing
from pellucid.ops import token_logprobs


@dataclass(frozen=True)
class Answer:
    """A prompt and what was answered, as ids. mask: which of `tokens` the model wrote (all, by default): a tool's are not."""

    prompt: list[int]
    tokens: list[int]
    mask: list[bool] | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def trained(self) -> int:
        return len(self.tokens) if self.mask is None else sum(self.mask)


class Flat:
    """Answers in packed rows, and their trained tokens flat."""

    def __init__(self, answers: Sequence[Answer], device: torch.device | str = "cpu"):
        self.answers, self.rows = answers, pack_completions(answers).to(device)  # type: ignore[arg-type]
        answered = self.rows.labels != IGNORE
        owner = self.rows.documents[answered]
        first = torch.tensor([len(a.prompt) - 1 for a in answers], device=device)
        starts = torch.tensor([0] + [len(a.tokens) for a in answers], device=device).cumsum(0)[:-1]
        index = starts[owner] + self.rows.positions[answered] - first[owner]  # among all answers' tokens, end to end
        self.trained = answered
        self.index, self.sequence = index, owner

    def hidden(self, model: Decoder, routing: Routing | None = None) -> Tensor:
        """(M, D): the last hidden states that predict the trained tokens. routing: notes what routers decide."""
        hidden = model.hidden(self.rows.tokens, positions=self.rows.positions, documents=self.rows.documents, routing=routing)
        return hidden[self.trained]

    def logprobs(self, model: Decoder, routing: Routing | None = None) -> Tensor:
        """(M,) log-probabilities of the trained tokens, chunk by chunk."""
        hidden = self.hidden(model, routing)
        return token_logprobs(hidden, model.head_weight.to(hidden.dtype), self.rows.labels[self.trained])[0]

    def logprobs_and_squares(self, model: Decoder, routing: Routing | None = None) -> tuple[Tensor, Tensor]:
        """The same, and log sum_v p_v^2 of every distribution, without gradient."""
        hidden = self.hidden(model, routing)
        head = model.head_weight.to(hidden.dtype)
        logp = token_logprobs(hidden, head, self.rows.labels[self.trained])[0]
        with torch.no_grad():
            return logp, by_rows(log_square_rows, hidden.detach(), head.detach())

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """Numbers of every answer's tokens, one tensor an answer -> (M,)."""
        return torch.cat(list(values)).to(self.rows.tokens.device)[self.index]

    def collect(self, values: Tensor) -> list[Tensor]:
        """The inverse of `spread`: (M,) -> one tensor an answer, 0 where a token is not trained."""
        sizes = [len(a.tokens) for a in self.answers]
        flat = torch.zeros(sum(sizes), dtype=values.dtype, device=values.device)
        flat[self.index] = values
        return list(flat.cpu().split(sizes))


@torch.no_grad()
def logprobs_of(model: Decoder, answers: Sequence[Answer], tokens: int = 16_384) -> list[Tensor]:
    """Log-probabilities of every answer's tokens, in batches of about so many tokens, similar lengths together."""
    device = model.embed.weight.device
    order = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    found: list[Tensor] = [torch.zeros(0)] * len(answers)
    batch: list[int] = []
    for at, i in enumerate(order):
        batch.append(i)
        if at + 1 == len(order) or len(answers[order[at + 1]]) * (len(batch) + 1) > tokens:
            flat = Flat([answers[j] for j in batch], device)
            for j, values in zip(batch, flat.collect(flat.logprobs(model))):
                found[j] = values
            batch = []
    return found


class Shuffled:
    """An endless, resumable stream of item numbers: a new order each epoch, decided by (seed, epoch) alone."""

    def __init__(self, items: int, size: int, seed: int):
        if items < 1:
            raise BadInput("there is nothing to train on", next="give more data")
        self.items, self.size, self.seed, self.taken = items, size, seed, 0

    def next(self) -> list[int]:
        found: list[int] = []
        while len(found) < self.size:
            epoch, at = divmod(self.taken, self.items)
            part = np.random.default_rng([self.seed % 2**64, epoch]).permutation(self.items)[at : at + self.size - len(found)]
            found += part.tolist()
            self.taken += len(part)
        return found

    def state(self) -> dict[str, int]:
        return {"taken": self.taken, "items": self.items, "seed": self.seed}

    def load_state(self, state: dict[str, Any]) -> None:
        for name in ("items", "seed"):
            if state[name] != getattr(self, name):
                raise BadInput(f"cannot resume: {name} was {state[name]}, is {getattr(self, name)}",
                               next="resume with the same data and seed, or start a new run")
        self.taken = int(state["taken"])


__all__ = ["Answer", "Flat", "Shuffled", "logprobs_of"]
