"""The tensors of the online loop: what is known of a rollout's tokens, and the packed mini-batches that learn from them.

An `Experience` holds S completions and their M sampled tokens end to end, completion after completion. What is measured
before the first optimizer step (log-probabilities, the critic's values, advantages) is kept there, one number a token. An
`Update` is the mini-batch of one optimizer step: some of the completions packed in rows, and for every trained position the
number of its token among the M. So nothing depends on how a rollout is cut into steps, or a step into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pellucid.align.aggregation import Counts
from pellucid.align.head import entropies
from pellucid.align.rollout import Group
from pellucid.align.rows import pack_completions
from pellucid.align.support import Support, support_logprobs
from pellucid.data.packing import IGNORE, Packed
from pellucid.nn import Decoder, Routing
from pellucid.ops import token_logprobs
from pellucid.train.ranks import ALONE, Ranks


class Experience:
    """The completions of the groups `chosen`, and everything that is known of their tokens. All tensors (M,), on `device`.

    sequence: the completion of each token. sampler: its log-probability as the sampler reported it. support: what the
    sampler could draw there, where it truncated. The others are None until they are needed: old (the policy that the ratio
    compares with), ref (the reference), values and returns (of the critic), advantages, entropy (of the policy at the rollout; none
    or one), keep (which tokens learn).

    share: a prompt is computed once for the completions of its group in a row, forward and backward; see `rows.py`.
    """

    def __init__(self, groups: Sequence[Group], chosen: Sequence[int], device: torch.device | str = "cpu", share: bool = False):
        self.device, self.share = torch.device(device), share
        self.places = [(i, j) for i in chosen for j, s in enumerate(groups[i].samples) if s.trained]
        self.samples = [groups[i].samples[j] for i, j in self.places]
        self.number = {place: k for k, place in enumerate(self.places)}
        masks = [torch.ones(len(s.tokens)).bool() if s.mask is None else torch.tensor(s.mask) for s in self.samples]
        lengths = torch.tensor([int(m.sum()) for m in masks], dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
        self.tokens = int(lengths.sum())
        self.ranks = [start + m.cumsum(0) - 1 for start, m in zip(starts.tolist(), masks)]  # number of each trained token
        self.sequence = torch.arange(len(self.samples)).repeat_interleave(lengths).to(device)
        self.sampler = self._flat([torch.tensor(s.logprobs)[m] for s, m in zip(self.samples, masks)])
        self.support = self._support()
        self.old: Tensor | None = None
        self.ref: Tensor | None = None
        self.values: Tensor | None = None
        self.returns: Tensor | None = None
        self.entropy: list[Tensor] = []
        self.keep: Tensor | None = None
        self.advantages = torch.zeros(self.tokens, device=device)

    def _flat(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).to(self.device) if parts else torch.zeros(0, device=self.device)

    def _support(self) -> Support | None:
        kept = [ids for s in self.samples for ids, on in zip(s.support or (), s.mask or [True] * len(s.tokens)) if on]
        if not kept:
            return None
        starts = torch.tensor([0] + [len(ids) for ids in kept]).cumsum(0)
        return Support(torch.cat(kept).to(self.device), starts.to(self.device))

    def of(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The tokens of these completions, as their numbers, and which of the chosen each belongs to."""
        place = torch.full((len(self.samples),), -1, device=self.device)
        place[torch.tensor(list(chosen), dtype=torch.int64, device=self.device)] = torch.arange(len(chosen), device=self.device)
        whose = place[self.sequence]
        tokens = (whose >= 0).nonzero().squeeze(-1)
        return tokens, whose[tokens]


class Update:
    """Completions of an experience as packed rows; N rows of T. `at` (N, T): number of the token that a position predicts."""

    def __init__(self, experience: Experience, chosen: Sequence[int], counts: Counts):
        samples = [experience.samples[k] for k in chosen]
        self.experience, self.counts = experience, counts
        self.rows: Packed = pack_completions(samples, share=experience.share).to(experience.device)
        self.usual = 2 * max(len(s.prompt) + len(s.tokens) - 1 for s in samples)  # tokens of a row
        trained = self.rows.labels != IGNORE
        whose = self.rows.documents[trained]
        ranks = torch.cat([experience.ranks[k] for k in chosen]).to(experience.device)
        sizes = torch.tensor([[len(s.prompt), len(s.tokens)] for s in samples], device=experience.device)
        begins = sizes[:, 1].cumsum(0) - sizes[:, 1]
        offset = self.rows.positions[trained] - (sizes[:, 0] - 1)[whose]
        self.at = torch.full_like(self.rows.labels, -1)
        self.at[trained] = ranks[begins[whose] + offset]

    def micro(self, rows: int, ranks: Ranks = ALONE) -> Iterator[slice]:
        """The micro-batches, of at most so many rows; of fewer (at least one) where rows are longer than usual, so that none holds more
        tokens, and where all processes are to get one."""
        rows = ranks.rows(len(self.rows), max(1, rows * self.usual // max(self.usual, self.rows.tokens.shape[1])))
        for start in range(0, len(self.rows), rows):
            yield slice(start, start + rows)

    def states(self, model: Decoder, micro: slice, routing: Routing | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the micro-batch's m trained positions: last hidden states (m, D), tokens to predict, completions (numbers within
        this update), and numbers of the tokens in the experience, (m,) each."""
        rows, at = self.rows.rows(micro), self.at[micro].flatten()
        hidden = model.hidden(rows.tokens, positions=rows.positions, documents=rows.documents, parents=rows.parents,
                              routing=routing).flatten(0, 1)
        on = at >= 0
        return hidden[on], rows.labels.flatten()[on], rows.documents.flatten()[on], at[on]

    def forward(self, model: Decoder, micro: slice, temperature: float, *, entropy: bool = False, bonus: bool = False,
                routing: Routing | None = None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """log-probabilities of the trained tokens, entropies if asked for (with gradient for a `bonus`), completions, numbers.

        Where the sampler truncated, the log-probabilities are those among the tokens that it could draw; the entropies are of
        the whole distribution.
        """
        hidden, labels, whose, at = self.states(model, micro, routing)
        head, support = model.head_weight.to(hidden.dtype), self.experience.support
        logp, H = token_logprobs(hidden, head, labels, temperature, entropy and not bonus)
        if support is not None:
            logp = support_logprobs(hidden, head, labels, support.take(at), temperature)
        return logp, entropies(hidden, head, temperature) if bonus else H, whose, at

    @torch.no_grad()
    def measure(self, micro_rows: int, found: Callable[[slice], tuple[Tensor, ...]], ranks: Ranks = ALONE, kinds: int = 1) -> list[Tensor]:
        """Numbers of every trained token, micro-batch by micro-batch: `found` gives `kinds` of them, and last the tokens' numbers in
        the experience. (M,) each, NaN at tokens that are not in this update. ranks: processes that share the work."""
        whole = [torch.full((self.experience.tokens,), torch.nan, device=self.experience.device) for _ in range(kinds)]
        for micro in ranks.mine(self.micro(micro_rows, ranks)):
            *values, at = found(micro)
            for into, v in zip(whole, values, strict=True):
                into[at] = v.to(into.dtype)
        return [ranks.merged(values) for values in whole]

    def logprobs(self, model: Decoder, micro_rows: int, temperature: float, entropy: bool = False, ranks: Ranks = ALONE) -> list[Tensor]:
        """log-probabilities of every trained token under `model`, and the entropies if asked for, (M,) each."""

        def found(micro: slice) -> tuple[Tensor, ...]:
            logp, H, _, at = self.forward(model, micro, temperature, entropy=entropy)
            return (logp, at) if H is None else (logp, H, at)

        return self.measure(micro_rows, found, ranks, 2 if entropy else 1)


def pick(values: Any, at: Tensor) -> Any:
    """values[at], or None where there are none."""
    return None if values is None else values[at]
