"""The tensors of one optimizer step of the online loop: sampled completions as packed rows, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pellucid.align.aggregation import Empty, count
from pellucid.align.credit import Credit
from pellucid.align.rollout import Group
from pellucid.align.rows import pack_completions
from pellucid.data.packing import IGNORE, Packed
from pellucid.nn import Decoder
from pellucid.ops import token_logprobs


class Update:
    """The tensors of one optimizer step. M trained tokens of S completions, in the order of `rows`.

    sequence, advantages, sampler: (M,); place (N, T): where each trained position stands among the M.
    """

    def __init__(self, groups: list[Group], credit: Credit, chosen: list[int], empty: Empty, device: torch.device):
        picked = [(i, j) for i in chosen for j in range(len(groups[i].samples)) if credit.lengths[i, j] > 0]
        samples = [groups[i].samples[j] for i, j in picked]
        self.rows: Packed = pack_completions(samples).to(device)
        trained = self.rows.labels != IGNORE
        self.place = torch.zeros_like(self.rows.labels)
        self.place[trained] = torch.arange(int(trained.sum()), device=device)
        self.sequence = self.rows.documents[trained]
        advantages = torch.tensor([float(credit.advantages[i, j]) for i, j in picked], device=device)
        self.advantages = advantages[self.sequence]
        logprobs = torch.cat([torch.tensor(s.logprobs) for s in samples]).to(device)
        starts = torch.tensor([0] + [len(s.tokens) for s in samples], device=device).cumsum(0)
        offset = self.rows.positions[trained] - torch.tensor([len(s.prompt) - 1 for s in samples], device=device)[self.sequence]
        self.sampler = logprobs[starts[self.sequence] + offset]
        self.counts = count(credit.lengths[chosen].flatten(), empty)
        self.old: Tensor | None = None
        self.ref: Tensor | None = None

    def micro(self, rows: int) -> Iterator[slice]:
        for start in range(0, len(self.rows), rows):
            yield slice(start, start + rows)

    def forward(self, model: Decoder, micro: slice, temperature: float, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """log-probabilities and entropies of the micro-batch's trained tokens, and their places among the step's."""
        rows = self.rows.rows(micro)
        hidden = model.hidden(rows.tokens, positions=rows.positions, documents=rows.documents).flatten(0, 1)
        labels = rows.labels.flatten()
        trained = labels != IGNORE
        hidden = hidden[trained]
        logp, h = token_logprobs(hidden, model.head_weight.to(hidden.dtype), labels[trained], temperature, entropy)
        return logp, h if h is not None else torch.zeros(0), self.place[micro].flatten()[trained]

    @torch.no_grad()
    def logprobs(self, model: Decoder, micro_rows: int, temperature: float) -> Tensor:
        """Of every trained token under `model`, (M,)."""
        out = torch.empty(len(self.sampler), device=self.sampler.device)
        for micro in self.micro(micro_rows):
            logp, _, where = self.forward(model, micro, temperature, entropy=False)
            out[where] = logp
        return out


def pick(values: Tensor | None, where: Tensor) -> Tensor | None:
    return None if values is None else values[where]
