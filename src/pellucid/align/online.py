"""The online loop: roll out, grade, assign credit, update. Objectives are plugged in as data (`ObjectiveConfig`).

    problems -> G samples each -> reward components -> advantages -> packed rows -> objective -> one or more steps

Groups whose completions all earn the same teach nothing: with `dead_groups="drop"` they are left out before the update
(dynamic sampling, DAPO, arXiv 2503.14476), which also saves the time of their backward pass.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid import events
from pellucid.align import metrics as tables
from pellucid.align.credit import Credit, assign_credit
from pellucid.align.objective import objective
from pellucid.align.objective_config import ObjectiveConfig
from pellucid.align.rewards import RewardSet, task_reward
from pellucid.align.rollout import Group, Rollouts, components, trained_lengths, truncated
from pellucid.align.update import Update, pick
from pellucid.errors import BadInput
from pellucid.nn import Decoder
from pellucid.optim import OptimConfig, Schedule
from pellucid.tasks import Task
from pellucid.tokenizers import Tokenizer
from pellucid.train import Evaluate, Run, RunConfig, RunHistory


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
    updates: int = 1
    """Optimizer steps on each rollout; from the second on the ratio differs from 1 and the clip acts."""
    max_tokens: int = 96
    """Longest completion."""
    temperature: float = 1.0
    """Of the samples, and of every log-probability in the objective."""
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(clip_high=0.28, dead_groups="drop"))
    """The objective."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each of the task's components, in place of those that the task gives."""
    micro_rows: int = 32
    """Rows in a micro-batch (memory only)."""
    samples_shown: int = 2
    """Completions of each step that are emitted as events: the best and the worst of a group."""


@dataclass
class OnlineHistory(RunHistory):
    sampled: int = 0  # tokens
    sampling_seconds: float = 0.0
    metrics: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # (progress, the table of the step)


class OnlineLoop(Run[OnlineConfig, OnlineHistory]):
    """`OnlineLoop(...).run()` improves the model on the task's training problems until the budget is spent."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, task: Task, config: OnlineConfig, *,
                 rewards: RewardSet | None = None, evaluate: Evaluate | None = None, checkpoint: str | Path | None = None,
                 resume_hint: str = "--resume"):
        if config.group < 2:
            raise BadInput(f"a group of {config.group} is not possible", "an advantage compares completions of one prompt",
                           "use --group 4 or more")
        if not config.temperature > 0 or min(config.prompts, config.updates, config.micro_rows) < 1:
            raise BadInput("prompts, updates and micro_rows are at least 1, and the temperature is above 0",
                           "samples of one prompt must be able to differ, and be trained on", "change the one that is not")
        _check_objective(config.objective)
        super().__init__(model, config, OnlineHistory(), evaluate=evaluate, checkpoint=checkpoint, tokenizer=tokenizer,
                         resume_hint=resume_hint)
        self.task = task
        self.rollouts = Rollouts(model, tokenizer, task, max_tokens=config.max_tokens,
                                 rewards=rewards or RewardSet([task_reward(task, config.weights)]))
        self.shown_groups: list[dict[str, Any]] = []  # the latest groups with rewards and advantages, for the report
        self.rng = random.Random(config.seed)
        self._next_show = 0.0
        # The reference is a copy of the GIVEN weights, never re-read from a file that may differ.
        self.reference = copy.deepcopy(model).requires_grad_(False).eval() if config.objective.beta else None

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self, progress: float) -> dict[str, float]:
        c, h, began = self.config, self.history, self.budget.elapsed
        groups, credit = self._collect()
        h.sampling_seconds += self.budget.elapsed - began
        numbers = self._rollout_numbers(groups, credit)
        if credit.skip:
            events.note(f"{c.stage}: no group of this step teaches anything; weights stay as they are")
        else:
            numbers |= self._update(groups, credit, progress)
        self.count()
        numbers["time/sampling"] = h.sampling_seconds / max(h.seconds, 1e-9)
        h.metrics.append((progress, numbers))
        self._show(groups, credit)
        return numbers

    def _collect(self) -> tuple[list[Group], Credit]:
        """Rollouts until at least half of `prompts` groups teach something, or `rounds` are spent."""
        c = self.config
        groups: list[Group] = []
        for _ in range(max(1, c.rounds)):
            problems = [self.task.sample(self.rng, "train") for _ in range(c.prompts)]
            groups += self.rollouts.groups(problems, c.group, c.temperature, self.rng.getrandbits(62))
            credit = self._credit(groups)
            if c.objective.dead_groups != "drop" or int(credit.live.sum()) * 2 >= c.prompts:
                break
        self.history.sampled += sum(len(s.tokens) for g in groups for s in g.samples)
        return groups, credit

    def _credit(self, groups: list[Group]) -> Credit:
        parts = components(groups)
        weights = {k: w for k, w in self.rollouts.rewards.weights.items() if k in parts}
        return assign_credit(parts, trained_lengths(groups), self.config.objective, weights=weights, truncated=truncated(groups))

    def _update(self, groups: list[Group], credit: Credit, progress: float) -> dict[str, float]:
        c = self.config
        live = [i for i, keep in enumerate(credit.live.tolist()) if keep]
        order = self.rng.sample(live, len(live))
        shares = [order[k :: c.updates] for k in range(c.updates)]
        batches = [Update(groups, credit, part, c.objective.empty, self.model.embed.weight.device) for part in shares
                   if bool(credit.lengths[part].any())]
        for batch in batches:
            batch.ref = batch.logprobs(self.reference, c.micro_rows, c.temperature) if self.reference else None
            batch.old = batch.logprobs(self.model, c.micro_rows, c.temperature) if c.updates > 1 else None
        parts, entropies, gaps, norms = [], [], [], []
        self.model.train()
        for batch in batches:
            def loss_fn(micro: slice, batch: Update = batch) -> Tensor:
                logp, entropy, where = batch.forward(self.model, micro, c.temperature, entropy=True)
                share, numbers = objective(
                    logp, pick(batch.old, where), pick(batch.ref, where), batch.advantages[where], batch.sequence[where],
                    c.objective, batch.counts)
                parts.append({k: v / len(batches) if not k.endswith("/max") else v for k, v in numbers.items()})
                entropies.append(entropy)
                gaps.append((logp.detach() if batch.old is None else batch.old[where], batch.sampler[where]))
                return share

            result = self.stepper.step(batch.micro(c.micro_rows), loss_fn, progress)
            norms.append(result.grad_norm)
        return (tables.merge(parts) | tables.entropy_table(torch.cat(entropies))
                | tables.engine_table(torch.cat([a for a, _ in gaps]), torch.cat([b for _, b in gaps]))
                | {"grad_norm": sum(norms) / len(norms), "lr": self.stepper.optimizer.lr})

    # --- what is shown ------------------------------------------------------------------------------------------------

    def _rollout_numbers(self, groups: list[Group], credit: Credit) -> dict[str, float]:
        parts = components(groups)
        weights = {k: w for k, w in self.rollouts.rewards.weights.items() if k in parts}
        known = {shown: float(parts[name].nanmean()) for shown, name in (("accuracy", "correct"), ("format", "format"))
                 if name in parts}
        right = parts["correct"] == 1 if "correct" in parts else credit.total > 0
        return (known | {"groups/live": float(credit.live.float().mean())}
                | tables.reward_table(parts, weights) | tables.advantage_table(credit.advantages[credit.live])
                | tables.length_table(trained_lengths(groups), truncated(groups), right)
                | tables.diversity_table([[tuple(s.tokens) for s in g.samples] for g in groups]))

    def _show(self, groups: list[Group], credit: Credit) -> None:
        if not self.config.samples_shown or not bool(credit.live.any()) or self.budget.progress < self._next_show:
            return
        self._next_show = self.budget.progress + 0.1  # ten times in a run: people read them
        i = int(credit.live.int().argmax())
        order = credit.total[i].argsort(descending=True).tolist()
        g = groups[i]
        self.shown_groups = [*self.shown_groups[-3:], {"prompt": g.problem.prompt, "step": self.history.steps, "samples": [
            {"completion": g.texts[j], "rewards": g.rewards[j], "advantage": float(credit.advantages[i, j])} for j in order]}]
        for j in [order[0], order[-1]][: self.config.samples_shown]:
            events.emit(events.SampleShown(self.config.stage, g.problem.prompt, g.texts[j], g.rewards[j]))

    # --- stop and go on -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        version, numbers, gauss = self.rng.getstate()
        return {"rng": [version, list(numbers), gauss], "groups": self.shown_groups, "next_show": self._next_show}

    def restore(self, state: dict[str, Any]) -> None:
        self.shown_groups, self._next_show = state.get("groups", []), state.get("next_show", 0.0)
        version, numbers, gauss = state["rng"]
        self.rng.setstate((version, tuple(numbers), gauss))


def _check_objective(cfg: ObjectiveConfig) -> None:
    """A choice that this loop does not feed is refused, not ignored."""
    lacks = {"advantage": cfg.by_token, "reward_beta": cfg.reward_beta > 0, "correction": cfg.correction != "none",
             "off_policy": cfg.off_policy is not None, "entropy_coef": cfg.entropy_coef > 0,
             "entropy_target": cfg.entropy_target is not None, "high_entropy": cfg.high_entropy < 1,
             "kl_target": cfg.kl_target is not None}
    for name, used in lacks.items():
        if used:
            raise BadInput(f"the online loop does not support {name}={getattr(cfg, name)!r} yet",
                           next="leave it out, or choose another objective")
