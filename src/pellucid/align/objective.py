"""The online objective: log-probabilities and advantages in, one loss out. No model, no loop, no globals.

    loss = sum over tokens of weight * ( policy term + beta * KL term )

`ObjectiveConfig` holds every choice that changes a number, `formula` prints what was chosen, `objective` computes it.
A loop over rollouts needs nothing else; another member of the family is another value of a field.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor

from pellucid.align.advantages import Baseline, Missing, Scale
from pellucid.align.aggregation import Aggregation, Counts, Empty, count, token_weights
from pellucid.align.kl import Estimator, kl_penalty
from pellucid.align.metrics import shift_shares
from pellucid.align.policy_losses import RatioLevel, clipped_surrogate, log_ratio
from pellucid.errors import BadInput, nearest

_COUNTS_SEQUENCES = ("sequence-mean", "token-mean-local", "constant", "sequence-sum")
DeadGroups = Literal["keep", "drop"]
Truncated = Literal["keep", "mask", "zero-reward"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Every choice of the objective that changes a number. Impossible or unused combinations raise BadInput."""

    scale: Scale = "group"
    """what centred rewards are divided by: std of the group, std of the batch, or nothing"""
    baseline: Baseline = "mean"
    """what is subtracted from a reward: the group's mean, or the mean of the other completions"""
    eps: float = 1e-4
    """added to the standard deviation"""
    missing: Missing = "zero"
    """a reward component that nobody graded: adds zero, excludes the completion, or is refused"""
    dead_groups: DeadGroups = "keep"
    """groups whose rewards do not differ: keep them in the counts (and in the KL term), or drop them"""
    live_on: str = "any"
    """what must differ for a group to be live: any component, the total, or the component of this name"""
    truncated: Truncated = "keep"
    """completions cut at the length limit: keep, mask out of the loss, or give reward zero"""
    ratio: RatioLevel = "token"
    """importance ratio of the token, of the whole completion (GSPO), or its token form"""
    clip_low: float = 0.2
    """the ratio is clipped below 1 - clip_low"""
    clip_high: float = 0.2
    """the ratio is clipped above 1 + clip_high"""
    delta: float | None = None
    """cap on the unclipped ratio (two-sided clipping); none by default"""
    log_ratio_bound: float | None = None
    """bound on |log ratio| before exp, so that a runaway token cannot overflow; none by default"""
    beta: float = 0.0
    """weight of the KL term; 0 means no reference model is needed"""
    kl: Estimator = "k3-corrected"
    """estimator of KL(policy || reference) in the loss"""
    kl_bound: float | None = None
    """bound on |log p - log p_ref| inside the KL term; none by default"""
    aggregation: Aggregation = "sequence-mean"
    """how the losses of tokens become the loss of a step"""
    max_tokens: int | None = None
    """the constant of the "constant" aggregation: the longest completion that sampling allows"""
    empty: Empty = "exclude"
    """completions without a trained token: excluded from the sequence count, or counted as zeros"""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_numbers(self)
        _check_unused(self)


def objective(
    logp: Tensor, old: Tensor | None, ref: Tensor | None, advantages: Tensor, sequence: Tensor,
    cfg: ObjectiveConfig, counts: Counts,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the step's loss (scalar, differentiable in `logp`), and its shares of the metrics.

    logp, old, ref: log-probabilities of the sampled tokens under the current, the sampling and the reference policy,
      all at the sampling temperature, (M,): the trained tokens of several completions laid end to end. old=None means
      on-policy: the ratio is exactly 1 and still carries the gradient. ref is needed only if beta > 0.
    advantages: (M,), the advantage of each token's completion. sequence: (M,) int64, its completion, ids from 0;
      every completion lies whole in this call. counts: of the WHOLE step (`aggregation.count`).
    Losses and metrics of micro-batches and ranks are added (`metrics.merge`: keys that end in `/max` take the maximum).
    """
    _check_shapes(logp, old, ref, advantages, sequence, cfg)
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    advantages = advantages.to(logp.dtype)
    old = logp.detach() if old is None else old.detach().to(logp.dtype)
    ref = None if ref is None else ref.detach().to(logp.dtype)
    log_r = log_ratio(logp, old, sequence, cfg.ratio)
    bounded = log_r if cfg.log_ratio_bound is None else log_r.clamp(-cfg.log_ratio_bound, cfg.log_ratio_bound)
    ratio = bounded.exp()
    token_loss = clipped_surrogate(ratio, advantages, low=cfg.clip_low, high=cfg.clip_high, delta=cfg.delta)
    if cfg.beta and ref is not None:
        token_loss = token_loss + cfg.beta * kl_penalty(logp, ref, cfg.kl, ratio=ratio, bound=cfg.kl_bound)
    loss = (token_loss * token_weights(sequence, cfg.aggregation, counts, cfg.max_tokens)).sum()
    metrics = shift_shares(
        logp.detach(), old, ref, advantages, ratio.detach(), log_r.detach(), counts.tokens, low=cfg.clip_low,
        high=cfg.clip_high, delta=cfg.delta, log_ratio_bound=cfg.log_ratio_bound, kl_bound=cfg.kl_bound,
    )
    return loss, metrics


def objective_padded(
    logp: Tensor, old: Tensor | None, ref: Tensor | None, advantages: Tensor, mask: Tensor,
    cfg: ObjectiveConfig, counts: Counts | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`objective` on padded rows: one completion per row, (B, T) tensors, mask (B, T) True at trained tokens.

    advantages: (B,) or (B, T). counts=None: these rows are the whole step. What stands at masked positions, NaN
    included, has no effect on loss, metrics or gradient.
    """
    keep = mask.bool()
    if counts is None:
        counts = count(keep.sum(dim=1), cfg.empty)
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand(keep.shape)
    row = torch.arange(keep.shape[0], device=keep.device)[:, None].expand(keep.shape)
    old, ref = (None if x is None else x[keep] for x in (old, ref))
    return objective(logp[keep], old, ref, advantages[keep], row[keep], cfg, counts)


def formula(cfg: ObjectiveConfig) -> str:
    """The resolved objective as a formula in plain text, every choice visible, with notes on known traps.

    >>> print(formula(ObjectiveConfig(clip_high=0.28)))
    minimise  1/N_seq Σ_i 1/|o_i| Σ_t [ -min(r A, clip(r, 0.8, 1.28) A) ]
    r  = p(o_it) / p_old(o_it)
    A  = (R_i - mean_group R) / (std_group R + 0.0001), n - 1 in std; exactly 0 where the group's R are equal
    R  = weighted sum of the reward components; one that nobody graded adds 0
    groups without difference: counted · truncated completions: counted · completions without tokens: not counted
    """
    lines = [f"minimise  {_outer(cfg)} [ {_policy(cfg)}{f' + {cfg.beta:g} KL' if cfg.beta else ''} ]",
             f"r  = {_ratio(cfg)}", f"A  = {_advantage(cfg)}"]
    if cfg.beta:
        bound = f", |d| <= {cfg.kl_bound:g}" if cfg.kl_bound else ""
        lines.append(f"KL = {_KL_TEXT[cfg.kl]}, d = log p_ref - log p{bound}")
    dead = {"keep": "counted", "drop": f"dropped (must differ: {cfg.live_on})"}[cfg.dead_groups]
    cut = {"keep": "counted", "mask": "masked out of the loss", "zero-reward": "counted, with R = 0"}[cfg.truncated]
    empty = {"exclude": "not counted", "count": "counted as 0"}[cfg.empty]
    lines.append(f"R  = weighted sum of the reward components; one that nobody graded {_MISSING_TEXT[cfg.missing]}")
    lines.append(f"groups without difference: {dead} · truncated completions: {cut}"
                 + (f" · completions without tokens: {empty}" if cfg.aggregation in _COUNTS_SEQUENCES else ""))
    return "\n".join(lines + [f"note: {note}" for note in notes(cfg)])


def notes(cfg: ObjectiveConfig) -> list[str]:
    """Known traps of this combination of choices, one sentence each."""
    found = []
    if cfg.ratio != "token" and cfg.aggregation not in ("sequence-mean", "sequence-sum"):
        found.append(f"a sequence ratio with {cfg.aggregation} weighs completions by length; GSPO uses sequence-mean")
    if cfg.aggregation == "constant" and cfg.scale != "none":
        found.append("a constant normaliser with a divided advantage is half of Dr. GRPO; it also has scale='none'")
    if cfg.aggregation == "token-mean-local":
        found.append("token-mean-local depends on how the step is cut into micro-batches")
    if cfg.beta and cfg.kl in ("k1", "k3"):
        found.append({"k1": "the mean gradient of k1 as a loss is zero: it does not hold the policy back",
                      "k3": "the gradient of k3 as a loss is that of KL(ref || p), not of KL(p || ref)"}[cfg.kl])
    if cfg.beta and cfg.dead_groups == "keep":
        found.append("groups without difference still give a KL gradient")
    return found


def _outer(cfg: ObjectiveConfig) -> str:
    return {"sequence-mean": "1/N_seq Σ_i 1/|o_i| Σ_t", "token-mean": "1/N_tok Σ_i Σ_t",
            "token-mean-local": "Σ_micro-batches n_seq/N_seq 1/n_tok Σ_i Σ_t", "constant": f"1/(N_seq * {cfg.max_tokens}) Σ_i Σ_t",
            "sequence-sum": "1/N_seq Σ_i Σ_t", "token-sum": "Σ_i Σ_t"}[cfg.aggregation]


def _policy(cfg: ObjectiveConfig) -> str:
    free = "r" if cfg.delta is None else f"min(r, {cfg.delta:g})"
    return f"-min({free} A, clip(r, {1 - cfg.clip_low:g}, {1 + cfg.clip_high:g}) A)"


def _ratio(cfg: ObjectiveConfig) -> str:
    text = {"token": "p(o_it) / p_old(o_it)", "sequence": "(p(o_i) / p_old(o_i))^(1/|o_i|)",
            "sequence-token": "sg[(p(o_i) / p_old(o_i))^(1/|o_i|)] * p(o_it) / sg[p(o_it)]"}[cfg.ratio]
    return text + (f", |log r| <= {cfg.log_ratio_bound:g}" if cfg.log_ratio_bound else "")


def _advantage(cfg: ObjectiveConfig) -> str:
    centred = {"mean": "R_i - mean_group R", "leave-one-out": "R_i - mean_others R"}[cfg.baseline]
    if cfg.scale != "none":
        centred = f"({centred}) / (std_{cfg.scale} R + {cfg.eps:g}), n - 1 in std"
    return f"{centred}; exactly 0 where the group's R are equal"


_KL_TEXT = {
    "k1": "-d (k1)", "abs": "|d|", "k2": "d^2 / 2 (k2)", "k3": "e^d - d - 1 (k3)",
    "k3+": "sg[e^d - d - 1] with the gradient of d^2 / 2 (k3+)", "k3-corrected": "r (e^d - d - 1) (k3-corrected)",
}
_MISSING_TEXT = {"zero": "adds 0", "exclude": "takes the completion out of the baseline, with A = 0",
                 "refuse": "is an error"}


# --- what a configuration may not say ---------------------------------------------------------------------------------


def _check_choices(cfg: ObjectiveConfig) -> None:
    for name, kind in get_type_hints(ObjectiveConfig).items():
        choices, value = [c for c in get_args(kind) if isinstance(c, str)], getattr(cfg, name)
        if choices and value not in choices:
            raise BadInput(f"objective: {name}={value!r} is not a choice{nearest(str(value), choices)}",
                           next=f"use one of {', '.join(choices)}")


def _check_numbers(cfg: ObjectiveConfig) -> None:
    wrong = ""
    if min(cfg.clip_low, cfg.clip_high, cfg.beta, cfg.eps) < 0:
        wrong = "clip_low, clip_high, beta and eps are not negative"
    elif cfg.delta is not None and cfg.delta <= 1 + cfg.clip_high:
        wrong = f"delta={cfg.delta:g} must exceed 1 + clip_high = {1 + cfg.clip_high:g}, or it overrules the clip"
    elif any(x is not None and x <= 0 for x in (cfg.max_tokens, cfg.log_ratio_bound, cfg.kl_bound)):
        wrong = "max_tokens, log_ratio_bound and kl_bound are positive"
    elif cfg.aggregation == "constant" and cfg.max_tokens is None:
        wrong = "the constant aggregation needs max_tokens, the longest completion that sampling allows"
    if wrong:
        raise BadInput(f"objective: {wrong}", next="change the value named above")


def _check_unused(cfg: ObjectiveConfig) -> None:
    """A choice that would silently do nothing is refused: the person believes that it acts."""
    default = {f.name: f.default for f in fields(ObjectiveConfig)}
    needs = {
        "kl": (cfg.beta > 0, "beta > 0"), "kl_bound": (cfg.beta > 0, "beta > 0"),
        "max_tokens": (cfg.aggregation == "constant", "aggregation='constant'"),
        "eps": (cfg.scale != "none", "a scale other than 'none'"),
        "live_on": (cfg.dead_groups == "drop", "dead_groups='drop'"),
        "empty": (cfg.aggregation in _COUNTS_SEQUENCES, f"aggregation among {', '.join(_COUNTS_SEQUENCES)}"),
    }
    for name, (used, need) in needs.items():
        if not used and getattr(cfg, name) != default[name]:
            raise BadInput(f"objective: {name}={getattr(cfg, name)!r} has no effect here", f"it needs {need}",
                           f"leave {name} out, or choose {need}")


def _check_shapes(
    logp: Tensor, old: Tensor | None, ref: Tensor | None, advantages: Tensor, sequence: Tensor, cfg: ObjectiveConfig
) -> None:
    given = {"logp": logp, "old": old, "ref": ref, "advantages": advantages, "sequence": sequence}
    shapes = {name: tuple(x.shape) for name, x in given.items() if x is not None}
    if logp.ndim != 1 or len(set(shapes.values())) > 1:
        raise BadInput(f"objective: tensors must share one shape (M,), got {shapes}")
    if cfg.beta and ref is None:
        raise BadInput(f"objective: beta={cfg.beta:g} needs the reference policy's log-probabilities",
                       next="pass ref, or set beta to 0")
