"""What a step did to one group: its completions side by side, three ways to judge them, and numbers for every token.

    prompt    G completions, each with its reward components, their total, and the advantage that GRPO, Dr. GRPO and GDPO
              give it in this same rollout, beside the one that the run used
    token     log p under the policy that sampled it; ratio of the policy AFTER the step to the one that sampled; which side
              of the clip that ratio is on; entropy of its distribution and KL to the reference, after the step

The ratio is taken after the step on purpose: in the first update on a rollout it is 1 everywhere, and says nothing.
A record is bounded (`COMPLETIONS`, `TOKENS`, and `RECORDS` in a run), so that a long run writes no gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pellucid import events
from pellucid.align.advantages import gdpo_advantages, group_advantages, whiten
from pellucid.align.aggregation import Counts
from pellucid.align.components import Components, total_reward
from pellucid.align.credit import Credit
from pellucid.align.kl import k3
from pellucid.align.objective_config import ObjectiveConfig
from pellucid.align.policy_losses import clip_sides, log_ratio
from pellucid.align.rollout import Group, components, trained_lengths
from pellucid.align.update import Experience, Update
from pellucid.nn import Decoder
from pellucid.tokenizers import Tokenizer

if TYPE_CHECKING:
    from pellucid.align.online import OnlineLoop

COMPLETIONS = 16
"""Of a group, at most; the best and the worst stay."""
TOKENS = 512
"""Of a completion, at most: its first ones."""
RECORDS = 200
"""In a run, about."""
NUMBERS = ("logp", "ratio", "clip", "entropy", "kl")
"""Of a token, in this order."""


@dataclass
class GroupShown(events.Event):
    """One group of a step with rewards, advantages and numbers by token. See `align/inspector.py`."""

    kind = "group"
    stage: str
    step: int
    prompt: str
    weights: dict[str, float]  # of the reward components
    kl_to: str  # "reference" | "sampling policy", where there is no reference
    completions: list[dict[str, Any]]  # best first: text, rewards, total, advantages, extra, finished, length, tokens, logp, ratio, clip, entropy, kl
    left_out: int = 0  # completions of the group that are not shown


class Recorder:
    """Subscriber: after a step of `loop` it emits a `group` event; of about `records` steps, evenly over a longer run.

        with events.subscribed(Recorder(loop)):
            loop.run()

    It changes nothing of the loop and draws no random number: a run is the same with it and without.
    """

    def __init__(self, loop: OnlineLoop, records: int = RECORDS):
        self.loop, self.records = loop, records
        self._next = 0.0

    def __call__(self, event: Any) -> None:
        loop = self.loop
        if event.kind != "step" or event.stage != loop.config.stage or loop.latest is None or event.progress < self._next:
            return
        self._next = event.progress + 1 / self.records - 1e-9
        groups, credit = loop.latest[:2]
        weights = loop.sampling.weights(groups)
        live = credit.live & (credit.advantages != 0).any(1)
        i = int((live if bool(live.any()) else credit.live).int().argmax())  # a group that teaches, if there is one
        events.emit(record(loop.model, loop.reference, loop.rollouts.tokenizer, groups, credit, i, loop.config.objective, weights,
                           temperature=loop.config.temperature, stage=event.stage, step=event.step))


def record(
    model: Decoder, reference: Decoder | None, tokenizer: Tokenizer, groups: list[Group], credit: Credit, i: int,
    objective: ObjectiveConfig, weights: Mapping[str, float], *, temperature: float, stage: str, step: int,
) -> GroupShown:
    """Group i of a rollout as a record. The advantages need the whole rollout: GDPO normalises over it."""
    g = groups[i]
    ways = {"used": credit.advantages} | side_by_side(components(groups, list(weights)), weights, trained_lengths(groups) > 0)
    order = credit.total[i].nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True).tolist()
    shown = order if len(order) <= COMPLETIONS else order[: COMPLETIONS // 2] + order[-(COMPLETIONS // 2) :]
    numbers = token_numbers(model, reference, g, credit.advantages[i], objective, temperature)
    completions = [{
        "text": g.texts[j], "rewards": g.rewards[j], "total": float(credit.total[i, j]),
        "advantages": {name: round(float(a[i, j]), 4) for name, a in ways.items()},
        "extra": {k: v[:200] if isinstance(v, str) else v for k, v in g.extra[j].items()} if g.extra else {},
        "finished": g.samples[j].finish_reason == "stop", "length": len(g.samples[j].tokens),
        "tokens": [tokenizer.decode([t]) for t in g.samples[j].tokens[:TOKENS]],
        **{name: [None if v is None else round(v, 4) for v in values[:TOKENS]] for name, values in numbers[j].items()},
    } for j in shown]
    return GroupShown(stage, step, prompt_text(g.problem.prompt), dict(weights),
                      "reference" if reference is not None else "sampling policy", completions, len(order) - len(shown))


def prompt_text(prompt: Any) -> str:
    """A prompt as text; of a conversation, its messages."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt)


def side_by_side(parts: Components, weights: Mapping[str, float] | None, valid: Tensor) -> dict[str, Tensor]:
    """The same rewards under three recipes, (N, G) each: their advantages alone, without what recipes do besides."""
    chosen = {k: w for k, w in weights.items() if k in parts} if weights else None
    total = total_reward(parts, chosen)
    gdpo = gdpo_advantages(parts, weights=chosen, valid=valid)
    informative = (gdpo != 0).any(1, keepdim=True) & valid
    return {"grpo": group_advantages(total, scale="group", valid=valid),
            "dr-grpo": group_advantages(total, scale="none", valid=valid),
            "gdpo": torch.where(informative, whiten(gdpo, valid.long(), eps=1e-4, eps_in="std"), 0.0)}


@torch.no_grad()
def token_numbers(
    model: Decoder, reference: Decoder | None, group: Group, advantages: Tensor, objective: ObjectiveConfig, temperature: float,
) -> list[dict[str, list[float | None]]]:
    """Per completion: logp, ratio, clip (-1 low side, 0, 1 high side), entropy, kl of every token; None where the token was
    given and not sampled (a tool's answer). advantages: (G,)."""
    x = Experience([group], [0], model.embed.weight.device)
    out: list[dict[str, list[float | None]]] = [{name: [] for name in NUMBERS} for _ in group.samples]
    if not x.samples:
        return out
    update = Update(x, range(len(x.samples)), Counts(0, 0))
    new, entropy = update.logprobs(model, len(update.rows), temperature, entropy=True)
    kl = k3(x.sampler, new)
    if reference is not None:
        kl = k3(new, update.logprobs(reference, len(update.rows), temperature)[0])
    ratio = log_ratio(new, x.sampler, x.sequence, objective.ratio).exp()
    worth = torch.tensor([float(advantages[j]) for _, j in x.places], device=x.device)[x.sequence]
    values = dict(zip(NUMBERS, (x.sampler, ratio, sides(ratio, worth, objective), entropy, kl)))
    for number, (_, j) in enumerate(x.places):
        for name, v in values.items():
            out[j][name] = _at_their_places(v[x.sequence == number].tolist(), group.samples[j].mask)
    return out


def sides(ratio: Tensor, advantages: Tensor, objective: ObjectiveConfig) -> Tensor:
    """-1 where the clip's low side silences the token, 1 where its high side does, else 0. (M,) float."""
    if objective.policy == "clip":
        low, high = clip_sides(ratio, advantages, low=objective.clip_low, high=objective.clip_high)
    elif objective.policy in ("cispo", "gmpo"):  # these bound the ratio whatever the sign of the advantage
        low, high = ratio < 1 - objective.clip_low, ratio > 1 + objective.clip_high
    else:
        low = high = torch.zeros_like(ratio, dtype=torch.bool)
    return high.float() - low.float()


def _at_their_places(values: list[float], mask: list[bool] | None) -> list[float | None]:
    if mask is None:
        return list(values)
    rest = iter(values)
    return [next(rest) if sampled else None for sampled in mask]
