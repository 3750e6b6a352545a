"""Choosing the next token of every sequence of a batch at once.

Randomness is counter-based: the uniform number of a request's t-th token is a hash of (its seed, t). It needs no
generator objects, and a request's draw cannot depend on what else is in the batch.
Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.engine.params import SamplingParams
from pellucid.engine.transfer import to_device
from pellucid.errors import PellucidError
from pellucid.ops import choose_jit
from pellucid.ops.compiled import same_threads
from pellucid.ops.triton.language import choose_triton

ONE_THREAD = 2**17
"""Logits in a draw from which on several threads draw."""
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64, 0x9E3779B97F4A7C15 - 2**64)  # as signed 64-bit


def uniform(seeds: Tensor, steps: Tensor) -> Tensor:
    """(B,) int64 seeds and steps -> (B,) float64 in [0, 1): splitmix64 (Steele et al. 2014) of seed, then of step."""

    def mix(z: Tensor) -> Tensor:
        z = z + _MIX[2]
        z = (z ^ _shift(z, 30)) * _MIX[0]
        z = (z ^ _shift(z, 27)) * _MIX[1]
        return z ^ _shift(z, 31)

    return _shift(mix(mix(seeds) + steps), 11).double() * 2.0**-53


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of signed 64-bit integers (torch's is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


class Sampler:
    """Holds the settings of B sequences as tensors; `keep` follows when sequences leave the batch.

    support: note in `kept` what could be drawn, and give log-probabilities among these; for rows that truncate.
    """

    def __init__(self, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device | str = "cpu",
                 support: bool = False):
        self.host = torch.tensor([[p.temperature, p.top_k or 0, 1.0 if p.top_p is None else p.top_p, p.min_p or 0.0,
                                   1.0 if p.typical_p is None else p.typical_p] for p in params], dtype=torch.float64).reshape(-1, 5).T
        self.device = torch.device(device)
        self.seeds = to_device(torch.tensor([s % 2**63 for s in seeds], dtype=torch.int64), self.device)
        self.logprobs = any(p.top is not None for p in params)
        self.support = support
        self.alone = False  # draw in one thread: the steps between have threads of their own
        self.kept: list[Tensor] = []  # of the latest draw, for each row the tokens that could be drawn
        self._plan()

    def _plan(self) -> None:
        """What the settings mean is found on the host: a GPU is not waited for."""
        columns = to_device(self.host, self.device)
        self.temperature, self.top_p, self.min_p, self.typical_p = columns[[0, 2, 3, 4]].float().unbind()
        self.top_k = columns[1].long()
        temperature, top_k, top_p, min_p, typical_p = self.host
        cuts = (top_k > 0) | (top_p < 1) | (min_p > 0) | (typical_p < 1)
        self._truncating = to_device((cuts & (temperature > 0)).nonzero().squeeze(-1), self.device)
        self._typical = bool((typical_p < 1).any())
        self._settings: tuple[Any, Any] | None = None  # the kernel's: temperatures and seeds as arrays

    def keep(self, rows: Tensor) -> None:
        self.host, self.seeds = self.host[:, rows.cpu()], self.seeds[rows]
        self._plan()

    def __call__(self, logits: Tensor, step: int | Tensor, check: bool = True) -> tuple[Tensor, Tensor | None]:
        """logits (B, V) -> tokens (B,) int64, and their log-probabilities (B,) if any request asked for them. step: how many
        tokens each sequence has drawn before: one number, or one for each (B,).  check: whether logits that are no numbers are an error
        here, or tokens of -1 (finding out is a wait on a GPU; see `no_numbers`).

        On a GPU one kernel draws (but for typical_p). On a CPU rows that truncate are drawn by PyTorch, all others by a compiled
        kernel where there is one: how a row is drawn never depends on its neighbours.
        """
        steps = step if isinstance(step, Tensor) else torch.full_like(self.seeds, step)
        compiled = logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16) and choose_jit().value
        fused = not (self.support or self._typical) and choose_triton(logits.device).value
        compiled = compiled and not fused
        way = self._draw_fused if fused else self._draw_compiled if compiled else self._draw
        tokens, logprobs = way(logits, steps)
        if check and tokens.cpu().numpy().min(initial=0) < 0:
            raise no_numbers()
        if compiled and len(self._truncating):
            tokens[self._truncating], some = self._draw(logits[self._truncating], steps, self._truncating)
            if logprobs is not None and some is not None:
                logprobs[self._truncating] = some
        return tokens, logprobs

    def scaled(self, logits: Tensor, rows: Tensor) -> Tensor:
        """logits (n, V) of these rows, float32, at their temperatures (greedy: at 1)."""
        temperature = self.temperature[rows]
        return logits.float() / torch.where(temperature == 0, 1.0, temperature)[:, None]

    def _draw_fused(self, logits: Tensor, steps: Tensor) -> tuple[Tensor, Tensor | None]:
        from pellucid.ops.triton.draw import draw as draw_rows

        tokens, logprobs = draw_rows(logits, self.temperature, self.top_k, self.top_p, self.min_p, self.seeds, steps)
        return tokens, logprobs if self.logprobs else None

    def _draw_compiled(self, logits: Tensor, steps: Tensor) -> tuple[Tensor, Tensor | None]:
        from pellucid.ops.jit.draw import draw
        from pellucid.ops.jit.lanes import array

        # OpenMP's threads wait busily for a while, on the core that the next step's threads want: not for a few microseconds of work.
        same_threads(1 if self.alone or logits.numel() < ONE_THREAD else 2**31)
        if self._settings is None:
            self._settings = array(self.temperature), array(self.seeds)
        tokens, logprobs = np.empty(len(logits), np.int64), np.empty(len(logits) if self.logprobs else 0, np.float32)
        temperature, seeds = self._settings
        draw(array(logits.contiguous()), temperature, seeds, array(steps), tokens, logprobs)
        return torch.from_numpy(tokens), torch.from_numpy(logprobs) if self.logprobs else None

    def _draw(self, logits: Tensor, steps: Tensor, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        """The readable twin, and the only path that truncates. `rows`: whose settings these logits follow. A row that holds
        NaN, or whose largest logit is infinite, gives token -1."""
        logits, temperature = logits.float(), self.temperature[rows]
        finite, greedy = logits.amax(-1).isfinite(), temperature == 0  # the maximum of a row with NaN is NaN
        if bool(greedy.all()):
            tokens = logits.argmax(-1)
            return tokens.where(finite, -1), self._logprob(logits, tokens) if self.logprobs else None
        if not bool((temperature == 1).all()):
            # The largest logit first becomes 0: divided by a tiny temperature, another would overflow.
            logits = logits - logits.amax(-1, keepdim=True)
            logits = logits / torch.where(greedy, 1.0, temperature)[:, None]
        probs = torch.softmax(logits, -1)
        kept = probs
        if len(self._truncating):
            kept = truncate(kept, self.top_k[rows], self.top_p[rows])
            kept = kept.masked_fill(probs < self.min_p[rows][:, None] * probs.amax(-1, keepdim=True), 0.0)
            if bool((self.typical_p[rows] < 1).any()):
                kept = typical(kept, self.typical_p[rows])
            if self.support:
                self.kept = [row.nonzero().squeeze(-1).cpu() for row in kept]
                probs = kept / kept.sum(-1, keepdim=True)
        seeds = self.seeds[rows]
        tokens = draw(kept, uniform(seeds, steps[rows]))
        tokens = torch.where(greedy, logits.argmax(-1), tokens)
        return tokens.where(finite, -1), probs.gather(-1, tokens[:, None]).squeeze(-1).log() if self.logprobs else None

    @staticmethod
    def _logprob(logits: Tensor, tokens: Tensor) -> Tensor:
        return logits.gather(-1, tokens[:, None]).squeeze(-1) - torch.logsumexp(logits, -1)


def no_numbers() -> PellucidError:
    return PellucidError("the model's logits are not numbers", "its weights diverged in training, or are damaged",
                         "check them with `pellucid eval`, or go back to an earlier checkpoint")


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Inverse-transform sampling: the first token whose cumulative weight exceeds u * total. weights (B, V), u (B,)."""
    total = weights.cumsum(-1)
    point = (u * total[:, -1].double()).float()[:, None]
    tokens = torch.searchsorted(total, point, right=True).squeeze(-1)
    # u close to 1 may round up to the total itself: the answer is then the last token with any weight.
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).int().argmax(-1) if bool((tokens >= weights.shape[-1]).any()) else tokens
    return torch.minimum(tokens, last)


def truncate(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Zero outside each row's top-k (0: off) and nucleus of mass top_p (1: off); not renormalised. Ties keep order."""
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    off_k = (top_k[:, None] > 0) & (rank >= top_k[:, None])
    ordered = ordered.masked_fill(off_k, 0.0)
    before = (ordered.cumsum(-1) - ordered) / ordered.sum(-1, keepdim=True)  # nucleus of what top-k left
    ordered = ordered.masked_fill((before >= top_p[:, None]) & (top_p[:, None] < 1), 0.0)
    return torch.zeros_like(probs).scatter(-1, index, ordered)


def typical(probs: Tensor, mass: Tensor) -> Tensor:
    """Of what is left of each row, the tokens whose surprise -log p is closest to its expectation, up to probability `mass` (1: off)."""
    p = probs / probs.sum(-1, keepdim=True)
    surprise = -p.log()
    expected = (p * surprise).nansum(-1, keepdim=True)
    distance = torch.where(p > 0, (surprise - expected).abs(), torch.inf)
    ordered, index = distance.sort(stable=True, dim=-1)
    last = (p.gather(-1, index).cumsum(-1) < mass[:, None]).sum(-1, keepdim=True).clamp(max=probs.shape[-1] - 1)
    far = (ordered > ordered.gather(-1, last)) & (mass[:, None] < 1)
    return probs.masked_fill(torch.zeros_like(far).scatter(-1, index, far), 0.0)


def best(logprobs: Tensor, most: int) -> list[list[tuple[int, float]]]:
    """logprobs (B, V) -> of each row the `most` most probable tokens with their log-probabilities, the largest first."""
    values, tokens = logprobs.topk(min(most, logprobs.shape[-1]))
    return [list(zip(t, v, strict=True)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]
