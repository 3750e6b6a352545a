"""Published objectives as settings: a name, and the choices that make it what it is.

What a paper also prescribes outside the objective (learning rate, mini-batches per rollout, length penalties, which are
reward components) is not in here. `formula(recipe(name))` prints what a name resolves to.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pellucid.align.objective import ObjectiveConfig
from pellucid.errors import BadInput, nearest

RECIPES: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300: eq. 3 and 4; the paper does not name the clip, 0.2 is customary. k3 without correction.
    "deepseekmath-grpo": dict(aggregation="sequence-mean", scale="group", beta=0.04, kl="k3"),
    # arXiv 2503.20783: no std, constant length (give max_tokens); its code gives truncated answers reward 0.
    "dr-grpo": dict(aggregation="constant", scale="none", truncated="zero-reward"),
    # arXiv 2503.14476: clip-higher, token mean, dynamic sampling on accuracy, overlong filtering, no KL term.
    "dapo": dict(aggregation="token-mean", clip_high=0.28, dead_groups="drop", live_on="correct", truncated="mask"),
    # arXiv 2507.18071: ratio of the completion; meant for several updates per rollout, the clip is that narrow.
    "gspo": dict(ratio="sequence", aggregation="sequence-mean", clip_low=3e-4, clip_high=4e-4),
    # What trl 1.16.0's GRPOTrainer computes untouched: DAPO's normaliser, symmetric clip, no KL term.
    "trl-default": dict(aggregation="token-mean", scale="group"),
    # Our own default run: every completion counts alike, exploration by clip-higher, no reference model to hold.
    "pellucid-grow": dict(aggregation="sequence-mean", scale="group", clip_low=0.2, clip_high=0.28,
                          log_ratio_bound=20.0, dead_groups="drop"),
}


def recipe(name: str, **changes: Any) -> ObjectiveConfig:
    """The named objective, with fields changed: `recipe("dr-grpo", max_tokens=256)`.

    Errors: BadInput for an unknown name or field, naming the nearest one, and whatever `ObjectiveConfig` refuses.
    """
    if name not in RECIPES:
        raise BadInput(f"no objective is called {name!r}{nearest(name, list(RECIPES))}",
                       next=f"use one of {', '.join(RECIPES)}")
    known = [field.name for field in fields(ObjectiveConfig)]
    for field in changes:
        if field not in known:
            raise BadInput(f"the objective has no choice {field!r}{nearest(field, known)}",
                           next=f"the choices are {', '.join(known)}")
    return ObjectiveConfig(**(RECIPES[name] | changes))
