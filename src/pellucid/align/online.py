"""The online loop: roll out, grade, assign credit, update. Objectives are plugged in as data (`ObjectiveConfig`).

    problems -> G samples each -> reward components -> advantages of tokens -> packed rows -> objective -> optimizer steps
                                   (KL penalty, critic, GAE)                   `epochs` times, in `updates` mini-batches

Groups whose completions all earn the same teach nothing: with `dead_groups="drop"` they are left out before the update
(dynamic sampling, DAPO, arXiv 2503.14476), which also saves the time of their backward pass.

With `lag` = 1 a rollout is learned from one step after the weights that sampled it, and the next one is sampled while this one is
learned: see `sampling.py`. What changes is the importance ratio: without a `correction` it compares with the sampler itself; with one it
compares with the weights at the start of the step, and the correction stands for the way from the sampler to there (decoupled PPO,
arXiv 2505.24298).
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid import events
from pellucid.align import metrics as tables
from pellucid.align.aggregation import Counts, count
from pellucid.align.controllers import EntropyController, KLController
from pellucid.align.credit import Credit, assign_credit, token_advantages
from pellucid.align.critic import Critic, critic_of
from pellucid.align.kl import kl_penalty
from pellucid.align.objective import objective
from pellucid.align.objective_config import ObjectiveConfig
from pellucid.align.online_config import OnlineConfig, check_config
from pellucid.align.pending import Pending
from pellucid.align.policy_losses import high_entropy_tokens
from pellucid.align.reward_model import RewardModel
from pellucid.align.reward_sources import task_reward
from pellucid.align.rewards import RewardSet
from pellucid.align.rollout import (
    Group,
    Rollouts,
    TrainerState,
    dialogue_table,
    trained_lengths,
    truncated,
)
from pellucid.align.sampling import Sampling
from pellucid.align.seen import Seen
from pellucid.align.update import Experience, Update, pick
from pellucid.errors import BadInput
from pellucid.models.lora import merge_into, with_merged, without_adapters
from pellucid.nn import Decoder, MoE
from pellucid.nn.context import branching
from pellucid.nn.lora import adapted
from pellucid.tasks import Completion, Problem, Task
from pellucid.tokenizers import Tokenizer
from pellucid.train import Evaluate, Run, RunHistory
from pellucid.train.loss import balance_share, routing_of
from pellucid.train.ranks import ALONE, Ranks


@dataclass
class OnlineHistory(RunHistory):
    sampled: int = 0  # tokens
    sampling_seconds: float = 0.0
    waiting_seconds: float = 0.0  # for samples
    metrics: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # (progress, the table of the step)


class OnlineLoop(Run[OnlineConfig, OnlineHistory]):
    """`OnlineLoop(...).run()` improves the model on the task's training problems until the budget is spent.

    critic: a reward model that the critic starts from; by default a copy of the policy whose values are 0.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, task: Task, config: OnlineConfig, *,
                 rewards: RewardSet | None = None, evaluate: Evaluate | None = None, checkpoint: str | Path | None = None,
                 critic: RewardModel | None = None, resume_hint: str = "--resume", ranks: Ranks = ALONE):
        check_config(config)
        super().__init__(model, config, OnlineHistory(), evaluate=evaluate, checkpoint=checkpoint, tokenizer=tokenizer,
                         resume_hint=resume_hint, ranks=ranks)
        cfg = config.objective
        if config.prompts < ranks.size:
            raise BadInput(f"{ranks.size} processes share {config.prompts} prompts", "each of them samples at least one",
                           "use more --prompts, or fewer processes")
        if any(isinstance(layer.ffn, MoE) for layer in model.spec.layers):
            events.note("experts are chosen anew in the update: where the sampler rounds differently, a token may go to others than it was "
                        "sampled with (engine/gap_max shows it; --set correction=truncate corrects for it)")
        self.task = task
        self.adapted = bool(adapted(model))
        self.plain = with_merged(model) if self.adapted else model  # samples: the engine reads weights, not adapters
        self.rollouts = Rollouts(self.plain, tokenizer, task, max_tokens=config.max_tokens, top_p=config.top_p, top_k=config.top_k,
                                 rewards=rewards or RewardSet([task_reward(task, config.weights)]))
        self.rollouts.state = TrainerState(self)
        self.sampling = Sampling(self.rollouts, task, config, ranks, copy=not self.adapted)
        self.shown_groups: list[dict[str, Any]] = []  # the latest groups with rewards and advantages, for the report
        self.latest: tuple[list[Group], Credit, Experience] | None = None  # what the latest step learned from
        self._next_show = 0.0
        self.beta = KLController(cfg.beta, cfg.kl_target, cfg.kl_horizon)
        self.reward_beta = KLController(cfg.reward_beta, cfg.kl_target, cfg.kl_horizon)
        self.bonus = EntropyController(cfg.entropy_coef, cfg.entropy_target)
        self.reference = self._reference() if cfg.needs_reference else None
        self.critic = None
        if cfg.advantage == "gae":
            self.critic = Critic(critic or critic_of(self.plain), config.critic or config.optim, config.schedule, config.clip, ranks)

    def _reference(self) -> Decoder:
        """A copy of the GIVEN weights, never re-read from a file that may differ; with adapters, the model without them."""
        if self.adapted:
            return without_adapters(self.model)
        return copy.deepcopy(self.model).requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    def resolved(self) -> ObjectiveConfig:
        """The objective with the coefficients that the controllers hold now."""
        return replace(self.config.objective, beta=self.beta.value, reward_beta=self.reward_beta.value,
                       entropy_coef=self.bonus.coefficient)

    @property
    def share(self) -> bool:
        """Whether a group's prompt is computed once in the update: all models that read the rows must be able to."""
        models = [self.model, self.reference, None if self.critic is None else self.critic.model]
        return all(branching(m.spec) is None for m in models if m is not None)

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self, progress: float) -> dict[str, float]:
        h, steps = self.history, self.budget.steps
        with self.sampling.step(steps - self.budget.done if steps else self.config.lag + 1, h) as rollout:
            numbers = self._learn(rollout, progress)
        if self.adapted:
            merge_into(self.plain, self.model)
        self.count()
        numbers["time/sampling"] = h.sampling_seconds / max(h.seconds, 1e-9)
        if self.sampling.overlap:
            numbers["time/waiting"] = h.waiting_seconds / max(h.seconds, 1e-9)
        h.metrics.append((progress, numbers))
        assert self.latest is not None
        self._show(*self.latest)
        return numbers

    def _learn(self, rollout: Pending, progress: float) -> dict[str, float]:
        """One rollout: what it is worth, and the optimizer steps on it."""
        c, began, groups, cfg = self.config, time.perf_counter(), rollout.groups, self.resolved()
        x, credit = self._judge(groups, cfg)
        numbers = self._rollout_numbers(rollout, credit, x)
        if credit.skip:
            events.note(f"{c.stage}: no group of this step teaches anything; weights stay as they are")
        else:
            numbers |= self._update(x, credit, cfg, progress)
        learned = c.epochs * credit.counts.tokens if not credit.skip else 0
        numbers |= tables.cost_table(rollout.tokens, rollout.seconds, learned, time.perf_counter() - began, self.device)
        self.latest = (groups, credit, x)
        return numbers

    def groups(self, problems: Sequence[Problem], n: int, temperature: float, seed: int) -> list[Group]:
        """n graded completions of each problem; of several processes each samples and grades its share of the problems."""
        return self.sampling.groups(problems, n, temperature, seed)

    def for_evaluation(self, seed: int) -> Callable[[list[Problem], int, float], list[list[Completion]]]:
        """The `generate` that `tasks.evaluate` asks for, likewise shared."""
        return self.sampling.for_evaluation(seed)

    # --- from rewards to what every token is worth ----------------------------------------------------------------------

    def _judge(self, groups: list[Group], cfg: ObjectiveConfig) -> tuple[Experience, Credit]:
        """Everything that is measured before the first optimizer step on a rollout."""
        x = Experience(groups, self.sampling.live(groups).nonzero().flatten().tolist(), self.device, self.share)
        kl = None
        if in_total := cfg.reward_beta > 0 and not cfg.by_token:
            self._measure(x, list(range(len(x.samples))), cfg)  # of masked completions too: they stay in the baseline
            kl = self._kl_of_completions(x, cfg, groups)
        credit = assign_credit(self.sampling.components(groups), trained_lengths(groups), cfg, weights=self.sampling.weights(groups),
                               truncated=truncated(groups), kl=kl)
        trained = [k for k, (i, j) in enumerate(x.places) if credit.lengths[i, j] > 0]
        if not credit.skip:
            if not in_total:
                self._measure(x, trained, cfg)
            self._spread(x, credit, trained, cfg)
        return x, credit

    def _measure(self, x: Experience, chosen: list[int], cfg: ObjectiveConfig) -> None:
        """Log-probabilities under the policy as it is and under the reference, entropies and values, of these completions."""
        c = self.config
        update = Update(x, chosen, Counts(0, 0))
        itself = c.lag > 0 and cfg.correction == "none"  # the ratio compares with the sampler
        if cfg.high_entropy < 1 or (not itself and (cfg.reward_beta > 0 or c.epochs * c.updates > 1)):
            x.old, *x.entropy = update.logprobs(self.model, c.micro_rows, c.temperature, cfg.high_entropy < 1, self.ranks)
        if itself:
            x.old = x.sampler
        if self.reference is not None:
            x.ref = update.logprobs(self.reference, c.micro_rows, c.temperature, ranks=self.ranks)[0]
        if self.critic is not None:
            x.values = self.critic.values(update, c.micro_rows)

    @staticmethod
    def _kl_of_completions(x: Experience, cfg: ObjectiveConfig, groups: list[Group]) -> Tensor:
        """(N, G) sums over the tokens; 0 where a group was dropped."""
        assert x.old is not None and x.ref is not None
        tokens = kl_penalty(x.old.double(), x.ref.double(), cfg.reward_kl)
        sums = torch.zeros(len(x.samples), dtype=torch.float64, device=x.device).index_add(0, x.sequence, tokens)
        kl = torch.zeros(len(groups), len(groups[0].samples), dtype=torch.float64)
        for (i, j), value in zip(x.places, sums.tolist()):
            kl[i, j] = value
        return kl

    def _spread(self, x: Experience, credit: Credit, trained: list[int], cfg: ObjectiveConfig) -> None:
        """Advantages, the critic's targets and the tokens that learn, at the tokens of the trained completions."""
        tokens, whose = x.of(trained)
        worth = torch.tensor([float(credit.advantages[x.places[k]]) for k in trained], device=x.device)
        advantages, returns = token_advantages(worth, whose, cfg, old=pick(x.old, tokens), ref=pick(x.ref, tokens),
                                               critic=pick(x.values, tokens))
        x.advantages[tokens] = advantages
        if returns is not None:
            x.returns = torch.full_like(x.advantages, torch.nan)
            x.returns[tokens] = returns
        if cfg.high_entropy < 1:
            x.keep = torch.zeros(x.tokens, dtype=torch.bool, device=x.device)
            x.keep[tokens] = high_entropy_tokens(x.entropy[0][tokens], cfg.high_entropy)

    # --- from there to weights ------------------------------------------------------------------------------------------

    def _update(self, x: Experience, credit: Credit, cfg: ObjectiveConfig, progress: float) -> dict[str, float]:
        c = self.config
        live = credit.live.nonzero().flatten().tolist()
        old = x.old if c.epochs * c.updates > 1 or c.lag else None  # None: the policy itself, a ratio of exactly 1
        seen = Seen(self.ranks)
        self.model.train()
        for epoch in range(c.epochs):
            order = self._order(live, epoch)
            for part in (order[k :: c.updates] for k in range(c.updates)):
                chosen = [x.number[i, j] for i in part for j in range(credit.lengths.shape[1]) if credit.lengths[i, j] > 0]
                if chosen:
                    batch = Update(x, chosen, count(credit.lengths[part].flatten(), cfg.empty))
                    self._one_update(batch, old, cfg, progress, seen)
        seen.gather()
        numbers = seen.table() | seen.corrections(x, cfg) | {"lr": self.stepper.optimizer.lr, "update/skipped": float(self.stepper.skipped)}
        return numbers | self._controlled(x, credit, numbers)

    def _order(self, live: list[int], epoch: int) -> list[int]:
        """The groups in the order of a pass. Its random numbers are its own: those of the problems are drawn beside the update."""
        return random.Random(f"order {self.config.seed} {self.history.steps} {epoch}").sample(live, len(live))

    def _one_update(self, batch: Update, old: Tensor | None, cfg: ObjectiveConfig, progress: float, seen: Seen) -> None:
        """One optimizer step of the policy, and of the critic if there is one."""
        c, x, bonus = self.config, batch.experience, cfg.entropy_coef > 0
        parts = []

        def share(micro: slice) -> Tensor:
            routing = routing_of(self.model)
            logp, entropy, whose, at = batch.forward(self.model, micro, c.temperature, entropy=True, bonus=bonus, routing=routing)
            loss, numbers = objective(logp, pick(old, at), pick(x.ref, at), x.advantages[at], whose, cfg, batch.counts,
                                      sampler=x.sampler[at], entropy=entropy if bonus else None, keep=pick(x.keep, at))
            parts.append(numbers)
            assert entropy is not None
            seen.add(at=at, entropy=entropy.detach(), trainer=logp.detach() if x.old is None else x.old[at], sampler=x.sampler[at])
            return loss + balance_share(routing, len(at) / max(batch.counts.tokens, 1))

        result = self.stepper.step(batch.micro(c.micro_rows, self.ranks), share, progress)
        seen.steps.append(tables.merge(self.ranks.gathered(tables.merge(parts))) | {"grad_norm": result.grad_norm, "update/ratio": result.ratio})
        if self.critic is not None:
            seen.critic.append(self.critic.step(batch, c.micro_rows, progress, coefficient=cfg.value_coef, clip=cfg.value_clip))
            seen.value_clip = cfg.value_clip

    def _controlled(self, x: Experience, credit: Credit, numbers: dict[str, float]) -> dict[str, float]:
        """Lets the coefficients follow what was measured; they act in the next step."""
        shown = {}
        if x.ref is not None:
            kl = numbers["kl/ref_k3"]  # never negative: k1 of a few hundred tokens would send the coefficient down as often as up
            shown = {"kl/coefficient": self.beta.value or self.reward_beta.value}
            self.beta.update(kl, credit.counts.sequences)
            self.reward_beta.update(kl, credit.counts.sequences)
        if self.config.objective.entropy_coef or self.bonus.target is not None:
            shown["entropy/coefficient"] = self.bonus.coefficient
        self.bonus.update(numbers["entropy/mean"])
        return shown

    # --- what is shown ------------------------------------------------------------------------------------------------

    def _rollout_numbers(self, rollout: Pending, credit: Credit, x: Experience) -> dict[str, float]:
        groups = rollout.groups
        parts = self.sampling.components(groups)
        known = {shown: float(parts[name].nanmean()) for shown, name in (("accuracy", "correct"), ("format", "format"))
                 if name in parts}
        right = parts["correct"] == 1 if "correct" in parts else credit.total > 0
        worth = x.advantages if self.config.objective.by_token else credit.advantages[credit.live]
        return (known | {"accuracy/any": float(right.any(1).double().mean()), "groups/live": float(credit.live.float().mean()),
                         "groups/sampled": float(len(groups))}
                | tables.reward_table(parts, self.sampling.weights(groups)) | tables.advantage_table(worth, credit.factor)
                | tables.length_table(trained_lengths(groups), truncated(groups), right)
                | tables.diversity_table([[tuple(s.tokens) for s in g.samples] for g in groups])
                | dialogue_table(groups) | rollout.metrics
                | ({"staleness/steps": float(self.history.steps - rollout.step)} if self.config.lag else {}))

    def _show(self, groups: list[Group], credit: Credit, x: Experience) -> None:
        if not self.config.samples_shown or not bool(credit.live.any()) or self.budget.progress < self._next_show:
            return
        self._next_show = self.budget.progress + 0.1  # ten times in a run: people read them
        i = int(credit.live.int().argmax())
        order = credit.total[i].argsort(descending=True).tolist()
        g = groups[i]
        self.shown_groups = [*self.shown_groups[-3:], {"prompt": g.problem.prompt, "step": self.history.steps, "samples": [
            {"completion": g.texts[j], "rewards": g.rewards[j], "advantage": self._worth(credit, x, i, j)} for j in order]}]
        for j in [order[0], order[-1]][: self.config.samples_shown]:
            events.emit(events.SampleShown(self.config.stage, g.problem.prompt, g.texts[j], g.rewards[j]))

    def _worth(self, credit: Credit, x: Experience, i: int, j: int) -> float:
        """A completion's advantage; the mean over its tokens where they differ."""
        if not self.config.objective.by_token:
            return float(credit.advantages[i, j])
        return float(x.advantages[x.sequence == x.number[i, j]].mean()) if (i, j) in x.number else 0.0

    # --- stop and go on -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return self.sampling.state() | {
            "groups": self.shown_groups, "next_show": self._next_show,
            "controllers": {name: getattr(self, name).state() for name in ("beta", "reward_beta", "bonus")}}

    def restore(self, state: dict[str, Any]) -> None:
        self.shown_groups, self._next_show = state.get("groups", []), state.get("next_show", 0.0)
        for name, saved in state.get("controllers", {}).items():
            setattr(self, name, type(getattr(self, name))(**saved))
        self.sampling.restore(state)

    def write(self, folder: Path) -> None:
        super().write(folder)
        if self.critic is not None:
            self.critic.write(folder)

    def read(self, folder: Path) -> None:
        super().read(folder)
        if self.adapted:
            merge_into(self.plain, self.model)
        if self.critic is not None:
            self.critic.restore(folder)
