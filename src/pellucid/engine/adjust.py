"""What changes a request's logits before its token is drawn: bias, penalties, ends that come too early, the form of the answer.

The order is transformers' and vLLM's: bias, repetition, frequency and presence, then what is forbidden. All requests that
ask for something are worked on together, in place; what the penalties need to know is kept in tables of a row a request
(how often its output holds each token, whether its prompt does), which a step changes at the tokens it drew.
Legend: N places (a request has one behind its tokens, and one behind each draft), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pellucid.engine.request import Request
from pellucid.engine.structured import forbid

Place = tuple[Request, int]
"""A request, and how many of its drafts come before."""


class Adjuster:
    """eos: tokens that end an answer."""

    def __init__(self, vocab: int, eos: Iterable[int], device: torch.device | str = "cpu"):
        self.vocab, self.eos, self.device = vocab, set(eos), torch.device(device)
        self.row_of: dict[Request, int] = {}
        self.free: list[int] = []
        self.counts = torch.zeros(0, vocab, dtype=torch.int32, device=device)  # of the output's tokens
        self.prompts = torch.zeros(0, vocab, dtype=torch.bool, device=device)  # whether a token stands in the prompt

    @staticmethod
    def changes(r: Request) -> bool:
        """Whether this request's logits need a change at all."""
        p = r.params
        return p.penalised or bool(p.logit_bias) or r.constraint is not None or r.generated < p.min_tokens

    def __call__(self, logits: Tensor, places: Sequence[Place]) -> None:
        """logits (N, V) float32 of the requests' places, changed in place."""
        self._bias(logits, places)
        self._penalise(logits, places)
        self._forbid_ends(logits, places)
        self._constrain(logits, places)

    def _bias(self, logits: Tensor, places: Sequence[Place]) -> None:
        rows: list[int] = []
        tokens: list[int] = []
        values: list[float] = []
        for i, (r, _) in enumerate(places):
            if r.params.logit_bias:
                rows += [i] * len(r.params.logit_bias)
                tokens += r.params.logit_bias.keys()
                values += r.params.logit_bias.values()
        if rows:
            logits.index_put_(self._index(rows, tokens), torch.tensor(values, dtype=logits.dtype, device=self.device), accumulate=True)

    def _penalise(self, logits: Tensor, places: Sequence[Place]) -> None:
        some = [i for i, (r, _) in enumerate(places) if r.params.penalised]
        if not some:
            return
        chosen = [places[i] for i in some]
        table = self._index([self._row(r) for r, _ in chosen])[0]
        counts, prompts = self.counts[table], self.prompts[table]
        before = [(k, t) for k, (r, j) in enumerate(chosen) for t in r.tokens[len(r.tokens) - r.drafts :][:j]]
        if before:
            counts.index_put_(self._index(*zip(*before, strict=True)), torch.ones(len(before), dtype=counts.dtype, device=self.device), accumulate=True)
        rows = self._index(some)[0]
        x, held = logits[rows], counts > 0
        repetition = self._column(chosen, lambda r: r.params.repetition_penalty)
        x = torch.where(prompts | held, torch.where(x > 0, x / repetition, x * repetition), x)
        x -= self._column(chosen, lambda r: r.params.frequency_penalty) * counts
        x -= self._column(chosen, lambda r: r.params.presence_penalty) * held
        logits[rows] = x

    def _forbid_ends(self, logits: Tensor, places: Sequence[Place]) -> None:
        early = [(i, t) for i, (r, j) in enumerate(places) if r.generated + j < r.params.min_tokens
                 for t in (*self.eos, *r.params.stop_token_ids)]
        if early:
            logits[self._index(*zip(*early, strict=True))] = -torch.inf

    def _constrain(self, logits: Tensor, places: Sequence[Place]) -> None:
        """The places of a request stand together, in order."""
        some = [i for i, (r, _) in enumerate(places) if r.constraint is not None]
        if not some:
            return
        masks = torch.full((len(some), -(-self.vocab // 32)), -1, dtype=torch.int32)
        for k, i in enumerate(some):
            r, j = places[i]
            if j == 0:
                assert r.constraint is not None
                r.constraint.fill(masks[k : k + 1 + r.drafts], r.tokens[len(r.tokens) - r.drafts :])
        rows = self._index(some)[0]
        logits[rows] = forbid(logits[rows], masks)

    def record(self, given: Iterable[tuple[Request, list[int]]]) -> None:
        """These tokens stand now."""
        pairs = [(self.row_of[r], t) for r, tokens in given if r in self.row_of for t in tokens]
        if pairs:
            ones = torch.ones(len(pairs), dtype=self.counts.dtype, device=self.device)
            self.counts.index_put_(self._index(*zip(*pairs, strict=True)), ones, accumulate=True)

    def forget(self, r: Request) -> None:
        if r in self.row_of:
            self.free.append(self.row_of.pop(r))

    def _row(self, r: Request) -> int:
        """Its row of the tables, written when it is first needed."""
        if r not in self.row_of:
            if not self.free:
                self.free = list(range(len(self.counts), 2 * len(self.counts) + 4))[::-1]
                more = torch.zeros(len(self.free), self.vocab, device=self.device)
                self.counts, self.prompts = torch.cat((self.counts, more.int())), torch.cat((self.prompts, more.bool()))
            row = self.row_of[r] = self.free.pop()
            self.prompts[row] = False
            self.prompts[row, self._index(r.prompt)[0]] = True
            self.counts[row] = torch.bincount(self._index(r.output)[0], minlength=self.vocab)
        return self.row_of[r]

    def _index(self, *lists: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(one, dtype=torch.int64, device=self.device) for one in lists)

    def _column(self, places: Sequence[Place], of: Callable[[Request], float]) -> Tensor:
        """(len(places), 1)"""
        return torch.tensor([of(r) for r, _ in places], device=self.device)[:, None]
