"""Writing with an encoder-decoder: greedily, by sampling, or by beam search, with a cache.

A source's keys and values are made once. Sources of like length go together; one that is done leaves the batch.
Legend: B sources, n beams (or samples) of each, V target vocabulary, t tokens written so far.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pellucid.engine.params import SamplingParams
from pellucid.engine.sampler import Sampler
from pellucid.errors import BadInput
from pellucid.nn import EncoderDecoder, KVCache


@dataclass
class Translation:
    """tokens: without the start token; the end token is the last where one came.  score: the sum of the tokens' log-probabilities,
    divided by their number to the power of `length_penalty` where beams were searched."""

    tokens: list[int]
    score: float
    finish_reason: str  # "stop" (the end token) | "length"


def translate(
    model: EncoderDecoder, sources: Sequence[Sequence[int]], params: SamplingParams | None = None, *, beams: int = 1,
    length_penalty: float = 1.0, early_stopping: bool = False, suppress: Sequence[int] | None = None, max_batch: int = 64,
) -> list[list[Translation]]:
    """For every source its `params.n` targets (default 1), with beams the best ones first.

    beams: how many prefixes are followed at a time; then nothing is sampled.   early_stopping: a search ends with its n-th
    finished target, instead of when no open one can win any more.   suppress: tokens never to write; default: those that the
    checkpoint forbids (Marian: padding).
    """
    params = params or SamplingParams()
    check(model, sources, params, beams)
    if suppress is None:
        suppress = [ids[0] for ids in dict(model.spec.extra).get("bad_words_ids") or [] if len(ids) == 1]
    results: list[list[Translation]] = [[] for _ in sources]
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    size = max(1, max_batch // max(beams, params.n))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), size):
            part = order[start : start + size]
            run = Run(model, [sources[i] for i in part], max(beams, params.n), params.max_tokens, suppress)
            found = search(run, beams, length_penalty, early_stopping) if beams > 1 else sample(run, params)
            for i, targets in zip(part, found, strict=True):
                results[i] = targets[: params.n]
    finally:
        model.train(was_training)
    return results


def check(model: EncoderDecoder, sources: Sequence[Sequence[int]], params: SamplingParams, beams: int) -> None:
    context = model.spec.context
    if beams < 1 or (beams > 1 and (params.temperature > 0 or params.n > beams)):
        raise BadInput(f"{beams} beams with temperature {params.temperature} and n = {params.n}",
                       "a beam search samples nothing, and finds as many targets as it has beams",
                       "use temperature 0 and n <= beams, or one beam")
    for source in sources:
        if not 0 < len(source) <= context:
            raise BadInput(f"a source has {len(source)} tokens", f"the model reads from 1 to {context}")
    if params.max_tokens >= context:
        raise BadInput(f"max_tokens = {params.max_tokens} and the start token exceed the context of {context}",
                       next=f"use max_tokens < {context}")


class Run:
    """A batch of sources on its way: `rows` targets of each, and what the cache holds of them."""

    def __init__(self, model: EncoderDecoder, sources: Sequence[Sequence[int]], rows: int, max_tokens: int, suppress: Sequence[int]):
        self.model, self.rows, self.max_tokens = model, rows, max_tokens
        self.device = model.embed.weight.device
        longest = max(map(len, sources))
        padded, mask = (torch.zeros(len(sources), longest, dtype=torch.int64) for _ in range(2))
        for row, source in enumerate(sources):
            padded[row, : len(source)], mask[row, : len(source)] = torch.tensor(source), 1
        self.padded, self.mask = padded.to(self.device), mask.to(self.device)
        self.suppress = torch.tensor(list(suppress), dtype=torch.int64, device=self.device)

    def first(self) -> Tensor:
        """Reads the sources; logits (B rows, V) behind the start token, float32."""
        B = len(self.padded)
        memory = self.model.encode(self.padded, self.mask)
        self.cache = KVCache(self.model.spec, B, 1 + self.max_tokens, dtype=memory.dtype, device=self.device)
        start = torch.full((B, 1), self.model.spec.start, dtype=torch.int64, device=self.device)
        logits = self._logits(self.model.hidden(start, memory, self.mask, cache=self.cache))
        if self.rows == 1:
            return logits
        self.keep(torch.arange(B, device=self.device).repeat_interleave(self.rows))
        return logits.repeat_interleave(self.rows, 0)

    def step(self, tokens: Tensor) -> Tensor:
        """tokens (rows,) -> logits (rows, V) behind them."""
        return self._logits(self.model.hidden(tokens[:, None], None, self.mask, cache=self.cache))

    def keep(self, rows: Tensor, same_sources: bool = False) -> None:
        """Only these rows go on, in this order. same_sources: each reads the source that its place did before."""
        self.cache.keep(rows, states=not same_sources)
        if not same_sources:
            self.mask = self.mask[rows]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden[:, -1]).float()

    def allowed(self, scores: Tensor) -> Tensor:
        """scores (..., V), suppressed tokens at -inf."""
        return scores.index_fill(-1, self.suppress, -torch.inf)


@torch.inference_mode()
def sample(run: Run, params: SamplingParams) -> list[list[Translation]]:
    """Greedy or sampled, as `params` says."""
    B, end = len(run.padded), run.model.spec.end
    seed = secrets.randbits(62) if params.seed is None else params.seed
    targets = [[Translation([], 0.0, "length") for _ in range(params.n)] for _ in range(B)]
    active = [target for group in targets for target in group]
    logits = run.first()
    sampler = Sampler([replace(params, logprobs=True)] * len(active), [seed + j for _ in range(B) for j in range(params.n)], run.device)
    for step in range(params.max_tokens):
        tokens, logprobs = sampler(run.allowed(logits), step)
        assert logprobs is not None
        going = []
        for row, (target, token, logprob) in enumerate(zip(active, tokens.tolist(), logprobs.tolist(), strict=True)):
            target.tokens.append(token)
            target.score += logprob
            if token == end and not params.ignore_eos:
                target.finish_reason = "stop"
            else:
                going.append(row)
        if not going or step + 1 == params.max_tokens:
            break
        if len(going) < len(active):
            rows = torch.tensor(going, device=run.device)
            active, tokens = [active[row] for row in going], tokens[rows]
            run.keep(rows)
            sampler.keep(rows)
        logits = run.step(tokens)
    return targets


@torch.inference_mode()
def search(run: Run, n: int, length_penalty: float, early_stopping: bool) -> list[list[Translation]]:
    """Beam search: of all continuations of a source's n prefixes, the n best that have not ended go on.

    A target that ends is kept if it is among the n best candidates of its step, and its score among the n best of all. As in
    the reference, a source is done when its best open prefix, scored at its present length, is no better than its worst kept
    target.
    """
    end, B = run.model.spec.end, len(run.padded)
    finished: list[list[Translation]] = [[] for _ in range(B)]
    sources = list(range(B))  # of the rows that are still in the batch
    scores = torch.full((B, n), -torch.inf, device=run.device)
    scores[:, 0] = 0  # all prefixes are alike in the beginning: only one of them counts
    written = torch.empty(B, n, 0, dtype=torch.int64, device=run.device)
    logits = run.first()
    for t in range(1, run.max_tokens + 1):
        V = logits.shape[-1]
        logprobs = run.allowed(torch.log_softmax(logits, -1))  # in this order: what is left is not made to sum to 1, as in the reference
        total = (scores[..., None] + logprobs.view(len(sources), n, V)).flatten(1)
        best, place = total.topk(2 * n)
        beam, token = place // V, place % V
        ended = token == end if t < run.max_tokens else torch.ones_like(token, dtype=torch.bool)
        for row, score, target in completed(ended[:, :n], best, torch.cat((take(written, beam), token[..., None]), -1)):
            kept = finished[sources[row]]
            kept.append(Translation(target, score / t**length_penalty, "stop" if target[-1] == end else "length"))
            kept.sort(key=lambda found: -found.score)
            del kept[n:]
        rank = torch.arange(2 * n, device=run.device) + 2 * n * ended
        choice = rank.argsort(-1)[:, :n]
        scores, beam, token = (x.gather(1, choice) for x in (best, beam, token))
        written = torch.cat((take(written, beam), token[..., None]), -1)
        hope = (scores[:, 0] / t**length_penalty).tolist()
        going = [row for row, source in enumerate(sources) if t < run.max_tokens and (
            len(finished[source]) < n or (not early_stopping and hope[row] > finished[source][-1].score))]
        if not going:
            break
        rows = (torch.arange(len(sources), device=run.device)[:, None] * n + beam)[going].flatten()
        run.keep(rows, same_sources=len(going) == len(sources))
        if len(going) < len(sources):
            sources, scores, written, token = [sources[row] for row in going], scores[going], written[going], token[going]
        logits = run.step(token.flatten())
    return finished


def take(written: Tensor, beam: Tensor) -> Tensor:
    """written (B, n, t), beam (B, k) -> (B, k, t): the prefixes of these beams."""
    return written.gather(1, beam[..., None].expand(*beam.shape, written.shape[-1]))


def completed(ended: Tensor, best: Tensor, targets: Tensor) -> Iterator[tuple[int, float, list[int]]]:
    """(row, log-probability, tokens) of the candidates that end a target."""
    for row, rank in ended.nonzero().tolist():
        if (score := float(best[row, rank])) > -torch.inf:
            yield row, score, targets[row, rank].tolist()
