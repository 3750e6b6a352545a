"""Batched generation with a contiguous cache: one prefill, then one token for every sequence in each step.

What makes it fast: equal prompts are prefilled once and their cache rows repeated; prompts are padded on the left so
that a step writes one column; sequences that are done leave the batch, so that nothing is computed for them.

A dialogue stays in its place: what a tool or a user answers is read token by token in the steps in which the others go on
writing, so its turns before are never computed again, and never tokenised again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pellucid.engine.decode import Step
from pellucid.engine.native_batch import BatchStep, choose_step
from pellucid.engine.params import SamplingParams
from pellucid.engine.sampler import Sampler
from pellucid.errors import BadInput
from pellucid.nn import Decoder, KVCache


@dataclass
class Sample:
    """One sample on its way: what was asked, what has come."""

    prompt: list[int]
    params: SamplingParams
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" (an end token or stop text) | "length" | "cancelled"
    support: list[torch.Tensor] | None = None  # of each token, the ids that could have been drawn; if they are recorded
    mask: list[bool] | None = None  # which of `tokens` were sampled; others were given in between (a tool's answer). None: all

    @property
    def trained(self) -> int:
        """Sampled tokens: what there is to learn from."""
        return len(self.tokens) if self.mask is None else sum(self.mask)


Stop = Callable[[Sample], bool]
Reply = Callable[[Sample], "list[int] | None"]


class Batch:
    """Runs sequences together until all are finished. Each step of `run()` gives every active sequence one token.

    eos: ids that end a sequence (the id itself is kept as the last token).  stop: called after each token for
    sequences that ask for stop texts; True ends the sequence.  reply: called when a sequence has ended with an end token;
    the ids that it reads before it goes on (they count towards its max_tokens), or None: it is done.  support: record what
    could be drawn in place of each token; the log-probabilities are then those among these.
    """

    shrink_at = 0.75  # copy the cache together when fewer than this share of its rows is still active

    def __init__(self, model: Decoder, sequences: Sequence[Sample], eos: Sequence[int], stop: Stop | None = None,
                 reply: Reply | None = None, support: bool = False):
        self.model, self.stop, self.reply, self.support = model, stop, reply, support
        self.eos = set(eos)
        self.unread: dict[int, list[int]] = {}  # id of a sample -> ids that it is given next, the first one last
        self.active = list(sequences)
        for s in self.active:
            check_length(len(s.prompt), s.params.max_tokens, model.spec.limit)
        self.step_number = 0

    @torch.inference_mode()
    def run(self) -> Iterator[list[Sample]]:
        """Yields, after every step, the sequences that received a token in it."""
        if not self.active:
            return
        step: Step = choose_step(self.model).value
        logits = self._prefill()
        self.sampler.alone = isinstance(step, BatchStep)
        while True:
            tokens, logprobs = self.sampler(logits, self.step_number)
            self.step_number += 1
            rows = list(self.active)
            self._note_support(rows)
            self._give(rows, tokens)
            yield self._record(rows, tokens.tolist(), None if logprobs is None else logprobs.tolist())
            going = [i for i, s in enumerate(rows) if s.finish_reason is None]
            if not going:
                return
            tokens = self._shrink(tokens, going)
            logits = step(tokens, self.cache)

    def _prefill(self) -> torch.Tensor:
        device = self.model.embed.weight.device
        unique: dict[tuple[int, ...], int] = {}
        row_of = [unique.setdefault(tuple(s.prompt), len(unique)) for s in self.active]
        longest = max(map(len, unique))
        padded = torch.zeros(len(unique), longest, dtype=torch.int64)
        for row, prompt in enumerate(unique):
            padded[row, longest - len(prompt) :] = torch.tensor(prompt)
        first = torch.tensor([longest - len(p) for p in unique], device=device)
        capacity = longest + max(s.params.max_tokens for s in self.active)
        self.cache = KVCache(self.model.spec, len(unique), capacity, dtype=self._cache_dtype(), device=device,
                             first=first if bool((first > 0).any()) else None)
        hidden = self.model.hidden(padded.to(device), cache=self.cache)[:, -1]
        rows = torch.tensor(row_of, device=device)
        if len(unique) != len(row_of):
            self.cache.keep(rows)
        params = [s.params for s in self.active]
        self.sampler = Sampler(params, [s.seed for s in self.active], device, support=self.support)
        return self.model.logits(hidden)[rows]

    def _cache_dtype(self) -> torch.dtype:
        return self.model.compute_dtype or self.model.embed.weight.dtype

    def _note_support(self, rows: list[Sample]) -> None:
        for s, kept in zip(rows, self.sampler.kept) if self.support else ():
            if s.finish_reason is None:
                s.support = [*(s.support or ()), kept]

    def _give(self, rows: list[Sample], tokens: torch.Tensor) -> None:
        """Whoever has something to read reads it in place of what was drawn."""
        for i, s in enumerate(rows) if self.unread else ():
            if self.unread.get(id(s)):
                tokens[i] = self.unread[id(s)][-1]

    def _record(self, rows: list[Sample], tokens: list[int], logprobs: list[float] | None) -> list[Sample]:
        fed = []
        for i, (s, token) in enumerate(zip(rows, tokens)):
            if s.finish_reason is not None:  # done, but not yet copied out of the batch
                continue
            fed.append(s)
            s.tokens.append(token)
            given = self.unread.get(id(s))
            if s.mask is not None:
                s.mask.append(not given)
            if logprobs is not None:
                s.logprobs.append(0.0 if given else logprobs[i])
            if given:
                given.pop()
            elif token in self.eos and not s.params.ignore_eos:
                s.finish_reason = self._answered(s)
            elif self.stop and s.params.stop and self.stop(s):
                s.finish_reason = "stop"
            elif len(s.tokens) >= s.params.max_tokens:
                s.finish_reason = "length"
        return fed

    def _answered(self, s: Sample) -> str | None:
        """A turn has ended: whether the sequence has, and why. None: it reads the reply and goes on."""
        ids = self.reply(s) if self.reply is not None else None
        if ids is None:
            return "stop"
        if len(s.tokens) + len(ids) >= s.params.max_tokens:  # no room to read it and write at least one token
            return "length"
        if s.mask is None:
            s.mask = [True] * len(s.tokens)
        self.unread[id(s)] = ids[::-1]
        return None

    def _shrink(self, tokens: torch.Tensor, going: list[int]) -> torch.Tensor:
        if len(going) > self.shrink_at * len(self.active):
            return tokens
        rows = torch.tensor(going, device=tokens.device)
        self.cache.keep(rows)
        self.sampler.keep(rows)
        self.active = [self.active[i] for i in going]
        return tokens[rows]


def check_length(prompt: int, max_tokens: int, context: int) -> None:
    """Refuse what cannot fit before any work is done."""
    if prompt == 0:
        raise BadInput("the prompt is empty", "there is nothing to continue", "give at least one token of text")
    if prompt >= context:
        raise BadInput(f"the prompt has {prompt} tokens, the model's context is {context}",
                       next=f"shorten it to fewer than {context} tokens")
    if prompt + max_tokens > context:
        raise BadInput(
            f"{prompt} prompt tokens and max_tokens = {max_tokens} exceed the context of {context}",
            next=f"use max_tokens <= {context - prompt}")


def run_all(
    model: Decoder, sequences: Sequence[Sample], eos: Sequence[int], stop: Stop | None = None, max_batch: int = 512,
    progress: Callable[[int], None] | None = None, reply: Reply | None = None, support: bool = False,
    each: Callable[[], None] | None = None,
) -> None:
    """Finishes all sequences in batches of neighbours in prompt length (little padding). Equal prompts stay together.

    each: called after every step; what it raises ends the work.
    """
    for s in sequences:
        check_length(len(s.prompt), s.params.max_tokens, model.spec.limit)
    order = sorted(sequences, key=lambda s: (len(s.prompt), s.prompt))
    for start in range(0, len(order), max_batch):
        part = order[start : start + max_batch]
        for _ in Batch(model, part, eos, stop, reply, support).run():
            if each:
                each()
        if progress:
            progress(len(part))
