"""From rewards to advantages: how much better a completion is than its siblings. Sequence level; see `returns` for tokens.

Shapes: N prompts, G completions each; NaN means that nobody graded the completion. Statistics are in float64 with the
unbiased standard deviation (n - 1). A group whose rewards do not differ gets advantages of exactly 0 (see `groups`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pellucid.align.choices import check_name
from pellucid.align.components import Components, Missing, not_gradable, stack
from pellucid.align.groups import checked, group_mean, group_std, varies
from pellucid.errors import BadInput

Baseline = Literal["mean", "leave-one-out", "length-weighted"]
Scale = Literal["group", "batch", "none"]


def group_advantages(
    rewards: Tensor, *, scale: Scale = "group", baseline: Baseline = "mean", eps: float = 1e-4,
    valid: Tensor | None = None, lengths: Tensor | None = None,
) -> Tensor:
    """Advantages of every completion against its group, (N, G) -> (N, G), in the rewards' floating dtype.

    A = (R - baseline) / scale:

    baseline  "mean":             mean of the group (GRPO). Without scale its expectation is (1 - 1/G) grad J.
              "leave-one-out":    mean of the other completions (RLOO, arXiv 2402.14740); without scale exactly grad J.
              "length-weighted":  sum of L R / sum of L over the group (OPO, arXiv 2505.23585); needs `lengths`.
    scale     "group":            std of the group + eps (DeepSeekMath, arXiv 2402.03300); weighs prompts by difficulty.
              "batch":            std of all rewards of the batch + eps.
              "none":             1 (Dr. GRPO, arXiv 2503.20783).

    valid: (N, G) bool; a completion that is False (no tokens, no grade), or whose reward is NaN, leaves the baseline
    and the std, and gets 0. A group with fewer than two valid completions, or with equal rewards, gets exactly 0.
    Errors: BadInput for G = 1 (nothing to compare with), infinite rewards, unknown names.
    """
    check_name("scale", scale, Scale)
    check_name("baseline", baseline, Baseline)
    r, present = checked(rewards, valid)
    centred = r - (group_mean(r, present) if baseline != "length-weighted" else _length_weighted(r, present, lengths))
    if baseline == "leave-one-out":
        n = present.sum(dim=1, keepdim=True)
        centred = centred * n / (n - 1).clamp(min=1)
    divisor = {"group": lambda: group_std(r, present) + eps, "none": lambda: torch.ones_like(r[:1, :1]),
               "batch": lambda: group_std(r.reshape(1, -1), present.reshape(1, -1)) + eps}[scale]()
    return _live(centred / divisor, present & varies(r, present).unsqueeze(1), rewards)


def gdpo_advantages(
    components: Components, *, weights: Mapping[str, float] | None = None, eps: float = 1e-4,
    missing: Missing = "zero", valid: Tensor | None = None,
) -> Tensor:
    """GDPO (arXiv 2601.05242, eq. 4 to 6): each reward is normalised by itself, and only then are they added. (N, G) f64.

        A_k = (r_k - mean_group r_k) / (std_group r_k + eps);     A = sum_k w_k A_k

    Weights act on the NORMALISED advantages: the scales of the rewards do not matter any more, which also means that
    a priority that was written into a scale is lost. Batch normalisation (eq. 7) is `whiten`, on the result.
    missing: a component that is NaN adds 0 here, which is "average" ("zero"), or takes its completion out ("exclude").

    The sum is rounded to 12 decimals: two binary rewards with a constant total have A_2 = -A_1 exactly, and rounding
    noise must not be what batch normalisation enlarges. With eps > 0, rewards of different scale that cancel leave a
    remainder of about eps / std, which it would enlarge too: eps = 0 is exact, and allowed, since groups without
    difference are found by comparing. With one reward this is GRPO's advantage.
    """
    stacked, w = stack(components, weights)
    kept = ~not_gradable(stacked, missing, components)
    kept = kept if valid is None else kept & valid.bool()
    total = torch.zeros(stacked.shape[1:], dtype=torch.float64, device=stacked.device)
    for reward, weight in zip(stacked, w.tolist()):
        total += weight * group_advantages(reward, eps=eps, valid=kept)
    return total.round(decimals=12) + 0.0  # + 0.0: no -0.0


def pass_at_k_advantages(
    rewards: Tensor, *, scale: Scale = "none", eps: float = 1e-6, valid: Tensor | None = None
) -> Tensor:
    """Only the best completion counts: A = r_max - r_second for it, 0 for all others (arXiv 2503.19595; verl
    `grpo_passk`). A tie at the top gives 0 everywhere. scale "group" divides by the group's std + eps. (N, G) -> (N, G).
    """
    check_name("scale of pass@k", scale, ("group", "none"))
    r, present = checked(rewards, valid)
    best = torch.where(present, r, -torch.inf).topk(2, dim=1)
    lead = best.values[:, :1] - best.values[:, 1:]
    lead = torch.where(present.sum(1, keepdim=True) >= 2, lead, 0.0)
    if scale == "group":
        lead = lead / (group_std(r, present) + eps)
    is_best = torch.zeros_like(present).scatter(1, best.indices[:, :1], True)
    return _live(lead, is_best & varies(r, present)[:, None], rewards)


def whiten(
    values: Tensor, weight: Tensor | None = None, *, eps: float = 1e-8, eps_in: Literal["variance", "std"] = "variance",
    shift: bool = True,
) -> Tensor:
    """(x - mean) / std over all values of a step, of any shape: masked whitening, batch normalisation.

    weight  how many tokens each value stands for (same shape): statistics over tokens, so long answers count more;
            0 leaves a value out, and gives 0 for it. None: every value counts once.
    eps_in  "variance": x / sqrt(var + eps) (trl's PPO, verl's masked_whiten);  "std": x / (std + eps) (GDPO, trl).
    shift   False puts the mean back afterwards: only the scale is normalised (trl 1.12 `whiten_rewards`).

    Unbiased variance, float64. Values that do not differ carry no information: exactly 0 (or unchanged without shift).
    """
    x = values.detach().double()
    counted = torch.ones_like(x, dtype=torch.bool) if weight is None else weight > 0
    mean, factor = whitening(x, weight, eps=eps, eps_in=eps_in)
    if not x.numel() or not varies(x.reshape(1, -1), counted.reshape(1, -1)).item():
        white = torch.zeros_like(x) if shift else x
    else:
        white = (x - mean) * factor + (0.0 if shift else mean)
    return torch.where(counted, white, 0.0).to(values.dtype if values.is_floating_point() else torch.float32)


def whitening(values: Tensor, weight: Tensor | None = None, *, eps: float, eps_in: str) -> tuple[Tensor, Tensor]:
    """The mean that `whiten` subtracts and the factor it multiplies with. A growing factor is a hidden learning rate:
    with a fraction f of informative groups GDPO's is about 1 / sqrt(f (G - 1) / G) for one binary reward."""
    check_name("eps_in", eps_in, ("variance", "std"))
    x = values.detach().double()
    w = torch.ones_like(x) if weight is None else weight.double()
    n = w.sum()
    mean = torch.where(w > 0, w * x, 0.0).sum() / n.clamp(min=1)
    variance = torch.where(w > 0, w * (x - mean).square(), 0.0).sum() / (n - 1).clamp(min=1)
    return mean, (variance + eps).rsqrt() if eps_in == "variance" else 1 / (variance.sqrt() + eps)


def _length_weighted(r: Tensor, present: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None or lengths.shape != r.shape:
        raise BadInput("the length-weighted baseline needs the length of every completion", next="pass lengths, (N, G)")
    w = torch.where(present, lengths.double(), 0.0)
    return (w * r).sum(1, keepdim=True) / w.sum(1, keepdim=True).clamp(min=1)


def _live(advantages: Tensor, live: Tensor, rewards: Tensor) -> Tensor:
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    return torch.where(live, advantages, 0.0).to(dtype)
