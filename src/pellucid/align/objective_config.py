"""Every choice of the online objective that changes a number, as one flat set of named fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pellucid.align.advantages import Baseline, Scale
from pellucid.align.aggregation import Aggregation, Empty
from pellucid.align.choices import check_choices, check_unused
from pellucid.align.components import Missing
from pellucid.align.corrections import Correction, CorrectionLevel
from pellucid.align.kl import Estimator
from pellucid.align.policy_losses import Policy, RatioLevel
from pellucid.errors import BadInput

COUNTS_SEQUENCES = ("sequence-mean", "token-mean-local", "constant", "sequence-sum")
AdvantageName = Literal["group", "gdpo", "pass@k", "gae", "returns"]
DeadGroups = Literal["keep", "drop"]
Truncated = Literal["keep", "mask", "zero-reward"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Every choice of the objective that changes a number. Impossible or unused combinations raise BadInput."""

    # From rewards to advantages.
    advantage: AdvantageName = "group"
    """group: reward against its group; gdpo: each reward normalised by itself; pass@k: only the best of a group; gae:
    with a critic; returns: discounted rewards of the tokens that follow (REINFORCE++)"""
    scale: Scale = "group"
    """what centred rewards are divided by: std of the group, std of the batch, or nothing"""
    baseline: Baseline = "mean"
    """what is subtracted from a reward: the group's mean, the mean of the others, or the length-weighted mean"""
    eps: float = 1e-4
    """added to the standard deviation"""
    whiten: Literal["none", "sequence", "token"] = "none"
    """normalise the advantages over the batch afterwards, each completion or each token counting once"""
    gamma: float = 1.0
    """discount of a token's reward, per token"""
    lam: float = 0.95
    """lambda of generalised advantage estimation"""
    missing: Missing = "zero"
    """a reward component that nobody graded: adds zero, excludes the completion, or is refused"""
    reward_clip: float | None = None
    """the total reward is held within +- this, before the KL penalty and the baseline; none by default"""
    reward_beta: float = 0.0
    """weight of the KL penalty INSIDE the reward; 0 means none"""
    reward_kl: Literal["k1", "abs", "k2", "k3"] = "k1"
    """its estimator; only k1 has the right gradient there"""
    dead_groups: DeadGroups = "keep"
    """groups whose rewards do not differ: keep them in the counts (and in the KL term), or drop them"""
    live_on: str = "any"
    """what must differ for a group to be live: any component, the total, or the component of this name"""
    truncated: Truncated = "keep"
    """completions cut at the length limit: keep, mask out of the loss, or give reward zero"""

    # The policy term.
    policy: Policy = "clip"
    """clip: PPO's surrogate; cispo: clipped weights; sapo: a soft gate; gmpo: geometric mean; reinforce: no ratio"""
    ratio: RatioLevel = "token"
    """importance ratio of the token, of the whole completion (GSPO), its token form, or the unnormalised product"""
    clip_low: float = 0.2
    """the ratio is clipped below 1 - clip_low"""
    clip_high: float = 0.2
    """the ratio is clipped above 1 + clip_high"""
    delta: float | None = None
    """cap on the unclipped ratio where the advantage is negative (two-sided or dual clip); none by default"""
    tau_pos: float = 1.0
    """temperature of the soft gate where the advantage is positive"""
    tau_neg: float = 1.05
    """temperature of the soft gate elsewhere"""
    log_ratio_bound: float | None = None
    """bound on |log ratio| before exp, so that a runaway token cannot overflow; none by default"""
    high_entropy: float = 1.0
    """fraction of tokens that learn, those of the highest entropy"""
    correction: Correction = "none"
    """weight trainer / sampler of the policy term: none, truncated, or masked outside its band"""
    correction_level: CorrectionLevel = "token"
    """that weight of the token, of the completion's product, of its mean, or of its worst token"""
    correction_low: float | None = None
    """lower end of the band; none by default"""
    correction_high: float | None = 2.0
    """upper end of the band"""
    off_policy: float | None = None
    """drop bad completions (A < 0) whose mean log p_sampler - log p exceeds this; none by default"""

    # Other terms.
    beta: float = 0.0
    """weight of the KL term in the loss; 0 means that it needs no reference model"""
    kl: Estimator = "k3-corrected"
    """estimator of KL(policy || reference) in the loss"""
    kl_bound: float | None = None
    """bound on |log p - log p_ref| inside the KL term; none by default"""
    kl_target: float | None = None
    """adapt the weight of the KL so that its mean stays near this (k3, nats a token); none: fixed weight"""
    kl_horizon: int = 10_000
    """completions over which the adaptive weight reacts"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    entropy_target: float | None = None
    """adapt the bonus: it acts only while the entropy is at or below this (nats); none: fixed weight"""
    value_coef: float = 0.1
    """weight of the critic's loss"""
    value_clip: float | None = 0.2
    """the critic's step is clipped at this distance from its old value"""

    # From token losses to the loss of a step.
    aggregation: Aggregation = "sequence-mean"
    """how the losses of tokens become the loss of a step"""
    max_tokens: int | None = None
    """the constant of the "constant" aggregation: the longest completion that sampling allows"""
    empty: Empty = "exclude"
    """completions without a trained token: excluded from the sequence count, or counted as zeros"""

    def __post_init__(self) -> None:
        check_choices(self, "objective")
        _check_numbers(self)
        check_unused(self, "objective", acting(self))

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0 or self.reward_beta > 0

    @property
    def by_token(self) -> bool:
        """Advantages differ from token to token."""
        return self.advantage in ("gae", "returns")


def _check_numbers(cfg: ObjectiveConfig) -> None:
    wrong = ""
    positive = dict(max_tokens=cfg.max_tokens, log_ratio_bound=cfg.log_ratio_bound, kl_bound=cfg.kl_bound, tau_pos=cfg.tau_pos,
                    tau_neg=cfg.tau_neg, reward_clip=cfg.reward_clip, kl_target=cfg.kl_target, kl_horizon=cfg.kl_horizon,
                    value_clip=cfg.value_clip, correction_high=cfg.correction_high)
    bad = [name for name, x in positive.items() if x is not None and x <= 0]
    if min(cfg.clip_low, cfg.clip_high, cfg.beta, cfg.eps, cfg.reward_beta, cfg.entropy_coef, cfg.value_coef) < 0:
        wrong = "clip_low, clip_high, beta, reward_beta, eps, entropy_coef and value_coef are not negative"
    elif bad:
        wrong = f"{bad[0]} is positive"
    elif not (0 <= cfg.gamma <= 1 and 0 <= cfg.lam <= 1 and 0 < cfg.high_entropy <= 1):
        wrong = "gamma and lam lie in [0, 1], high_entropy in (0, 1]"
    elif cfg.delta is not None and cfg.delta <= 1 + cfg.clip_high:
        wrong = f"delta={cfg.delta:g} must exceed 1 + clip_high = {1 + cfg.clip_high:g}, or it overrules the clip"
    elif cfg.aggregation == "constant" and cfg.max_tokens is None:
        wrong = "the constant aggregation needs max_tokens, the longest completion that sampling allows"
    elif cfg.advantage == "gdpo" and (cfg.reward_beta or cfg.reward_clip):
        wrong = "gdpo normalises each reward by itself, and has no total to clip or to take a KL penalty from"
    elif cfg.advantage == "pass@k" and cfg.scale == "batch":
        wrong = "pass@k divides by the group's std or by nothing"
    elif cfg.whiten == "sequence" and cfg.by_token:
        wrong = f"advantages of {cfg.advantage} belong to tokens: whiten is 'token' or 'none'"
    elif cfg.policy == "gmpo" and cfg.by_token:
        wrong = "gmpo needs one advantage per completion"
    if wrong:
        raise BadInput(f"objective: {wrong}", next="change the value named above")


def acting(cfg: ObjectiveConfig) -> dict[str, tuple[bool, str]]:
    """For each choice that needs another one: whether it acts here, and what it needs."""
    clips = cfg.policy in ("clip", "cispo", "gmpo")
    any_kl = cfg.beta > 0 or cfg.reward_beta > 0
    corrects = cfg.correction != "none"
    divides = (cfg.advantage in ("group", "pass@k") and cfg.scale != "none") or cfg.advantage == "gdpo"
    return {
        "scale": (cfg.advantage in ("group", "pass@k"), "advantage='group' or 'pass@k'"),
        "baseline": (cfg.advantage == "group", "advantage='group'"),
        "eps": (divides or cfg.whiten == "sequence", "a scale other than 'none', or whiten='sequence'"),
        "gamma": (cfg.by_token, "advantage='gae' or 'returns'"),
        "lam": (cfg.advantage == "gae", "advantage='gae'"),
        "reward_kl": (cfg.reward_beta > 0, "reward_beta > 0"),
        "live_on": (cfg.dead_groups == "drop", "dead_groups='drop'"),
        "ratio": (cfg.policy in ("clip", "cispo", "sapo"), "policy='clip', 'cispo' or 'sapo'"),
        "clip_low": (clips, "a policy that clips"), "clip_high": (clips, "a policy that clips"),
        "delta": (cfg.policy == "clip", "policy='clip'"),
        "tau_pos": (cfg.policy == "sapo", "policy='sapo'"), "tau_neg": (cfg.policy == "sapo", "policy='sapo'"),
        "log_ratio_bound": (cfg.policy != "reinforce" or (cfg.beta > 0 and cfg.kl == "k3-corrected"),
                            "a policy with a ratio"),
        "correction_level": (corrects, "correction='truncate' or 'mask'"),
        "correction_low": (corrects, "correction='truncate' or 'mask'"),
        "correction_high": (corrects, "correction='truncate' or 'mask'"),
        "kl": (cfg.beta > 0, "beta > 0"), "kl_bound": (cfg.beta > 0, "beta > 0"),
        "kl_target": (any_kl, "beta > 0 or reward_beta > 0"), "kl_horizon": (cfg.kl_target is not None, "a kl_target"),
        "value_coef": (cfg.advantage == "gae", "advantage='gae'"), "value_clip": (cfg.advantage == "gae", "advantage='gae'"),
        "max_tokens": (cfg.aggregation == "constant", "aggregation='constant'"),
        "empty": (cfg.aggregation in COUNTS_SEQUENCES, f"aggregation among {', '.join(COUNTS_SEQUENCES)}"),
    }
