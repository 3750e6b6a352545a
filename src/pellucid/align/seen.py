"""What the optimizer steps on one rollout gave, and the table that comes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pellucid.align import metrics as tables
from pellucid.align.corrections import importance_weights
from pellucid.align.objective_config import ObjectiveConfig
from pellucid.align.update import Experience
from pellucid.train.ranks import Ranks


class Seen:
    """Filled micro-batch by micro-batch; `gather` makes it that of all processes."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.steps: list[dict[str, float]] = []
        self.critic: list[dict[str, Any]] = []
        self.value_clip: float | None = None
        self.tokens: dict[str, list[Tensor]] = {}
        self.every: dict[str, Tensor] = {}  # (M,) after `gather`: the same of all processes

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.tokens.setdefault(name, []).append(value)

    def gather(self) -> None:
        for name, kind in (("at", torch.int64), *((name, torch.float32) for name in ("entropy", "trainer", "sampler"))):
            self.every[name] = self.ranks.cat(torch.cat([x.to(kind) for x in self.tokens.get(name, [torch.zeros(0)])]))

    def table(self) -> dict[str, float]:
        """Means over the steps, maxima where the name says so."""
        n = len(self.steps)
        shares = tables.merge([{k: v if k.endswith("/max") else v / n for k, v in step.items()} for step in self.steps])
        entropy, trainer, sampler = (self.every[name] for name in ("entropy", "trainer", "sampler"))
        table = shares | tables.entropy_table(entropy) | tables.engine_table(trainer, sampler)
        if self.critic:
            values, returns, old = (torch.cat(parts) for parts in zip(*(step["seen"] for step in self.critic)))
            table |= tables.critic_table(values, returns, old, self.value_clip)
            table |= {f"critic/{name}": sum(s[name] for s in self.critic) / len(self.critic) for name in ("loss", "grad_norm")}
        return table

    def corrections(self, x: Experience, cfg: ObjectiveConfig) -> dict[str, float]:
        """How the correction's weights spread, by the length of their completions."""
        if cfg.correction == "none":
            return {}
        trainer = torch.full_like(x.sampler, torch.nan)
        trainer[self.every["at"].to(trainer.device)] = self.every["trainer"].to(trainer)
        on = ~trainer.isnan()
        weights = importance_weights(trainer[on], x.sampler[on], x.sequence[on], level=cfg.correction_level, mode=cfg.correction,
                                     low=cfg.correction_low, high=cfg.correction_high)
        return tables.correction_table(weights, x.sequence[on])
