"""What `--dry-run` shows: the objective as a formula, the arithmetic of a step, memory, and the first group as the model sees it."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pellucid import events
from pellucid.cli.failures import is_terminal

if TYPE_CHECKING:
    from pellucid.align.online_config import OnlineConfig
    from pellucid.align.rewards import RewardSet
    from pellucid.align.rollout import Group
    from pellucid.cli.align import Online
    from pellucid.nn import Decoder
    from pellucid.tokenizers import Tokenizer

TRAINED, GIVEN, PLAIN = "\x1b[30;42m", "\x1b[2m", "\x1b[0m"


@dataclass
class DryRun(events.Event):
    """What a run would do. arithmetic, memory (bytes): by name; examples: ids with their mask (1: trained) and what belongs to them."""

    kind = "dry_run"
    method: str
    objective: str
    arithmetic: dict[str, Any]
    memory: dict[str, int]
    examples: list[dict[str, Any]]


def show_online(config: Online, settings: OnlineConfig, task: Any, rewards: RewardSet, model: Decoder, tokenizer: Tokenizer) -> None:
    """One real group is sampled and graded, so that rewards are tried before the run."""
    from pellucid.align import formula
    from pellucid.align.estimate import memory
    from pellucid.align.rollout import Rollouts

    rollouts = Rollouts(model, tokenizer, task, max_tokens=settings.max_tokens, rewards=rewards, top_p=settings.top_p,
                        top_k=settings.top_k, tools={"auto": None, "describe": True, "omit": False}[config.tools])
    rng = random.Random(settings.seed)
    problems = [task.sample(rng, "train") for _ in range(settings.prompts)]
    lengths = [len(rollouts.prompt(p)) for p in problems]
    (group,) = rollouts.groups(problems[:1], max(2, settings.group), settings.temperature, settings.seed)
    facts, needed = arithmetic(settings, task, lengths), memory(model, settings, max(lengths))
    worth = advantages(group, rewards, settings)
    examples = [example(s.prompt, s.tokens, s.mask, tokenizer) | {"rewards": r, "advantage": a, "finish_reason": s.finish_reason}
                for s, r, a in zip(group.samples, group.rewards, worth)]
    told = formula(settings.objective)
    events.emit(DryRun(settings.stage, told, facts, needed, examples))
    print(f"objective\n{_indented(told)}\n\na step")
    print(_indented("\n".join(sentences(settings, facts))))
    print(f"\nmemory of all tensors, about (the process itself takes some 0.3 GiB more)\n{_indented(sizes(needed))}\n\nrewards")
    for name in rewards.names:
        condition = f", where {rewards.conditions[name][0]} >= {rewards.conditions[name][1]:g}" if name in rewards.conditions else ""
        print(f"  {name}: weight {rewards.weights[name]:g}{condition}{' (measured, not trained on)' if not rewards.weights[name] else ''}")
    print(f"\nthe first group as the model sees it: 1 of {settings.prompts} prompts, {len(group.samples)} completions of it\n{legend()}")
    print(f"  prompt, {len(group.samples[0].prompt)} tokens: {marked(tokenizer, group.samples[0].prompt, [False] * len(group.samples[0].prompt))}")
    for number, (s, x) in enumerate(zip(group.samples, examples), 1):
        parts = "  ".join(f"{name} {value:g}" for name, value in x["rewards"].items()) or "no reward could be given"
        print(f"\n  completion {number}: {s.trained} trained tokens of {len(s.tokens)}, {'ended' if s.finish_reason == 'stop' else 'cut off'}"
              f"\n  rewards: {parts}   advantage: {x['advantage']:+.3f}\n  {marked(tokenizer, s.tokens, s.mask or [True] * len(s.tokens))}")
    print("\n" + _indented(MEANING))


MEANING = """what these are
prompt      up to where the assistant writes, by the chat template; never trained
completion  what was sampled, token by token; a tool's answers stand in it and are not trained
rewards     the components, before weights, after conditions
advantage   how much better than its group a completion is, by the objective above; the sign says which way its tokens move
            (with a critic or token returns: the total reward, which is spread over the tokens in the run)"""


def advantages(group: Group, rewards: RewardSet, settings: OnlineConfig) -> list[float]:
    """Of the completions of one group; whitening needs a whole step, so it is left out here."""
    from dataclasses import replace

    import torch

    from pellucid.align.credit import assign_credit
    from pellucid.align.rollout import components, trained_lengths, truncated

    cfg = settings.objective if settings.objective.by_token else replace(settings.objective, whiten="none", eps=settings.objective.eps)
    parts = components([group])
    if not parts:
        return [0.0] * len(group.samples)
    lengths = trained_lengths([group])
    credit = assign_credit(parts, lengths, cfg, weights={k: w for k, w in rewards.weights.items() if k in parts},
                           truncated=truncated([group]), kl=torch.zeros(lengths.shape))
    return [float(a) for a in credit.advantages[0]]


def arithmetic(settings: OnlineConfig, task: Any, lengths: Sequence[int]) -> dict[str, Any]:
    from pellucid.align.prompts import Prompts

    s = settings
    completions = s.prompts * s.group
    facts: dict[str, Any] = {
        "prompts": s.prompts, "group": s.group, "completions": completions, "max_tokens": s.max_tokens, "longest_prompt": max(lengths),
        "mean_prompt": sum(lengths) / len(lengths), "optimizer_steps": s.epochs * s.updates, "completions_per_update": completions / s.updates,
        "micro_rows": s.micro_rows, "steps": s.steps, "seconds": s.seconds}
    if s.steps:
        facts |= {"total_completions": s.steps * completions, "most_sampled_tokens": s.steps * completions * s.max_tokens}
    if isinstance(task, Prompts):
        facts |= {"rows": len(task.train), "held_out": len(task.heldout)}
        if s.steps:
            facts["epochs_of_data"] = s.steps * s.prompts / len(task.train)
    return facts


def sentences(settings: OnlineConfig, f: dict[str, Any]) -> list[str]:
    s = settings
    most = f" (up to {s.rounds} rollouts where groups teach nothing)" if s.objective.dead_groups == "drop" and s.rounds > 1 else ""
    lines = [f"{s.prompts} prompts x {s.group} completions = {f['completions']:,} completions{most}, each at most {s.max_tokens} tokens behind "
             f"{f['mean_prompt']:.0f} of prompt (longest of these {f['longest_prompt']}), temperature {s.temperature:g}",
             f"{s.epochs} pass{'es' if s.epochs > 1 else ''} x {s.updates} update{'s' if s.updates > 1 else ''} = {f['optimizer_steps']} optimizer "
             f"step{'s' if f['optimizer_steps'] > 1 else ''}, each on {f['completions_per_update']:g} completions, in micro-batches of {s.micro_rows} "
             "packed rows (memory only)"]
    if s.lag:
        lines.append(f"samples are learned from {s.lag} step{'s' if s.lag > 1 else ''} after the weights that drew them"
                     + (", and made beside the update, by a copy of the weights" if s.overlap else ""))
    if s.steps:
        lines.append(f"{s.steps} steps = {f['total_completions']:,} completions, at most {f['most_sampled_tokens']:,} sampled tokens")
    else:
        lines.append(f"as many steps as {s.seconds:g} seconds allow")
    if "rows" in f:
        times = f", gone through {f['epochs_of_data']:.2f} times" if "epochs_of_data" in f else ""
        lines.append(f"data: {f['rows']:,} prompts to learn from{times}; {f['held_out']:,} held out by a hash of their text")
    return lines


def example(prompt: list[int], tokens: list[int], mask: list[bool] | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """Plain data: all ids, which of them are trained, and both texts."""
    return {"ids": prompt + tokens, "mask": [0] * len(prompt) + [int(m) for m in mask or [True] * len(tokens)],
            "prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(tokens)}


def legend() -> str:
    if is_terminal(sys.stdout):
        return f"  {TRAINED}trained{PLAIN} {GIVEN}read only{PLAIN}"
    return "  ⟦trained⟧ read only"


def marked(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[bool]) -> str:
    """The text with special tokens; what is trained stands out, by colour on a terminal, else between ⟦ and ⟧."""
    from pellucid.cli.display import printable

    colour, text, at = is_terminal(sys.stdout), "", 0
    for trained, part in groupby(mask):
        count = len(list(part))
        piece = printable(tokenizer.decode(list(ids[at : at + count])))
        at += count
        if colour:
            text += (TRAINED if trained else GIVEN) + piece + PLAIN
        else:
            text += f"⟦{piece}⟧" if trained else piece
    return text


def sizes(needed: dict[str, int]) -> str:
    return " · ".join(f"{name} {size / 2**30:.2f} GiB" if size >= 2**30 else f"{name} {size / 2**20:.1f} MiB" for name, size in needed.items())


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
