"""Rewards as they are written on the command line.

    --reward rewards.py:correct                       a function of a file (or module:function)
    --reward math                                     one of the built-in checkers, with its defaults
    --reward short=rewards.py:short*0.5@correct>=1    named, weighted by 0.5, counted only where `correct` is at least 1
    --reward "overlong?longest=512&margin=64"         arguments of a checker
    --reward "judge=judge.py:ask?timeout=20&batch=1"  timeout and batch belong to the reward, the rest to the function

Values are JSON where they can be read as such, else texts; a `%2A` and the like stand for characters that have a meaning
here.  A function with verl's parameters (data_source, solution_str, ground_truth) is adapted.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from urllib.parse import unquote

from pellucid.align.checkers import CHECKERS
from pellucid.align.reward_scoring import StepJudge, judge_of
from pellucid.align.reward_sources import model_reward, task_reward, verl_reward
from pellucid.align.rewards import Reward, RewardSet
from pellucid.align.selection import process_reward
from pellucid.errors import BadInput, nearest
from pellucid.tasks import Task, load_object
from pellucid.tokenizers import Tokenizer

_NUMBER = r"[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?"
_SPEC = re.compile(rf"(?:(?P<name>[A-Za-z_][\w-]*)=)?(?P<source>[^?*@=]+)(?:\?(?P<options>[^*@]*))?"
                   rf"(?:\*(?P<weight>{_NUMBER}))?(?:@(?P<on>[\w-]+)>=(?P<at_least>{_NUMBER}))?")
EXAMPLE = "for instance rewards.py:correct, or short=rewards.py:short*0.5@correct>=1"


def reward_set(specs: Sequence[str], task: Task | None = None, models: Sequence[Reward] = (), **how: Any) -> RewardSet:
    """The rewards of these specs and models, beside the task's own grades where there is a task.  Errors: BadInput.

    A spec may also be the name of one of the task's components, to weigh or condition it: `length*0.5@correct>=1`.
    """
    rewards, weights, conditions = [], {}, {}
    if task is not None:
        rewards.append(task_reward(task))
    for spec in specs:
        found = _parsed(spec)
        if rewards and task is not None and found["source"] in rewards[0].parts and not found["name"]:
            weights[found["source"]] = float(found["weight"] or 1.0)
            if found["on"]:
                conditions[found["source"]] = (found["on"], float(found["at_least"]))
        else:
            rewards.append(reward_of(spec))
    return RewardSet([*rewards, *models], weights=weights, conditions=conditions, **how)


def model_of(spec: str, policy: Tokenizer, device: str = "cpu") -> Reward:
    """A trained reward model as it is written: [NAME=]FOLDER[?combine=HOW][*WEIGHT][@OTHER>=THRESHOLD], `combine` of a process model
    only.  It takes the time it needs."""
    found = _parsed(spec)
    own: dict[str, Any] = {"on": found["on"], "at_least": float(found["at_least"])} if found["on"] else {}
    options = _options(found["options"] or "", spec)
    if wrong := sorted(set(options) - {"combine"}):
        raise BadInput(f"a reward model has no option {wrong[0]!r}{nearest(wrong[0], ['combine'])}", next="for instance runs/prm/model?combine=product")
    judge = judge_of(found["source"], policy, device)
    if options and not isinstance(judge, StepJudge):
        raise BadInput(f"{found['source']} has no steps to combine", "it scores whole answers", "leave combine out, or give a process model")
    function: Any = process_reward(judge, **options, separator=judge.form.separator) if isinstance(judge, StepJudge) else judge
    return Reward(found["name"] or "reward_model", function, float(found["weight"] or 1.0), timeout=86_400.0, **own)


def reward_of(spec: str) -> Reward:
    """One reward as it is written; see the module."""
    found = _parsed(spec)
    options = _options(found["options"] or "", spec)
    own: dict[str, Any] = {name: options.pop(name) for name in ("timeout", "batch") if name in options}
    source = found["source"]
    function = _function(source, options)
    name = found["name"] or (source if source in CHECKERS else source.rpartition(":")[2].rpartition(".")[2])
    if found["on"]:
        own |= {"on": found["on"], "at_least": float(found["at_least"])}
    for option, kinds in (("timeout", (int, float)), ("batch", int)):
        if option in own and not isinstance(own[option], kinds):
            raise BadInput(f"the reward {spec!r} has {option}={own[option]!r}", "it must be a number", EXAMPLE)
    return Reward(name, function, float(found["weight"] or 1.0), **own)


def _parsed(spec: str) -> re.Match[str]:
    found = _SPEC.fullmatch(spec.strip())
    if not found:
        raise BadInput(f"the reward {spec!r} cannot be read", "it is [NAME=]SOURCE[?OPTIONS][*WEIGHT][@OTHER>=THRESHOLD]", EXAMPLE)
    return found


def _function(source: str, options: dict[str, Any]) -> Callable[..., Any]:
    if ":" not in source:
        if source not in CHECKERS:
            raise BadInput(f"there is no reward {source!r}{nearest(source, list(CHECKERS))}", f"built in are {', '.join(CHECKERS)}",
                           "or give a function of your own: module:function or file.py:function")
        try:
            return CHECKERS[source](**options)
        except TypeError as error:
            raise BadInput(f"the reward {source!r} does not take {', '.join(options) or 'nothing'}", str(error),
                           f"its arguments are {', '.join(inspect.signature(CHECKERS[source]).parameters) or 'none'}") from error
    found = load_object(source)
    if inspect.isclass(found):
        found, options = found(**options), {}
    if not callable(found) and callable(getattr(found, "score", None)):
        found = model_reward(found)
    if not callable(found):
        raise BadInput(f"{source} cannot be called", f"it is a {type(found).__name__}", "name a function")
    taken = inspect.signature(found).parameters
    if {"data_source", "solution_str", "ground_truth"} <= set(taken):
        found = verl_reward(partial(found, **options) if options else found)
        options = {}
    for option in options:
        if option not in taken:
            raise BadInput(f"{source} has no parameter {option!r}{nearest(option, list(taken))}",
                           f"it takes {', '.join(taken)}", "timeout and batch are always possible")
    return partial(found, **options) if options else found


def _options(text: str, spec: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in filter(None, text.split("&")):
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise BadInput(f"the reward {spec!r} has the option {pair!r}", "an option is written name=value", EXAMPLE)
        value = unquote(value)
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
