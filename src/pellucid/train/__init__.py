"""Training: one loop, exact resume."""

from pellucid.train.budget import Budget
from pellucid.train.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from pellucid.train.loop import Loop, LoopConfig
from pellucid.train.loss import bits_per_byte, held_out_loss, language_loss, token_bytes
from pellucid.train.run import Evaluate, Run, RunConfig, RunHistory, stop_requested
from pellucid.train.step import Stepper, StepResult

__all__ = [
    "Budget",
    "Evaluate",
    "Loop",
    "LoopConfig",
    "Run",
    "RunConfig",
    "RunHistory",
    "StepResult",
    "Stepper",
    "bits_per_byte",
    "has_checkpoint",
    "held_out_loss",
    "language_loss",
    "load_checkpoint",
    "save_checkpoint",
    "stop_requested",
    "token_bytes",
]
