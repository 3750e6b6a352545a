"""The online objective: log-probabilities and advantages in, one loss out. No model, no loop, no globals.

    loss = sum over tokens of weight * ( correction * policy term + beta * KL term )  -  c_H * mean entropy

`ObjectiveConfig` holds every choice that changes a number, `formula` prints what was chosen, `objective` computes it.
A loop over rollouts needs nothing else; another member of the family is another value of a field.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.align.aggregation import Counts, count, token_weights
from pellucid.align.corrections import importance_weights, off_policy_mask
from pellucid.align.kl import kl_penalty
from pellucid.align.metrics import shift_shares
from pellucid.align.objective_config import ObjectiveConfig
from pellucid.align.policy_losses import cispo, clipped_surrogate, gmpo_log_ratio, log_ratio, reinforce, sapo
from pellucid.errors import BadInput


def objective(
    logp: Tensor, old: Tensor | None, ref: Tensor | None, advantages: Tensor, sequence: Tensor,
    cfg: ObjectiveConfig, counts: Counts, *, sampler: Tensor | None = None, entropy: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the step's loss (scalar, differentiable in `logp`), and its shares of the metrics.

    logp, old, ref: log-probabilities of the sampled tokens under the current, the rollout's and the reference policy,
      all at the sampling temperature, (M,): the trained tokens of several completions laid end to end. old=None means
      on-policy: the ratio is exactly 1 and still carries the gradient. ref is needed only if beta > 0.
    advantages: (M,), by token (or that of its completion). sequence: (M,) int64, its completion, ids from 0;
      every completion lies whole in this call. counts: of the WHOLE step (`aggregation.count`).
    sampler: (M,) log-probabilities that the engine reported, needed by `correction` and `off_policy`.
    entropy: (M,) of the next-token distributions, WITH gradient, needed by `entropy_coef`.
    keep: (M,) bool, tokens that the policy term trains (`high_entropy_tokens` of the whole step); all by default.
    Losses and metrics of micro-batches and ranks are added (`metrics.merge`: keys that end in `/max` take the maximum).
    """
    _check_given(logp, cfg, ref=ref, sampler=sampler, entropy=entropy, keep=keep, old=old, advantages=advantages,
                 sequence=sequence)
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    advantages = advantages.to(logp.dtype)
    old = logp.detach() if old is None else old.detach().to(logp.dtype)
    ref = None if ref is None else ref.detach().to(logp.dtype)
    log_r, ratio, token_loss = policy_term(logp, old, advantages, sequence, cfg)
    factor = policy_factor(logp, old, advantages, sequence, cfg, sampler, keep)
    if factor is not None:
        token_loss = token_loss * factor
    if cfg.beta and ref is not None:
        token_loss = token_loss + cfg.beta * kl_penalty(logp, ref, cfg.kl, ratio=ratio, bound=cfg.kl_bound)
    loss = (token_loss * token_weights(sequence, cfg.aggregation, counts, cfg.max_tokens)).sum()
    if cfg.entropy_coef and entropy is not None:
        loss = loss - cfg.entropy_coef * entropy.to(logp.dtype).sum() / max(counts.tokens, 1)
    metrics = shift_shares(logp.detach(), old, ref, advantages, ratio.detach(), log_r.detach(), counts.tokens, cfg, factor)
    return loss, metrics


def policy_term(
    logp: Tensor, old: Tensor, advantages: Tensor, sequence: Tensor, cfg: ObjectiveConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """log ratio (unbounded), ratio and policy loss at every token, (M,) each, by `cfg.policy`."""
    log_r = log_ratio(logp, old, sequence, cfg.ratio)
    ratio = (log_r if cfg.log_ratio_bound is None else log_r.clamp(-cfg.log_ratio_bound, cfg.log_ratio_bound)).exp()
    clip = {"low": cfg.clip_low, "high": cfg.clip_high}
    if cfg.policy == "cispo":
        return log_r, ratio, cispo(ratio, logp, advantages, **clip)
    if cfg.policy == "sapo":
        return log_r, ratio, sapo(ratio, advantages, tau_pos=cfg.tau_pos, tau_neg=cfg.tau_neg)
    if cfg.policy == "gmpo":
        return log_r, ratio, -advantages * gmpo_log_ratio(log_r, advantages, sequence, **clip).exp()
    if cfg.policy == "reinforce":
        return log_r, ratio, reinforce(logp, advantages)
    return log_r, ratio, clipped_surrogate(ratio, advantages, **clip, delta=cfg.delta)


def policy_factor(
    logp: Tensor, old: Tensor, advantages: Tensor, sequence: Tensor, cfg: ObjectiveConfig, sampler: Tensor | None,
    keep: Tensor | None,
) -> Tensor | None:
    """What multiplies the policy term (never the KL term), (M,), detached; None: nothing does."""
    factor = None
    if cfg.correction != "none" and sampler is not None:
        factor = importance_weights(old, sampler.to(logp.dtype), sequence, level=cfg.correction_level, mode=cfg.correction,
                                    low=cfg.correction_low, high=cfg.correction_high)
    if cfg.off_policy is not None and sampler is not None:
        stays = off_policy_mask(logp, sampler.to(logp.dtype), advantages, sequence, cfg.off_policy).to(logp.dtype)
        factor = stays if factor is None else factor * stays
    if keep is not None:
        factor = keep.to(logp.dtype) if factor is None else factor * keep
    return factor


def objective_padded(
    logp: Tensor, old: Tensor | None, ref: Tensor | None, advantages: Tensor, mask: Tensor,
    cfg: ObjectiveConfig, counts: Counts | None = None, *, sampler: Tensor | None = None, entropy: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`objective` on padded rows: one completion per row, (B, T) tensors, mask (B, T) True at trained tokens.

    advantages: (B,) or (B, T). counts=None: these rows are the whole step. What stands at masked positions, NaN
    included, has no effect on loss, metrics or gradient.
    """
    on = mask.bool()
    if counts is None:
        counts = count(on.sum(dim=1), cfg.empty)
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand(on.shape)
    row = torch.arange(on.shape[0], device=on.device)[:, None].expand(on.shape)
    old, ref, sampler, entropy, keep = (None if x is None else x[on] for x in (old, ref, sampler, entropy, keep))
    return objective(logp[on], old, ref, advantages[on], row[on], cfg, counts, sampler=sampler, entropy=entropy, keep=keep)


def _check_given(logp: Tensor, cfg: ObjectiveConfig, **given: Tensor | None) -> None:
    shapes = {name: tuple(x.shape) for name, x in {"logp": logp, **given}.items() if x is not None}
    if logp.ndim != 1 or len(set(shapes.values())) > 1:
        raise BadInput(f"objective: tensors must share one shape (M,), got {shapes}")
    needs = {
        "ref": (cfg.beta > 0, f"beta={cfg.beta:g} needs the reference policy's log-probabilities"),
        "sampler": (cfg.correction != "none" or cfg.off_policy is not None,
                    "correction and off_policy need the sampler's log-probabilities"),
        "entropy": (cfg.entropy_coef > 0, f"entropy_coef={cfg.entropy_coef:g} needs the entropies, with their gradient"),
        "keep": (cfg.high_entropy < 1, f"high_entropy={cfg.high_entropy:g} needs the tokens of the whole step that it keeps"),
    }
    for name, (needed, why) in needs.items():
        if needed and given.get(name) is None:
            raise BadInput(f"objective: {why}", next=f"pass {name}, or leave the choice out")
    entropy = given.get("entropy")
    if cfg.entropy_coef and entropy is not None and logp.requires_grad and not entropy.requires_grad:
        raise BadInput("objective: the entropies carry no gradient", "a bonus on them would change nothing",
                       "compute them with gradient (`pellucid.align.head.entropies`)")
