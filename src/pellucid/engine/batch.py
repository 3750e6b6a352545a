"""Batched generation with a contiguous cache: one prefill, then one token for every sequence in each step.

What makes it fast: equal prompts are prefilled once and their cache rows repeated; prompts are padded on the left so
that a step writes one column; sequences that are done leave the batch, so that nothing is computed for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pellucid.engine.decode import Step, choose_step
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
    mask: list[bool] | None = None  # which of `tokens` were sampled; others were given in between (a tool's answer). None: all

    @property
    def trained(self) -> int:
        """Sampled tokens: what there is to learn from."""
        return len(self.tokens) if self.mask is None else sum(self.mask)


Stop = Callable[[Sample], bool]


class Batch:
    """Runs sequences together until all are finished. Each step of `run()` gives every active sequence one token.

    eos: ids that end a sequence (the id itself is kept as the last token).  stop: called after each token for
    sequences that ask for stop texts; True ends the sequence.
    """

    shrink_at = 0.75  # copy the cache together when fewer than this share of its rows is still active

    def __init__(self, model: Decoder, sequences: Sequence[Sample], eos: Sequence[int], stop: Stop | None = None):
        self.model, self.stop = model, stop
        self.eos = set(eos)
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
        while True:
            tokens, logprobs = self.sampler(logits, self.step_number)
            self.step_number += 1
            rows = list(self.active)
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
        self.sampler = Sampler(params, [s.seed for s in self.active], device)
        return self.model.logits(hidden)[rows]

    def _cache_dtype(self) -> torch.dtype:
        return self.model.compute_dtype or self.model.embed.weight.dtype

    def _record(self, rows: list[Sample], tokens: list[int], logprobs: list[float] | None) -> list[Sample]:
        fed = []
        for i, (s, token) in enumerate(zip(rows, tokens)):
            if s.finish_reason is not None:  # done, but not yet copied out of the batch
                continue
            fed.append(s)
            s.tokens.append(token)
            if logprobs is not None:
                s.logprobs.append(logprobs[i])
            if token in self.eos and not s.params.ignore_eos:
                s.finish_reason = "stop"
            elif self.stop and s.params.stop and self.stop(s):
                s.finish_reason = "stop"
            elif len(s.tokens) >= s.params.max_tokens:
                s.finish_reason = "length"
        return fed

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
    progress: Callable[[int], None] | None = None,
) -> None:
    """Finishes all sequences in batches of neighbours in prompt length (little padding). Equal prompts stay together."""
    for s in sequences:
        check_length(len(s.prompt), s.params.max_tokens, model.spec.limit)
    order = sorted(sequences, key=lambda s: (len(s.prompt), s.prompt))
    for start in range(0, len(order), max_batch):
        part = order[start : start + max_batch]
        for _ in Batch(model, part, eos, stop).run():
            pass
        if progress:
            progress(len(part))
