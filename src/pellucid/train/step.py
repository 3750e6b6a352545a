"""One optimizer step: the only place where gradients become weights, for pretraining, SFT and RL alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from pellucid import events
from pellucid.nn.experts import update_biases
from pellucid.optim import Optimizers, Schedule
from pellucid.runtime import keep_freed_memory
from pellucid.train.ranks import ALONE, Ranks

B = TypeVar("B")


@dataclass
class StepResult:
    loss: float  # sum of the micro-batches' contributions: what was differentiated
    grad_norm: float  # before clipping
    lr: float
    skipped: bool  # a gradient was not finite: the weights did not move
    ratio: float = 0.0  # |change of the trained weights| / |these weights|, from a sample of them


class Stepper:
    """Accumulates micro-batches, clips, steps.

    `loss_fn(micro_batch)` returns this micro-batch's SHARE of the step's loss: already divided by the count of the
    whole step (tokens or sequences over all micro-batches). A sum of such shares is the same however the step is cut;
    a mean of means is not, as soon as micro-batches hold different numbers of tokens. Of several processes each
    takes its share of the micro-batches, so that `loss_fn` is called for these only; loss and gradient are sums over all.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizers, schedule: Schedule, clip: float | None = 1.0, ranks: Ranks = ALONE):
        self.model, self.optimizer, self.schedule, self.clip, self.ranks = model, optimizer, schedule, clip, ranks
        self.skipped = 0
        keep_freed_memory()

    def step(self, micro_batches: Iterable[B], loss_fn: Callable[[B], Tensor], progress: float) -> StepResult:
        self.optimizer.set_factor(self.schedule(progress))
        loss = 0.0
        for micro in self.ranks.mine(micro_batches):
            share = loss_fn(micro)
            share.backward()
            loss += float(share.detach())
        loss = self.ranks.sum_gradients(self.model, loss)
        limit = self.clip if self.clip is not None else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        finite, ratio = norm < float("inf"), 0.0  # False for NaN too
        if finite:
            before = _sample(self.model)
            self.optimizer.step()
            ratio = _moved(before, _sample(self.model))
        else:
            self.skipped += 1
            events.note("a gradient is not finite: this step is skipped", "warning")
        update_biases(self.model, move=finite)  # of routers that are balanced without a loss
        self.optimizer.zero_grad()
        return StepResult(loss, norm, self.optimizer.lr, not finite, ratio)


def _sample(model: nn.Module, most: int = 4096) -> list[tuple[Tensor, int]]:
    """Of every trained parameter up to about so many numbers, evenly spaced, and how many each stands for: a copy of all would be
    as large as the model."""
    found = []
    for p in model.parameters():
        if p.requires_grad:
            stride = -(-p.numel() // most)
            found.append((p.detach().flatten()[:: max(stride, 1)].float().clone(), stride))
    return found


def _moved(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> float:
    """|after - before| / |before|"""
    change = torch.stack([(b - a).square().sum() * stride for (a, stride), (b, _) in zip(before, after)]).sum()
    size = torch.stack([a.square().sum() * stride for a, stride in before]).sum()
    return float((change / size).sqrt()) if float(size) else 0.0
