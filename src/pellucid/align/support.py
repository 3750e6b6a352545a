"""Ratios that stay exact under top-k, top-p and min-p sampling.

A sampler that truncates draws from p(token) / p(kept): its log-probability is larger than the trainer's by -log p(kept),
so the ratio of trainer to sampler is too small by the kept mass (0.896 on average at top_p = 0.8 in one measurement), and
after an update the policy's ratio says what happened to tokens that could not be drawn.

The answer is to replay the support: keep which tokens could be drawn, and renormalise the old AND the new distribution
over them. The ratio is then exactly 1 on-policy, and p_new / p_old of what was really sampled from afterwards.
The kept sets are ragged: `ids` of all tokens end to end, `starts` where each begins. Shapes: M tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.align.head import by_rows
from pellucid.engine.sampler import truncate
from pellucid.errors import BadInput


@dataclass(frozen=True)
class Support:
    """Which tokens could be drawn at each of M places: ids[starts[m] : starts[m + 1]]. Slices by tokens."""

    ids: Tensor
    """(K,) int64"""
    starts: Tensor
    """(M + 1,) int64, from 0 to K"""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, part: slice) -> Support:
        first, last, _ = part.indices(len(self))
        last = max(first, last)
        a, b = int(self.starts[first]), int(self.starts[last])
        return Support(self.ids[a:b], self.starts[first : last + 1] - a)

    def take(self, which: Tensor) -> Support:
        """The supports of the tokens `which` (m,), in that order."""
        sizes = self.starts.diff()[which]
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        within = torch.arange(int(starts[-1]), device=sizes.device) - starts[:-1].repeat_interleave(sizes)
        return Support(self.ids[self.starts[:-1][which].repeat_interleave(sizes) + within], starts)

    @staticmethod
    def cat(parts: Sequence[Support]) -> Support:
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + len(part.ids))
        starts = [part.starts[:-1] + at for part, at in zip(parts, offsets)]
        end = parts[0].starts.new_tensor([offsets[-1]])
        return Support(torch.cat([part.ids for part in parts]), torch.cat([*starts, end]))


def kept_tokens(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Support:
    """What the engine's sampler could draw from these rows, (M, V) logits already divided by the temperature."""
    probs = logits.detach().float().softmax(-1)
    rows = len(probs)
    kept = truncate(probs, torch.full((rows,), top_k, device=probs.device), torch.full((rows,), top_p, device=probs.device))
    kept = kept.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0) > 0
    starts = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.sum(-1).cumsum(0)])
    return Support(kept.nonzero()[:, 1], starts)


def support_rows(logits: Tensor, tokens: Tensor, support: Support) -> Tensor:
    """log p(token) - log p(kept set), (M, V) -> (M,)."""
    sizes = support.starts.diff()
    row = torch.arange(len(tokens), device=tokens.device).repeat_interleave(sizes)
    picked = logits[row, support.ids]
    top = picked.detach().new_full((len(tokens),), -torch.inf).scatter_reduce(0, row, picked.detach(), "amax")
    mass = torch.zeros_like(top).index_add(0, row, (picked - top[row]).exp()).log() + top
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - mass


def support_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor, support: Support, temperature: float = 1.0) -> Tensor:
    """log-probability of each token among those that could be drawn, (M,), differentiable, chunk by chunk.

    Errors: BadInput where a token is not in its own support: it was recorded for other samples.
    """
    if len(support) != len(tokens):
        raise BadInput(f"{len(support)} supports for {len(tokens)} tokens", next="record one for every sampled token")
    row = torch.arange(len(tokens), device=tokens.device).repeat_interleave(support.starts.diff())
    found = torch.zeros_like(tokens, dtype=torch.bool).index_put((row[support.ids == tokens[row]],), tokens.new_ones(()).bool())
    if not bool(found.all()):
        raise BadInput("a sampled token is not among those that could be drawn", f"first at {int((~found).nonzero()[0])}",
                       "record the support with the sample, at the same temperature")
    return by_rows(support_rows, hidden, weight, tokens, support, temperature=temperature)
