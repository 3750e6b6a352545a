"""How the online loop samples and updates: its settings, and which of them cannot be."""

from __future__ import annotations

from dataclasses import dataclass, field

from pellucid.align.objective_config import ObjectiveConfig
from pellucid.errors import BadInput
from pellucid.optim import OptimConfig, Schedule
from pellucid.train import RunConfig


@dataclass
class OnlineConfig(RunConfig):
    """How the online loop samples and updates. A step is a rollout and what is learned from it."""

    stage: str = "grpo"
    """Name in events and messages."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(name="adamw", lr=4e-4))
    """The optimizer."""
    schedule: Schedule = field(default_factory=lambda: Schedule("linear", warmup=0.05, floor=0.1))
    """The learning-rate schedule."""
    prompts: int = 32
    """Problems in a rollout."""
    group: int = 8
    """Completions of each problem."""
    rounds: int = 2
    """Most rollouts in a step, to replace groups that teach nothing (dynamic sampling)."""
    epochs: int = 1
    """Passes over each rollout."""
    updates: int = 1
    """Optimizer steps in a pass, each on its share of the groups; from the second step on the ratio differs from 1 and the
    clip acts."""
    lag: int = 0
    """Steps between the weights that sample and those that learn: 0 samples afresh, 1 is one step off."""
    overlap: bool = True
    """With a lag: sample beside the update, by a copy of the weights; the numbers are the same without."""
    max_tokens: int = 96
    """Longest completion."""
    temperature: float = 1.0
    """Of the samples, and of every log-probability in the objective."""
    top_p: float | None = None
    """Sample from the nucleus of this mass only; what could be drawn is kept, so that the ratios stay exact."""
    top_k: int | None = None
    """Sample from the k most probable tokens only, likewise."""
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(clip_high=0.28, dead_groups="drop"))
    """The objective."""
    critic: OptimConfig | None = None
    """The critic's optimizer (advantage="gae"); by default the policy's."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each of the task's components, in place of those that the task gives."""
    micro_rows: int = 32
    """Rows in a micro-batch (memory only)."""
    samples_shown: int = 2
    """Completions of each step that are emitted as events: the best and the worst of a group."""


def check_config(config: OnlineConfig) -> None:
    """Impossible settings, before any work."""
    cfg = config.objective
    if config.group < 2 and not cfg.by_token:
        raise BadInput(f"a group of {config.group} is not possible", "an advantage compares completions of one prompt",
                       "use --group 4 or more")
    if not config.temperature > 0 or min(config.prompts, config.group, config.updates, config.epochs, config.micro_rows) < 1:
        raise BadInput("prompts, group, updates, epochs and micro_rows are at least 1, and the temperature is above 0",
                       "samples of one prompt must be able to differ, and be trained on", "change the one that is not")
    if config.lag < 0 or (config.top_p is not None and not 0 < config.top_p <= 1) or (config.top_k is not None and config.top_k < 1):
        raise BadInput("lag is at least 0, top_p lies in (0, 1], and top_k is at least 1", next="change the one that is not")
    if config.lag and cfg.policy == "reinforce" and cfg.correction == "none":
        raise BadInput("policy='reinforce' has no ratio, and samples of older weights need one",
                       f"lag is {config.lag}", "choose a correction, another policy, or lag=0")
    if config.critic is not None and cfg.advantage != "gae":
        raise BadInput("an optimizer for a critic, and no critic", f"advantage is {cfg.advantage!r}", "use the ppo objective")
