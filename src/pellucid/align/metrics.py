"""The numbers to look at in every step of online training. Pure functions, means over trained tokens only.

Two kinds. *Shares* (`shift_shares`) come from one micro-batch; add them over micro-batches and ranks with `merge` and
they are means over the whole step: no mean of means. *Tables* describe the whole rollout at once.
A mean over nothing (no right answer, say) is NaN, which the event log writes as null.

The loss is not here on purpose: on-policy it is about 0 by construction and says nothing. Look at the informative
fraction, the size of the advantages, the ratio, the entropy, and above all at accuracy on held-out problems.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from pellucid.align.aggregation import sequence_lengths
from pellucid.align.components import Components, informative_groups, total_reward
from pellucid.align.kl import k1, k3
from pellucid.align.objective_config import ObjectiveConfig
from pellucid.align.policy_losses import clip_sides
from pellucid.align.value import value_clipped
from pellucid.runtime import peak_memory_bytes

MEANING: dict[str, str] = {
    "reward/*/mean": "mean of a reward component, or of the weighted total, over graded completions",
    "reward/*/std": "its standard deviation over the same completions",
    "reward/*/informative": "fraction of groups in which it differs: only these can teach it",
    "reward/*/all_wrong": "fraction of groups in which every completion has the worst value, 0",
    "reward/*/all_right": "fraction of groups in which every completion has the best value, 1",
    "advantage/min": "most negative advantage",
    "advantage/max": "most positive advantage",
    "advantage/std": "standard deviation of the advantages: the size of the learning signal",
    "advantage/factor": "what whitening over the batch multiplied the advantages with: as groups become alike it grows, a hidden "
                        "rise of the learning rate",
    "advantage/distinct": "number of different advantages in the batch",
    "advantage/token_abs": "mean |advantage| over tokens; 0 means that the step teaches nothing",
    "ratio/mean": "mean importance ratio new / sampling policy; 1 on-policy",
    "ratio/max": "largest ratio",
    "ratio/bounded": "fraction of tokens whose log ratio hit its bound",
    "clip/low": "fraction of tokens that the lower side of the clip acts on; exactly 0 in the first, on-policy update",
    "clip/high": "fraction that the upper side acts on; exactly 0 in the first, on-policy update",
    "clip/delta": "fraction capped by two-sided (dual) clipping",
    "correction/mean": "mean factor of the policy term from corrections and masks; 1 where sampler and trainer agree",
    "correction/dropped": "fraction of tokens whose policy term the correction or a mask removed",
    "correction/ess/*": "effective sample size of the weights, as a fraction, over completions of these lengths",
    "correction/dropped/*": "fraction of the tokens of completions of these lengths that the correction removed",
    "kl/old_k1": "mean log p_old - log p: drift since sampling, estimated without bias",
    "kl/old_k3": "the same drift with less noise and never negative",
    "kl/ref_k1": "mean log p - log p_ref: distance from the reference policy",
    "kl/ref_k3": "the same distance with less noise and never negative",
    "kl/bounded": "fraction of tokens whose distance from the reference hit its bound",
    "entropy/mean": "mean entropy of the next-token distribution, nats; to 0 is collapse, a steady rise is explosion",
    "entropy/p10": "its 10th percentile over tokens",
    "entropy/p90": "its 90th percentile: the tokens where the policy chooses",
    "length/mean": "mean completion length, tokens",
    "length/p95": "its 95th percentile",
    "length/max": "the longest completion",
    "length/truncated": "fraction of completions cut at the length limit",
    "length/right": "mean length of right answers",
    "length/wrong": "mean length of wrong answers; a growing gap is length bias",
    "diversity/distinct": "mean fraction of different completions within a group; 1/G means all the same",
    "diversity/bigrams": "fraction of different pairs of neighbouring tokens within a group (distinct-2)",
    "engine/gap_mean": "mean |log p| difference between sampler and trainer for the same tokens; rounding error only",
    "engine/gap_max": "largest such difference",
    "engine/ess": "effective sample size of the sampler -> trainer weights, as a fraction; 1 is perfect agreement",
    "critic/explained": "1 - var(return - value) / var(return): 1 is a perfect critic, 0 one that knows only the mean",
    "critic/value": "mean value of the critic over the tokens of the step",
    "critic/return": "mean return, what the critic should say",
    "critic/clipped": "fraction of tokens on which the critic's step was clipped",
}

LOOP_MEANING: dict[str, str] = {
    "turns/mean": "mean number of the model's turns in a dialogue",
    "turns/given_tokens": "fraction of a dialogue's tokens that tools and users wrote: read, not trained on",
    "reward/*/failed": "fraction of completions that a reward could not grade; they count as not graded",
    "accuracy": "fraction of right completions", "format": "fraction of completions in the asked form",
    "accuracy/any": "fraction of problems of which some completion of the group is right: pass@G",
    "groups/live": "fraction of sampled groups that enter the step",
    "groups/sampled": "groups sampled for the step, those that replace groups without difference included",
    "grad_norm": "norm of the gradient before clipping, mean over the optimizer steps of the rollout", "lr": "learning rate",
    "update/skipped": "optimizer steps of the run so far that were left out, because a gradient was not finite",
    "kl/coefficient": "weight of the KL term, or of the KL penalty in the reward", "entropy/coefficient": "weight of the entropy bonus",
    "critic/loss": "the critic's loss, times its coefficient", "critic/grad_norm": "norm of the critic's gradient before clipping",
    "time/sampling": "share of the run's time spent sampling and grading",
    "time/waiting": "share of the run's time in which the trainer waited for samples that are made beside it",
    "staleness/steps": "steps between the weights that sampled and those that learn; what it does to the samples show engine/* and correction/* "
                       "(with a correction), or kl/old_k3 and ratio/* (without one)",
    "update/ratio": "size of an optimizer step beside the weights, |change| / |weights|, mean over the steps: some 1e-3 is usual, 1e-2 is fast "
                    "(from up to 4096 numbers of each matrix)",
    "speed/sampled": "tokens sampled in a second of sampling and grading",
    "speed/trained": "trained tokens in a second of measuring and updating, every pass counted",
    "memory/peak": "largest memory of this process so far, MiB (of tensors on a GPU)",
}
"""What the online loop adds to the tables above."""

OFFLINE_MEANING: dict[str, str] = {
    "rewards/chosen": "beta times log p / p_ref of the chosen answer: the reward that the policy itself implies",
    "rewards/rejected": "the same of the rejected answer",
    "rewards/margin": "their difference, which is what the loss enlarges",
    "rewards/accuracy": "fraction of pairs with a positive margin; a tie counts as wrong",
    "logps/chosen": "log p of the chosen answer. It may fall while training goes well: only the margin is optimised, and "
                    "both answers can lose to others. If it must not, add the sft loss (rpo)",
    "logps/rejected": "log p of the rejected answer; it falls",
    "rewards/good": "KTO: the implied reward of good answers", "rewards/bad": "KTO: of bad answers",
    "logps/good": "KTO: log p of good answers", "logps/bad": "KTO: log p of bad answers",
    "kl": "KTO: the reference point, how far the policy has moved on answers to other prompts (nats an answer)",
    "accuracy": "reward models: fraction of pairs (or steps) judged right; a tie counts as wrong",
    "margin": "reward models: mean difference of the scores of chosen and rejected",
    "score/mean": "mean score; the pairs leave it open, centring pulls it to 0", "score/std": "standard deviation of the scores",
    "score/max": "largest score",
    "loss": "the loss of the step; log 2 = 0.693 at the start of DPO and of a reward model that knows nothing",
    "grad_norm": "norm of the gradient before clipping", "lr": "learning rate", "epoch": "passes over the data so far",
    "update/ratio": LOOP_MEANING["update/ratio"], "memory/peak": LOOP_MEANING["memory/peak"],
}


def meaning_of(name: str) -> str:
    """What a number of any loop means, empty where it is not one of these (a reward function's own)."""
    for table in (MEANING, LOOP_MEANING, OFFLINE_MEANING):
        for pattern, meaning in table.items():
            if fnmatch.fnmatchcase(name, pattern):
                return meaning
    return ""


def shift_shares(
    logp: Tensor, old: Tensor, ref: Tensor | None, advantages: Tensor, ratio: Tensor, log_r: Tensor, tokens: int,
    cfg: ObjectiveConfig, factor: Tensor | None = None,
) -> dict[str, Tensor]:
    """How far the policy moved and what the clip did: sums over this micro-batch's tokens / tokens of the step.

    All tensors (M,), detached; `ratio` may belong to the token or its completion, its mean is over tokens either way.
    factor: what multiplied the policy term (corrections and masks), if anything did.
    """
    per_token = {"advantage/token_abs": advantages.abs(), "ratio/mean": ratio, "kl/old_k1": k1(old, logp),
                 "kl/old_k3": k3(old, logp)}
    if cfg.policy == "clip":
        per_token["clip/low"], per_token["clip/high"] = clip_sides(ratio, advantages, low=cfg.clip_low, high=cfg.clip_high)
    elif cfg.policy in ("cispo", "gmpo"):  # cispo bounds the weight, gmpo the log ratio, both whatever the sign of A
        low, high = (ratio, ratio - 1) if cfg.policy == "cispo" else (log_r + 1, log_r)
        per_token["clip/low"], per_token["clip/high"] = low < 1 - cfg.clip_low, high > cfg.clip_high
    if cfg.delta is not None:
        per_token["clip/delta"] = (ratio > cfg.delta) & (advantages < 0)
    if cfg.log_ratio_bound is not None:
        per_token["ratio/bounded"] = log_r.abs() > cfg.log_ratio_bound
    if factor is not None:
        per_token["correction/mean"], per_token["correction/dropped"] = factor, factor == 0
    if ref is not None:
        per_token |= {"kl/ref_k1": k1(logp, ref), "kl/ref_k3": k3(logp, ref)}
        if cfg.kl_bound is not None:
            per_token["kl/bounded"] = (logp - ref).abs() > cfg.kl_bound
    shares = {name: values.to(logp.dtype).sum() / max(tokens, 1) for name, values in per_token.items()}
    shares["ratio/max"] = ratio.max() if ratio.numel() else ratio.new_zeros(())
    return shares


def merge(parts: Sequence[Mapping[str, Tensor | float]]) -> dict[str, float]:
    """Shares of micro-batches (or ranks) -> values of the step: added, but keys that end in `/max` take the maximum."""
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            new = float(value)
            before = merged.get(name)
            merged[name] = new if before is None else max(before, new) if name.endswith("/max") else before + new
    return merged


def mean_of(parts: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Means of several shares of a rollout, each with its number of groups; a share that says nothing of a failure had none."""
    names = dict.fromkeys(name for table, count in parts if count for name in table)
    mean: dict[str, float] = {}
    for name in names:
        known = [(table.get(name, 0.0), count) for table, count in parts if count and (name in table or name.endswith("/failed"))]
        mean[name] = sum(value * count for value, count in known) / sum(count for _, count in known)
    return mean


def reward_table(components: Components, weights: Mapping[str, float] | None = None) -> dict[str, float]:
    """Mean, std and informative fraction of every component (values in [0, 1]) and of the weighted total.

    components: name -> (N, G), NaN where not graded. A group that nobody graded counts in no fraction.
    """
    table: dict[str, float] = {}
    named = {**components, "total": total_reward(components, weights)}
    compared = named if next(iter(named.values())).shape[1] > 1 else {}  # a single completion has nothing to differ from
    informative = informative_groups(compared) if compared else {}
    for name in named:
        r = named[name].detach().double()
        graded = ~r.isnan()
        differs = informative.get(name, torch.full(r.shape[:1], torch.nan))
        known = graded.any(1)
        table[f"reward/{name}/mean"] = _mean(r[graded])
        table[f"reward/{name}/std"] = float(r[graded].std()) if graded.sum() > 1 else math.nan
        table[f"reward/{name}/informative"] = _mean(differs[known])
        if name in components:
            table[f"reward/{name}/all_wrong"] = _mean(((r == 0) | ~graded).all(1)[known])
            table[f"reward/{name}/all_right"] = _mean(((r == 1) | ~graded).all(1)[known])
    return table


def advantage_table(advantages: Tensor, factor: float = 1.0) -> dict[str, float]:
    """Spread of the advantages of the rollout, of any shape. factor: what whitening multiplied them with (`Credit.factor`)."""
    a = advantages.detach().double().flatten()
    if a.numel() < 2:
        return dict.fromkeys((f"advantage/{name}" for name in ("min", "max", "std", "distinct", "factor")), math.nan)
    return {"advantage/factor": factor, "advantage/min": float(a.min()), "advantage/max": float(a.max()),
            "advantage/std": float(a.std()),
            "advantage/distinct": float((a / 1e-6).round().unique().numel())}  # rounded: noise is no difference


def entropy_table(entropy: Tensor) -> dict[str, float]:
    """Entropy of the next-token distribution over the trained tokens of the step, (M,) nats."""
    h = entropy.detach().double().flatten()
    return {"entropy/mean": _mean(h), "entropy/p10": _quantile(h, 0.1), "entropy/p90": _quantile(h, 0.9)}


def length_table(lengths: Tensor, truncated: Tensor, right: Tensor) -> dict[str, float]:
    """Completion lengths, (S,) or (N, G) tokens, with which were cut and which were right (bool, same shape)."""
    n, cut, good = lengths.double().flatten(), truncated.bool().flatten(), right.bool().flatten()
    return {"length/mean": _mean(n), "length/p95": _quantile(n, 0.95),
            "length/max": float(n.max()) if n.numel() else math.nan, "length/truncated": _mean(cut),
            "length/right": _mean(n[good]), "length/wrong": _mean(n[~good])}


def diversity_table(groups: Sequence[Sequence[Hashable]]) -> dict[str, float]:
    """How many different completions the groups hold; a completion is its text or the tuple of its tokens."""
    fractions = torch.tensor([len(set(group)) / len(group) for group in groups if group])
    pairs = [[pair for one in group if isinstance(one, Sequence) for pair in itertools.pairwise(one)] for group in groups]
    return {"diversity/distinct": _mean(fractions),
            "diversity/bigrams": _mean(torch.tensor([len(set(group)) / len(group) for group in pairs if group]))}


def cost_table(sampled: int, sampling: float, trained: int, training: float, device: torch.device) -> dict[str, float]:
    """Tokens and the seconds that they took, and memory."""
    return {"speed/sampled": sampled / max(sampling, 1e-9), "speed/trained": trained / max(training, 1e-9)} | memory_table(device)


def memory_table(device: torch.device) -> dict[str, float]:
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()
    return {"memory/peak": math.nan if peak is None else peak / 2**20}


def engine_table(trainer: Tensor, sampler: Tensor) -> dict[str, float]:
    """Agreement of the log-probabilities of the same tokens from the trainer and from the sampler, (M,)."""
    difference = (trainer - sampler).detach().double().flatten()
    if not difference.numel():
        return dict.fromkeys(("engine/gap_mean", "engine/gap_max", "engine/ess"), math.nan)
    w = (difference - difference.max()).exp()  # effective sample size does not depend on the scale of the weights
    return {"engine/gap_mean": _mean(difference.abs()), "engine/gap_max": float(difference.abs().max()),
            "engine/ess": float(w.sum().square() / w.square().sum() / w.numel())}


def correction_table(weights: Tensor, sequence: Tensor, edges: Sequence[int] = (64, 256, 1024)) -> dict[str, float]:
    """Corrections (M,) by the length of their completion: the weights of long ones are the first to go wrong."""
    lengths, w = sequence_lengths(sequence)[sequence], weights.detach().double()
    table, floor = {}, 0
    for edge in (*edges, math.inf):
        part = w[(lengths > floor) & (lengths <= edge)]
        name = f"over_{floor}" if edge == math.inf else f"to_{edge}"
        if part.numel():
            squares = float(part.square().sum())
            table[f"correction/ess/{name}"] = float(part.sum()) ** 2 / squares / part.numel() if squares else 0.0
            table[f"correction/dropped/{name}"] = _mean(part == 0)
        floor = int(edge) if edge != math.inf else floor
    return table


def critic_table(values: Tensor, returns: Tensor, old: Tensor, clip: float | None) -> dict[str, float]:
    """The critic against its targets over the tokens of the step, (M,) each."""
    v, target = values.detach().double(), returns.detach().double()
    spread = float(target.var()) if target.numel() > 1 else 0.0
    clipped = _mean(value_clipped(v, target, old.detach().double(), clip)) if clip is not None else 0.0
    return {"critic/explained": 1 - float((target - v).var()) / spread if spread else math.nan, "critic/value": _mean(v),
            "critic/return": _mean(target), "critic/clipped": clipped}


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else math.nan


def _quantile(values: Tensor, q: float) -> float:
    """Linear interpolation between order statistics; sorts, because torch.quantile refuses more than 2^24 values."""
    if not values.numel():
        return math.nan
    ordered = values.sort().values
    place = q * (ordered.numel() - 1)
    low = math.floor(place)
    return float(torch.lerp(ordered[low], ordered[min(low + 1, ordered.numel() - 1)], place - low))
