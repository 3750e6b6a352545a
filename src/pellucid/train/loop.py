"""Learning from given rows: pretraining and fine-tuning, which differ only in the rows. The loop itself is `train.run`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pellucid.data.packing import IGNORE, Batches, Packed
from pellucid.errors import BadInput
from pellucid.nn import Decoder
from pellucid.train.loss import share_of
from pellucid.train.ranks import ALONE, Ranks
from pellucid.train.run import Evaluate, Run, RunConfig, RunHistory


@dataclass
class LoopConfig(RunConfig):
    """What a run over given rows needs to know."""

    rows: int = 16
    """Rows in a step, over all micro-batches."""
    micro_rows: int | None = None
    """Rows in a micro-batch (less memory, same numbers); by default all of them."""
    compile: bool = False
    """Compile the layers with torch.compile: needs a C++ compiler on a CPU, costs up to a minute at the start."""


@dataclass
class History(RunHistory):
    tokens: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)  # (progress, loss per token)


class Loop(Run[LoopConfig, History]):
    """`Loop(...).run()` trains on rows of tokens in an order that the seed decides."""

    def __init__(self, model: Decoder, data: Packed, config: LoopConfig, *, evaluate: Evaluate | None = None,
                 checkpoint: str | Path | None = None, tokenizer: Any = None, resume_hint: str = "--resume", ranks: Ranks = ALONE):
        if config.micro_rows is not None and config.micro_rows < 1:
            raise BadInput(f"micro_rows = {config.micro_rows} is not possible", next="give 1 or more")
        super().__init__(model, config, History(), evaluate=evaluate, checkpoint=checkpoint, tokenizer=tokenizer,
                         resume_hint=resume_hint, ranks=ranks)
        self.batches = Batches(data, config.rows, config.seed)
        if config.compile:
            for layer in model.layers:  # layers are alike: one compilation serves them all
                layer.compile()

    def step(self, progress: float) -> dict[str, float]:
        h, rows = self.history, self.batches.next()
        rows = rows.to(self.model.embed.weight.device)
        total = int((rows.labels != IGNORE).sum())
        result = self.stepper.step(self._micro(rows), share_of(self.model, total), progress)
        self.count()
        h.tokens += rows.tokens.numel()
        h.losses.append((progress, result.loss))
        return {"loss": result.loss, "tokens_per_second": h.tokens / max(h.seconds, 1e-9), "grad_norm": result.grad_norm,
                "lr": result.lr}

    def _micro(self, rows: Packed) -> Iterator[Packed]:
        size = self.ranks.rows(len(rows), self.config.micro_rows)
        for start in range(0, len(rows), size):
            yield rows.rows(slice(start, start + size))

    def state(self) -> dict[str, Any]:
        return {"batches": self.batches.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.batches.load_state(state["batches"])
