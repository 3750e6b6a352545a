"""THE loop: steps until the budget is spent, evaluations on the way, checkpoints, a clean stop, exact resume.

Pretraining, fine-tuning and reinforcement learning differ in what a step does (`step`) and in what must be kept to go on
(`state`, `restore`): `train.loop.Loop` learns from given rows, `align.online.OnlineLoop` from its own samples.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from pellucid import events
from pellucid.errors import Interrupted
from pellucid.messages import say, three_parts
from pellucid.models.hub import fill, write_model
from pellucid.models.lora import load_adapters, write_adapters
from pellucid.nn import Decoder
from pellucid.nn.lora import adapted
from pellucid.optim import OptimConfig, Schedule, build_optimizer
from pellucid.train.budget import Budget
from pellucid.train.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from pellucid.train.ranks import ALONE, Ranks
from pellucid.train.step import Stepper


@dataclass
class RunConfig:
    """What every run needs to know, apart from model and data."""

    stage: str = "train"
    """Name in events and messages."""
    steps: int | None = None
    """Steps; or give `seconds`."""
    seconds: float | None = None
    """Length of the run in seconds."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    schedule: Schedule = field(default_factory=Schedule)
    """The learning-rate schedule."""
    clip: float | None = 1.0
    """Clip the gradient's norm to this; None: no clipping."""
    evaluations: int = 4
    """Evaluations on held-out data, evenly over the run; the last one at its end."""
    save_seconds: float | None = None
    """Also write a resume state every so often; it is always written when the run is interrupted."""
    seed: int = 0
    """Seed of all that is drawn: the order of the data, or problems and samples."""


@dataclass
class RunHistory:
    steps: int = 0
    seconds: float = 0.0
    evaluations: list[tuple[float, float]] = field(default_factory=list)  # (progress, value)
    skipped: int = 0
    """Steps whose gradient was not finite: the weights did not move."""

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Self:
        """From JSON, which knows no tuples: every list here holds pairs."""
        plain: dict[str, Any] = {k: [tuple(pair) for pair in v] if isinstance(v, list) else v for k, v in saved.items()}
        return cls(**plain)


Evaluate = Callable[[], tuple[str, float, dict[str, Any]]]  # name, value, details
C = TypeVar("C", bound=RunConfig)
H = TypeVar("H", bound=RunHistory)


class Run(ABC, Generic[C, H]):
    """`run()` trains to the end of the budget, or stops cleanly and says how to go on.

    ranks: the processes that do it together; all of them make the same run with the same arguments, and the first one saves.
    """

    def __init__(self, model: Decoder, config: C, history: H, *, evaluate: Evaluate | None, checkpoint: str | Path | None,
                 tokenizer: Any, resume_hint: str, ranks: Ranks = ALONE):
        self.model, self.config, self.history = model, config, history
        self.evaluate, self.tokenizer, self.resume_hint = evaluate, tokenizer, resume_hint
        self.checkpoint, self.ranks = Path(checkpoint) if checkpoint else None, ranks
        self.stepper = Stepper(model, build_optimizer(model, config.optim), config.schedule, config.clip, ranks)
        self.budget = Budget(config.steps, config.seconds, ranks.clock)

    # --- what kinds of runs differ in -----------------------------------------------------------------------------------

    @abstractmethod
    def step(self, progress: float) -> dict[str, float]:
        """One step, begun at that progress; calls `count` when it is done; returns what is to be shown of it."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides weights, optimizer and history; plain JSON values."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""

    def write(self, folder: Path) -> None:
        """The weights, into a folder; of a model with adapters, these."""
        (write_adapters if adapted(self.model) else write_model)(self.model, folder)

    def read(self, folder: Path) -> None:
        """The inverse of `write`."""
        (load_adapters if adapted(self.model) else fill)(self.model, folder)

    # --- the loop -------------------------------------------------------------------------------------------------------

    def run(self) -> H:
        c, h = self.config, self.history
        self.model.train()
        self.ranks.agree()
        self.budget.start(h.steps, h.seconds)
        next_eval, last_save = self._next_evaluation(), self.budget.elapsed
        with stop_requested() as stop:
            while not self.budget.over:
                self._one_step()
                if self.evaluate and c.evaluations and next_eval < 1.0 and self.budget.progress >= next_eval:
                    self._evaluate()
                    next_eval = self._next_evaluation()
                if self.ranks.agree(stop.is_set()):
                    self._interrupted()
                if c.save_seconds and self.checkpoint and self.budget.elapsed - last_save >= c.save_seconds:
                    self.save()
                    last_save = self.budget.elapsed
            if self.evaluate and c.evaluations and not (h.evaluations and h.evaluations[-1][0] >= 1.0):
                self._evaluate()
            if self.ranks.agree(stop.is_set()):
                self._interrupted()
        self.model.eval()
        return h

    def count(self) -> None:
        """The step is done, here and now."""
        self.ranks.agree()
        self.budget.done += 1
        self.history.steps, self.history.seconds = self.budget.done, self.budget.elapsed
        self.history.skipped = self.stepper.skipped

    def _one_step(self) -> None:
        numbers = self.step(self.budget.progress)
        events.emit(events.Step(self.config.stage, self.history.steps, self.budget.progress, self.budget.eta, numbers))

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        name, value, details = self.evaluate()
        self.model.train()
        self.history.evaluations.append((self.budget.progress, value))
        events.emit(events.Evaluation(self.config.stage, name, value, details))

    def _next_evaluation(self) -> float:
        n = self.config.evaluations
        return (int(self.budget.progress * n + 1e-9) + 1) / n if n else 2.0

    # --- stop and go on -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        assert self.checkpoint is not None
        if self.ranks.first:
            state = self.state() | {"history": vars(self.history)}
            save_checkpoint(self.checkpoint, self.model, self.stepper.optimizer, state, self.tokenizer, self.write)
        self.ranks.agree()  # none goes on, or ends, before it is written

    def resume(self) -> bool:
        """Continue from the checkpoint if there is one; returns whether there was."""
        if self.checkpoint is None or not has_checkpoint(self.checkpoint):
            return False
        state = load_checkpoint(self.checkpoint, self.model, self.stepper.optimizer, self.read)
        self.history = type(self.history).of(state["history"])
        self.stepper.skipped = self.history.skipped
        self.restore(state)
        self.budget.start(self.history.steps, self.history.seconds)
        events.note(say("loop.goes_on", stage=self.config.stage, step=self.history.steps))
        return True

    def _interrupted(self) -> None:
        if self.checkpoint is None:
            raise Interrupted(*three_parts("loop.lost", stage=self.config.stage))
        self.save()
        if not self.ranks.first:
            raise SystemExit(Interrupted.exit_code)  # the first one says it
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
