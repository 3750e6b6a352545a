"""From rewards to advantages: how much better a completion is than its siblings.

Rewards come as named components, `{"correct": (N, G), "format": (N, G)}`: N prompts, G completions of each. NaN means
that nobody graded this component. Statistics are in float64 with the unbiased standard deviation (n - 1).

A group teaches only if its rewards differ. That is decided by max == min, never by a small standard deviation: the
mean of G copies of 0.1 differs from 0.1 in the last bit, and a division by a tiny standard deviation turns such noise
into a full-size update. A group without difference gets advantages of exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pellucid.align.aggregation import Counts, count
from pellucid.errors import BadInput, nearest

if TYPE_CHECKING:
    from pellucid.align.objective import ObjectiveConfig

Baseline = Literal["mean", "leave-one-out"]
Scale = Literal["group", "batch", "none"]
Missing = Literal["zero", "exclude", "refuse"]
Components = Mapping[str, Tensor]


def group_advantages(
    rewards: Tensor, *, scale: Scale = "group", baseline: Baseline = "mean", eps: float = 1e-4,
    valid: Tensor | None = None,
) -> Tensor:
    """Advantages of every completion against its group, (N, G) -> (N, G), in the rewards' floating dtype.

    A = (R - baseline) / scale:

    baseline  "mean":           mean of the group (GRPO). Without scale its expectation is (1 - 1/G) grad J.
              "leave-one-out":  mean of the other completions (RLOO, arXiv 2402.14740); without scale exactly grad J.
    scale     "group":          std of the group + eps (DeepSeekMath, arXiv 2402.03300); weighs prompts by difficulty.
              "batch":          std of all rewards of the batch + eps.
              "none":           1 (Dr. GRPO, arXiv 2503.20783).

    valid: (N, G) bool; a completion that is False (no tokens, no grade), or whose reward is NaN, leaves the baseline
    and the std, and gets 0. A group with fewer than two valid completions, or with equal rewards, gets exactly 0.
    Errors: BadInput for G = 1 (nothing to compare with), infinite rewards, unknown names.
    """
    _check_name("scale", scale, Scale)
    _check_name("baseline", baseline, Baseline)
    r, present = _checked(rewards, valid)
    n = present.sum(dim=1, keepdim=True)
    centred = r - _mean(r, present)
    if scale == "group":
        divisor = _std(r, present) + eps
    elif scale == "batch":
        divisor = _std(r.reshape(1, -1), present.reshape(1, -1)) + eps
    else:
        divisor = torch.ones((), dtype=r.dtype, device=r.device)
    advantages = centred / divisor
    if baseline == "leave-one-out":
        advantages = advantages * n / (n - 1).clamp(min=1)
    live = present & _varies(r, present).unsqueeze(1)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    return torch.where(live, advantages, 0.0).to(dtype)


def total_reward(
    components: Components, weights: Mapping[str, float] | None = None, missing: Missing = "zero"
) -> Tensor:
    """The weighted sum of the components, (N, G) float64; a weight that is not given is 1.

    missing, for a component that is NaN at a completion:
      "zero"     it adds nothing; where every component is NaN the total is NaN and the completion leaves the baseline
                 (trl's rule). A component that a whole group lacks has no effect on that group.
      "exclude"  the total is NaN wherever any component is.
      "refuse"   BadInput.

    Sums are rounded to 12 decimals, so that 0.1 + 0.2 ties with 0.3 + 0.0 and the group counts as equal.
    """
    _check_name("missing", missing, Missing)
    stacked, w = _stack(components, weights)
    absent = stacked.isnan()
    if missing == "refuse" and absent.any():
        raise BadInput("a reward is missing", f"NaN among the components {', '.join(sorted(components))}",
                       "grade every completion, or choose missing='zero' or 'exclude'")
    total = (stacked.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf) * w[:, None, None]).sum(0)
    gone = absent.any(0) if missing == "exclude" else absent.all(0)
    return torch.where(gone, torch.nan, total.round(decimals=12))


def informative_groups(components: Components, valid: Tensor | None = None) -> dict[str, Tensor]:
    """For each component, which groups differ in it: name -> (N,) bool, by max != min over graded completions."""
    return {name: _varies(*_checked(r, valid, name)) for name, r in components.items()}


def live_groups(
    components: Components, on: str = "any", weights: Mapping[str, float] | None = None,
    missing: Missing = "zero", valid: Tensor | None = None,
) -> Tensor:
    """Which groups dynamic sampling keeps, (N,) bool.

    on  "any":    some component of non-zero weight differs inside the group. A filter on the total would also drop
                  groups that teach an objective which normalises each component by itself.
        "total":  the weighted total differs: exactly the groups with a non-zero GRPO advantage.
        a name:   that component differs (DAPO, arXiv 2503.14476: accuracy neither 0 nor 1).
    """
    if on == "total":
        return _varies(*_checked(total_reward(components, weights, missing), valid, "total"))
    informative = informative_groups(components, valid)
    if on != "any":
        if on not in informative:
            raise BadInput(f"no reward component is called {on!r}{nearest(on, list(informative))}",
                           next=f"use 'any', 'total' or one of {', '.join(sorted(informative))}")
        return informative[on]
    _, w = _stack(components, weights)
    counted = [informative[name] for name, weight in zip(sorted(components), w.tolist()) if weight != 0]
    return torch.stack(counted).any(0) if counted else torch.zeros_like(next(iter(informative.values())))


@dataclass(frozen=True)
class Credit:
    """What a scored rollout teaches. N prompts, G completions each."""

    advantages: Tensor
    """(N, G) float32"""
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


def assign_credit(
    components: Components, lengths: Tensor, cfg: ObjectiveConfig, *,
    weights: Mapping[str, float] | None = None, truncated: Tensor | None = None,
) -> Credit:
    """From the scored rollout of a whole step to advantages, trained tokens and counts, by the choices of `cfg`.

    components: name -> (N, G). lengths: (N, G) sampled tokens; a completion of length 0 leaves the baseline.
    truncated: (N, G) bool, cut at the length limit; what happens to them is `cfg.truncated` (a masked completion
    keeps its reward in the baseline, so its siblings are judged against it).
    """
    if truncated is None:
        if cfg.truncated != "keep":
            raise BadInput(f"truncated={cfg.truncated!r} needs to know which completions were cut", next="pass truncated")
        truncated = torch.zeros_like(lengths, dtype=torch.bool)
    if cfg.truncated == "zero-reward":
        components = {name: r.masked_fill(truncated, 0.0) for name, r in components.items()}
    valid = lengths > 0
    total = total_reward(components, weights, cfg.missing)
    advantages = group_advantages(total, scale=cfg.scale, baseline=cfg.baseline, eps=cfg.eps, valid=valid).float()
    live = torch.ones_like(valid[:, 0])
    if cfg.dead_groups == "drop":
        live = live_groups(components, cfg.live_on, weights, cfg.missing, valid)
    trained = valid & live[:, None]
    if cfg.truncated == "mask":
        trained = trained & ~truncated
    used = torch.where(trained, lengths, 0)
    counts = count(used[live], cfg.empty)
    signal = bool(advantages[trained].any())
    return Credit(advantages, total, live, used, counts, skip=not signal and (cfg.beta == 0 or counts.tokens == 0))


# --- statistics over the valid completions only -----------------------------------------------------------------------


def _mean(r: Tensor, present: Tensor) -> Tensor:
    """(N, G) -> (N, 1) mean of the valid entries; 0 where there is none."""
    return torch.where(present, r, 0.0).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)


def _std(r: Tensor, present: Tensor) -> Tensor:
    """(N, G) -> (N, 1) unbiased standard deviation of the valid entries; 0 where there are fewer than two."""
    squares = torch.where(present, (r - _mean(r, present)).square(), 0.0).sum(1, keepdim=True)
    return (squares / (present.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()


def _varies(r: Tensor, present: Tensor) -> Tensor:
    """(N, G) -> (N,) whether the largest valid entry exceeds the smallest."""
    largest = torch.where(present, r, -torch.inf).amax(1)
    return largest > torch.where(present, r, torch.inf).amin(1)


def _checked(rewards: Tensor, valid: Tensor | None, name: str = "reward") -> tuple[Tensor, Tensor]:
    """Rewards in float64 with NaN replaced by 0, and which entries are valid; both (N, G)."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise BadInput(f"{name}: shape {tuple(rewards.shape)} is not (prompts, completions >= 2)",
                       "an advantage compares completions of one prompt; with a single one there is nothing to compare",
                       "sample a group of at least 2 completions for every prompt")
    r = rewards.detach().double()
    if r.isinf().any():
        raise BadInput(f"{name}: an infinite reward", next="bound the reward, or give NaN for 'not graded'")
    present = ~r.isnan()
    if valid is not None:
        if valid.shape != rewards.shape:
            raise BadInput(f"valid has shape {tuple(valid.shape)}, the rewards {tuple(rewards.shape)}")
        present = present & valid.bool()
    return torch.where(present, r, 0.0), present


def _stack(components: Components, weights: Mapping[str, float] | None) -> tuple[Tensor, Tensor]:
    """Components (K, N, G) in float64 and weights (K,), both in the order of the names, whatever order was given."""
    if not components:
        raise BadInput("no reward component was given", next="give at least one, as name -> (prompts, completions)")
    for name in ("any", "total"):
        if name in components:
            raise BadInput(f"a reward component is called {name!r}", "the word means the whole of them", "rename it")
    weights = dict(weights or {})
    for name in weights:
        if name not in components:
            raise BadInput(f"a weight for the unknown reward component {name!r}{nearest(name, list(components))}",
                           next=f"the components are {', '.join(sorted(components))}")
    names = sorted(components)
    shapes = {tuple(components[name].shape) for name in names}
    if len(shapes) > 1:
        raise BadInput(f"reward components differ in shape: {sorted(shapes)}")
    stacked = torch.stack([components[name].detach().double() for name in names])
    return stacked, stacked.new_tensor([float(weights.get(name, 1.0)) for name in names])


def _check_name(what: str, value: str, choices: object) -> None:
    allowed = list(choices.__args__)  # type: ignore[attr-defined]
    if value not in allowed:
        raise BadInput(f"unknown {what} {value!r}{nearest(str(value), allowed)}",
                       next=f"use one of {', '.join(allowed)}")
