"""THE loop: batches in, steps out, with evaluation, checkpoints, progress and a clean stop.

Pretraining and fine-tuning differ only in the rows they give it; the online loop of align/ shares its `Stepper`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pellucid import events
from pellucid.data.packing import IGNORE, Batches, Packed
from pellucid.errors import BadInput, Interrupted
from pellucid.messages import say, three_parts
from pellucid.nn import Decoder
from pellucid.optim import OptimConfig, Schedule, build_optimizer
from pellucid.train.budget import Budget
from pellucid.train.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from pellucid.train.loss import share_of
from pellucid.train.step import Stepper


@dataclass
class LoopConfig:
    """What the loop needs to know, apart from model and data."""

    stage: str = "train"
    """Name in events and messages."""
    steps: int | None = None
    """Optimizer steps; or give `seconds`."""
    seconds: float | None = None
    """Length of the run in seconds."""
    rows: int = 16
    """Rows in a step, over all micro-batches."""
    micro_rows: int | None = None
    """Rows in a micro-batch (less memory, same numbers); by default all of them."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    schedule: Schedule = field(default_factory=Schedule)
    """The learning-rate schedule."""
    clip: float | None = 1.0
    """Clip the gradient's norm to this; None: no clipping."""
    compile: bool = False
    """Compile the layers with torch.compile: needs a C++ compiler on a CPU, costs up to a minute at the start."""
    evaluations: int = 4
    """Evaluations on held-out data, evenly over the run; the last one at its end."""
    save_seconds: float | None = None
    """Also write a resume state every so often; it is always written when the run is interrupted."""
    seed: int = 0
    """Seed of the data order."""


Evaluate = Callable[[], tuple[str, float, dict[str, Any]]]  # name, value, details


@dataclass
class History:
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[tuple[float, float]] = field(default_factory=list)  # (progress, loss per token)
    evaluations: list[tuple[float, float]] = field(default_factory=list)  # (progress, value)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> History:
        """From JSON, which knows no tuples."""
        pairs = {name: [tuple(pair) for pair in saved[name]] for name in ("losses", "evaluations")}
        return cls(**(saved | pairs))


class Loop:
    """`Loop(...).run()` trains to the end of the budget, or stops cleanly and says how to go on."""

    def __init__(self, model: Decoder, data: Packed, config: LoopConfig, *, evaluate: Evaluate | None = None,
                 checkpoint: str | Path | None = None, tokenizer: Any = None, resume_hint: str = "--resume"):
        self.model, self.config, self.evaluate, self.tokenizer = model, config, evaluate, tokenizer
        self.checkpoint = Path(checkpoint) if checkpoint else None
        self.resume_hint = resume_hint
        self.batches = Batches(data, config.rows, config.seed)
        self.stepper = Stepper(model, build_optimizer(model, config.optim), config.schedule, config.clip)
        self.budget = Budget(config.steps, config.seconds)
        self.history = History()
        if config.compile:
            for layer in model.layers:  # layers are alike: one compilation serves them all
                layer.compile()
        if config.micro_rows is not None and config.micro_rows < 1:
            raise BadInput(f"micro_rows = {config.micro_rows} is not possible", next="give 1 or more")

    def resume(self) -> bool:
        """Continue from the checkpoint if there is one; returns whether there was."""
        if self.checkpoint is None or not has_checkpoint(self.checkpoint):
            return False
        state = load_checkpoint(self.checkpoint, self.model, self.stepper.optimizer)
        self.batches.load_state(state["batches"])
        self.history = History.of(state["history"])
        self.budget.start(self.history.steps, self.history.seconds)
        events.note(say("loop.goes_on", stage=self.config.stage, step=self.history.steps))
        return True

    def run(self) -> History:
        c, h = self.config, self.history
        self.model.train()
        self.budget.start(h.steps, h.seconds)
        next_eval = self._next_evaluation()
        last_save = self.budget.elapsed
        with stop_requested() as stop:
            while not self.budget.over:
                self._one_step()
                if self.evaluate and c.evaluations and self.budget.progress >= next_eval and next_eval < 1.0:
                    self._evaluate()
                    next_eval = self._next_evaluation()
                if stop.is_set():
                    self._interrupted()
                if c.save_seconds and self.checkpoint and self.budget.elapsed - last_save >= c.save_seconds:
                    self.save()
                    last_save = self.budget.elapsed
            if self.evaluate and c.evaluations and not (h.evaluations and h.evaluations[-1][0] >= 1.0):
                self._evaluate()
            if stop.is_set():
                self._interrupted()
        self.model.eval()
        return h

    def _one_step(self) -> None:
        h, rows = self.history, self.batches.next()
        rows = rows.to(self.model.embed.weight.device)
        total = int((rows.labels != IGNORE).sum())
        progress = self.budget.progress
        result = self.stepper.step(self._micro(rows), share_of(self.model, total), progress)
        self.budget.done += 1
        h.steps, h.seconds = self.budget.done, self.budget.elapsed
        h.tokens += rows.tokens.numel()
        h.losses.append((progress, result.loss))
        events.emit(events.Step(
            self.config.stage, h.steps, self.budget.progress, self.budget.eta,
            {"loss": result.loss, "tokens_per_second": h.tokens / max(h.seconds, 1e-9), "grad_norm": result.grad_norm,
             "lr": result.lr}))

    def _micro(self, rows: Packed) -> Iterator[Packed]:
        size = self.config.micro_rows or len(rows)
        for start in range(0, len(rows), size):
            yield rows.rows(slice(start, start + size))

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        name, value, details = self.evaluate()
        self.model.train()
        self.history.evaluations.append((self.budget.progress, value))
        events.emit(events.Evaluation(self.config.stage, name, value, details))

    def _next_evaluation(self) -> float:
        n = self.config.evaluations
        return (int(self.budget.progress * n + 1e-9) + 1) / n if n else 2.0

    def save(self) -> None:
        assert self.checkpoint is not None
        h = self.history
        state = {"batches": self.batches.state(), "history": vars(h)}
        save_checkpoint(self.checkpoint, self.model, self.stepper.optimizer, state, self.tokenizer)

    def _interrupted(self) -> None:
        if self.checkpoint is None:
            raise Interrupted(*three_parts("loop.lost", stage=self.config.stage))
        self.save()
        raise Interrupted(say("loop.stopped", stage=self.config.stage, step=self.history.steps), next=self.resume_hint)


@contextlib.contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event (the step under way is finished); a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handler(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for s, previous in old.items():
            signal.signal(s, previous)
