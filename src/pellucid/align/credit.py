"""From a scored rollout to what every completion and every token is worth, by the choices of `ObjectiveConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.align.advantages import gdpo_advantages, group_advantages, pass_at_k_advantages, whiten, whitening
from pellucid.align.aggregation import Counts, count
from pellucid.align.components import Components, graded, live_groups, total_reward
from pellucid.align.kl import kl_penalty
from pellucid.align.objective_config import ObjectiveConfig
from pellucid.align.returns import Layout, gae, returns_to_go, token_rewards
from pellucid.errors import BadInput


@dataclass(frozen=True)
class Credit:
    """What a scored rollout teaches. N prompts, G completions each."""

    advantages: Tensor
    """(N, G) float32; for `gae` and `returns` the score itself, which `token_advantages` spreads over the tokens"""
    total: Tensor
    """(N, G) float64, the weighted reward; NaN where nobody graded"""
    live: Tensor
    """(N,) bool, groups that enter the step; the others are dropped and may be sampled again"""
    lengths: Tensor
    """(N, G) int64, trained tokens of every completion; 0 where it is dropped or masked"""
    counts: Counts
    """normalisers of the step, for `objective`; add them over ranks"""
    skip: bool
    """nothing to learn: leave weights and optimizer state untouched, and say so"""
    factor: float = 1.0
    """what whitening multiplied the advantages with: as tasks saturate it grows, a hidden rise of the learning rate"""


def assign_credit(
    components: Components, lengths: Tensor, cfg: ObjectiveConfig, *,
    weights: Mapping[str, float] | None = None, truncated: Tensor | None = None, kl: Tensor | None = None,
) -> Credit:
    """From the scored rollout of a whole step to advantages, trained tokens and counts, by the choices of `cfg`.

    components: name -> (N, G). lengths: (N, G) sampled tokens; a completion of length 0 leaves the baseline.
    truncated: (N, G) bool, cut at the length limit; what happens to them is `cfg.truncated` (a masked completion
    keeps its reward in the baseline, so its siblings are judged against it).
    kl: (N, G) sum over the completion's tokens of `cfg.reward_kl`, for a KL penalty inside a reward that belongs to
    the completion: clip, then KL, then baseline, in this order.
    """
    if truncated is None:
        if cfg.truncated != "keep":
            raise BadInput(f"truncated={cfg.truncated!r} needs to know which completions were cut", next="pass truncated")
        truncated = torch.zeros_like(lengths, dtype=torch.bool)
    if cfg.truncated == "zero-reward":
        components = {name: r.masked_fill(truncated, 0.0) for name, r in components.items()}
    valid = lengths > 0
    total = total_reward(components, weights, cfg.missing)
    live = live_in(components, valid, cfg, weights)
    trained = valid & live[:, None]
    if cfg.by_token:  # nobody graded it, and no group stands in: a score of 0 would be a grade
        trained = trained & ~total.isnan()
    if cfg.truncated == "mask":
        trained = trained & ~truncated
    used = torch.where(trained, lengths, 0)
    raw = _raw_advantages(components, weights, _penalised(total, cfg, kl), valid, lengths, cfg)
    counted = valid & live[:, None] & ~total.isnan()
    advantages, factor = _whitened(raw, counted, torch.where(counted, used, 0), cfg)
    counts = count(used[live], cfg.empty)
    idle = not bool(advantages[trained].any()) and not cfg.entropy_coef and cfg.beta == 0
    skip = counts.tokens == 0 or (idle and not (cfg.by_token and cfg.reward_beta) and cfg.advantage != "gae")
    return Credit(advantages.float(), total, live, used, counts, skip, factor)


def live_in(components: Components, valid: Tensor, cfg: ObjectiveConfig, weights: Mapping[str, float] | None = None) -> Tensor:
    """Which groups enter the step, (N,) bool. valid: (N, G) completions that have tokens."""
    if cfg.dead_groups == "drop":
        return live_groups(components, cfg.live_on, weights, cfg.missing, valid)
    return torch.ones_like(valid[:, 0])


def token_advantages(
    values: Tensor, sequence: Tensor, cfg: ObjectiveConfig, *, old: Tensor | None = None, ref: Tensor | None = None,
    critic: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The advantage of every trained token of a whole step, (M,), and for `gae` the critic's targets, (M,).

    values: (S,), `Credit.advantages` of the completions that `sequence` (M,) names. old, ref: (M,), needed by a KL
    penalty in the reward of `gae` and `returns`. critic: (M,) values at the rollout, needed by `gae`.
    """
    if not cfg.by_token:
        return values[sequence], None
    kl = None
    if cfg.reward_beta:
        if old is None or ref is None:
            raise BadInput("a KL penalty in the reward needs old and ref log-probabilities", next="pass old and ref")
        kl = kl_penalty(old.detach().double(), ref.detach().double(), cfg.reward_kl)
    layout = Layout(sequence)
    rewards, mask = layout.rows(token_rewards(values.double(), sequence, kl, cfg.reward_beta)), layout.mask
    if cfg.advantage == "returns":
        advantages, targets = layout.flat(returns_to_go(rewards, mask, gamma=cfg.gamma)), None
    elif critic is None:
        raise BadInput("advantage='gae' needs the critic's values", next="pass critic, one value for every token")
    else:
        v = layout.rows(critic.detach().double())
        advantages, targets = map(layout.flat, gae(rewards, v, mask, gamma=cfg.gamma, lam=cfg.lam))
        targets = targets.float()
    return (whiten(advantages) if cfg.whiten == "token" else advantages).float(), targets


def _penalised(total: Tensor, cfg: ObjectiveConfig, kl: Tensor | None) -> Tensor:
    if cfg.reward_clip is not None:
        total = total.clamp(-cfg.reward_clip, cfg.reward_clip)
    if not cfg.reward_beta or cfg.by_token:
        return total
    if kl is None:
        raise BadInput("a KL penalty in the reward needs the KL of every completion", next="pass kl, (N, G)")
    return total - cfg.reward_beta * kl.detach().double()


def _raw_advantages(
    components: Components, weights: Mapping[str, float] | None, total: Tensor, valid: Tensor, lengths: Tensor,
    cfg: ObjectiveConfig,
) -> Tensor:
    """(N, G) float64, before batch normalisation."""
    if cfg.advantage == "gdpo":
        return gdpo_advantages(components, weights=weights, eps=cfg.eps, missing=cfg.missing, valid=valid)
    if cfg.advantage == "pass@k":
        return pass_at_k_advantages(total, scale=cfg.scale, eps=cfg.eps, valid=valid)
    if cfg.advantage == "group":
        return group_advantages(total, scale=cfg.scale, baseline=cfg.baseline, eps=cfg.eps, valid=valid, lengths=lengths)
    return graded(total, valid)[0] * valid


def _whitened(raw: Tensor, counted: Tensor, lengths: Tensor, cfg: ObjectiveConfig) -> tuple[Tensor, float]:
    """Batch normalisation over completions or tokens, and its factor. A group without difference keeps exactly 0."""
    if cfg.whiten == "none" or cfg.by_token:
        return raw, 1.0
    weight, how = (counted.long(), {"eps": cfg.eps, "eps_in": "std"}) if cfg.whiten == "sequence" else (
        lengths, {"eps": 1e-8, "eps_in": "variance"})
    informative = (raw != 0).any(1, keepdim=True)
    factor = float(whitening(raw, weight, **how)[1]) if bool(informative.any()) else 1.0  # type: ignore[arg-type]
    return torch.where(informative, whiten(raw, weight, **how), 0.0), factor  # type: ignore[arg-type]
