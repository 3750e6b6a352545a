"""Reward components: many named numbers for one completion, and what is made of them before any advantage.

Rewards come as named components, `{"correct": (N, G), "format": (N, G)}`: N prompts, G completions of each. NaN means
that nobody graded this component.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pellucid.align.choices import check_name
from pellucid.align.groups import checked, graded, varies
from pellucid.errors import BadInput, nearest

Missing = Literal["zero", "exclude", "refuse"]
Components = Mapping[str, Tensor]


def total_reward(
    components: Components, weights: Mapping[str, float] | None = None, missing: Missing = "zero"
) -> Tensor:
    """The weighted sum of the components, (N, G) float64. weights: of every component, or None: 1 each.

    missing, for a component that is NaN at a completion:
      "zero"     it adds nothing; where every component is NaN the total is NaN and the completion leaves the baseline
                 (trl's rule). A component that a whole group lacks has no effect on that group.
      "exclude"  the total is NaN where a component is that another completion of the group has: it cannot be compared
                 with them.
      "refuse"   BadInput.

    Sums are rounded to 12 decimals, so that 0.1 + 0.2 ties with 0.3 + 0.0 and the group counts as equal.
    """
    stacked, w = stack(components, weights)
    gone = not_gradable(stacked, missing, components)
    total = (stacked.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf) * w[:, None, None]).sum(0)
    return torch.where(gone, torch.nan, total.round(decimals=12))


def conditioned(
    components: Components, name: str, on: str, at_least: float = 1.0, otherwise: float = 0.0
) -> dict[str, Tensor]:
    """The components, with `name` replaced by: r_name where r_on >= at_least, else `otherwise` (GDPO, arXiv 2601.05242,
    eq. 8). A short answer earns its length reward only if it is right. Where nobody graded `on`, the result is NaN.
    """
    for key in (name, on):
        if key not in components:
            raise BadInput(f"no reward component is called {key!r}{nearest(key, list(components))}",
                           next=f"the components are {', '.join(sorted(components))}")
    if name == on:
        raise BadInput(f"the reward {name!r} cannot depend on itself", next="name another component as its condition")
    r, condition = components[name].double(), components[on].double()
    kept = torch.where(condition >= at_least, r, torch.where(r.isnan(), torch.nan, otherwise))
    return {**components, name: torch.where(condition.isnan(), torch.nan, kept)}


def informative_groups(components: Components, valid: Tensor | None = None) -> dict[str, Tensor]:
    """For each component, which groups differ in it: name -> (N,) bool, by max != min over graded completions."""
    return {name: varies(*checked(r, valid, name)) for name, r in components.items()}


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
        return varies(*checked(total_reward(components, weights, missing), valid, "total"))
    informative = informative_groups(components, valid)
    if on != "any":
        if on not in informative:
            raise BadInput(f"no reward component is called {on!r}{nearest(on, list(informative))}",
                           next=f"use 'any', 'total' or one of {', '.join(sorted(informative))}")
        return informative[on]
    _, w = stack(components, weights)
    counted = [informative[name] for name, weight in zip(sorted(components), w.tolist()) if weight != 0]
    return torch.stack(counted).any(0) if counted else torch.zeros_like(next(iter(informative.values())))


def stack(components: Components, weights: Mapping[str, float] | None) -> tuple[Tensor, Tensor]:
    """Components (K, N, G) in float64 and weights (K,), both in the order of the names, whatever order was given."""
    if not components:
        raise BadInput("no reward component was given", next="give at least one, as name -> (prompts, completions)")
    for name in ("any", "total"):
        if name in components:
            raise BadInput(f"a reward component is called {name!r}", "the word means the whole of them", "rename it")
    weights = dict(weights or dict.fromkeys(components, 1.0))
    for name in components:
        if name not in weights:
            raise BadInput(f"the reward component {name!r} has no weight", f"weights were given for {', '.join(sorted(weights))}",
                           "give it one too: 1 to reward it, 0 to measure it only")
    for name in weights:
        if name not in components:
            raise BadInput(f"a weight for the unknown reward component {name!r}{nearest(name, list(components))}",
                           next=f"the components are {', '.join(sorted(components))}")
    names = sorted(components)
    shapes = {tuple(components[name].shape) for name in names}
    if len(shapes) > 1:
        raise BadInput(f"reward components differ in shape: {sorted(shapes)}")
    stacked = torch.stack([components[name].detach().double() for name in names])
    return stacked, stacked.new_tensor([float(weights[name]) for name in names])


def not_gradable(stacked: Tensor, missing: Missing, components: Components) -> Tensor:
    """(K, N, G) components -> (N, G) bool: completions without a grade, by the rule `missing`."""
    check_name("missing", missing, Missing)
    absent = stacked.isnan()
    if missing == "refuse" and absent.any():
        raise BadInput("a reward is missing", f"NaN among the components {', '.join(sorted(components))}",
                       "grade every completion, or choose missing='zero' or 'exclude'")
    if missing == "exclude":
        return (absent & ~absent.all(2, keepdim=True)).any(0) | absent.all(0)
    return absent.all(0)


def soft_overlong(lengths: Tensor, longest: int, margin: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), a reward component of values in [-1, 0]:

        0 if L <= longest - margin;   ((longest - margin) - L) / margin if L <= longest;   -1 beyond.
    """
    if not 0 < margin <= longest:
        raise BadInput(f"a margin of {margin} tokens does not fit in {longest}", next="choose 0 < margin <= longest")
    return ((longest - margin - lengths.double()) / margin).clamp(-1.0, 0.0)


__all__ = ["Components", "Missing", "conditioned", "graded", "informative_groups", "live_groups", "soft_overlong",
           "total_reward"]
