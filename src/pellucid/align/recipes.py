"""Published objectives as settings: a name, and the choices that make it what it is.

What a paper also prescribes outside the objective (learning rate, mini-batches per rollout, length penalties, which are
reward components) is not in here. `formula(recipe(name))` prints what a name resolves to.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pellucid.align.choices import changed
from pellucid.align.objective_config import ObjectiveConfig, acting
from pellucid.errors import BadInput, nearest

RECIPES: dict[str, dict[str, Any]] = {
    # arXiv 1707.06347 for language models (1909.08593, 2203.02155) with the numbers of trl 1.12: a critic, KL inside the
    # reward, advantages whitened over the tokens of the rollout.
    "ppo": dict(advantage="gae", whiten="token", reward_beta=0.05, aggregation="token-mean"),
    # arXiv 2402.03300 (DeepSeekMath): eq. 3 and 4; the paper does not name the clip, 0.2 is customary. k3 uncorrected.
    "grpo": dict(aggregation="sequence-mean", scale="group", beta=0.04, kl="k3"),
    # arXiv 2503.20783: no std, constant length (give max_tokens); its code gives truncated answers reward 0.
    "dr-grpo": dict(aggregation="constant", scale="none", truncated="zero-reward"),
    # arXiv 2503.14476: clip-higher, token mean, dynamic sampling on accuracy, overlong filtering, no KL term.
    "dapo": dict(aggregation="token-mean", clip_high=0.28, dead_groups="drop", live_on="correct", truncated="mask"),
    # arXiv 2507.18071: ratio of the completion; meant for several updates per rollout, the clip is that narrow.
    "gspo": dict(ratio="sequence", aggregation="sequence-mean", clip_low=3e-4, clip_high=4e-4),
    # arXiv 2601.05242: each reward normalised by itself, then the batch over completions; GRPO's policy term, no KL.
    "gdpo": dict(advantage="gdpo", whiten="sequence", aggregation="sequence-mean"),
    # arXiv 2402.14740 as trl computes it: KL inside the reward, ratio of the whole completion (bounded, it overflows).
    "rloo": dict(scale="none", baseline="leave-one-out", ratio="sequence-sum", reward_beta=0.05, log_ratio_bound=20.0),
    # arXiv 2501.03262: no critic, no groups; returns of token rewards with the KL inside, whitened over the batch.
    "reinforce++": dict(advantage="returns", whiten="token", reward_beta=0.01, aggregation="token-mean"),
    # The same paper with groups: centred in the group, whitened over the batch, KL as a k2 loss.
    "reinforce++-baseline": dict(scale="none", whiten="token", beta=0.01, kl="k2", aggregation="token-mean"),
    # arXiv 2506.13585 (MiniMax-M1): no lower bound, weights up to 5 as trl recommends, DAPO's normaliser.
    "cispo": dict(policy="cispo", clip_low=1.0, clip_high=4.0, aggregation="token-mean"),
    # arXiv 2511.20347: a soft gate in place of the clip.
    "sapo": dict(policy="sapo", aggregation="sequence-mean"),
    # What trl 1.16.0's GRPOTrainer computes untouched: DAPO's normaliser, symmetric clip, no KL term.
    "trl-default": dict(aggregation="token-mean", scale="group"),
    # What verl 0.9.1 computes with adv_estimator=grpo, otherwise untouched: dual clip, bounded log ratio, no KL term.
    "verl-default": dict(aggregation="token-mean", scale="group", eps=1e-6, delta=3.0, log_ratio_bound=20.0),
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
    cfg = changed(ObjectiveConfig, still_acting(RECIPES[name], changes), changes, "the objective")
    assert isinstance(cfg, ObjectiveConfig)
    return cfg


def still_acting(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe's choices without those that a change makes void: beta=0 leaves no use for its KL estimator.

    (A choice that the person made and that has no effect is refused all the same.)
    """
    known = {f.name: f.default for f in fields(ObjectiveConfig)}
    draft = object.__new__(ObjectiveConfig)  # unchecked: it may hold what is void
    vars(draft).update(known | base | {k: v for k, v in changes.items() if k in known})
    used = acting(draft)
    return {name: value for name, value in base.items() if name in changes or used.get(name, (True, ""))[0]}
