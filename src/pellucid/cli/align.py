"""`pellucid align METHOD`: a model becomes better by rewards, with any objective of the online family.

What all methods share: options, where prompts and rewards come from, what a dry run shows, the run itself. Each method is a
preset of the objective (`align/recipes.py`); the verbs themselves are in `align_methods.py`.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pellucid.cli.base import OpensModel, Positional, prepare
from pellucid.errors import BadInput, nearest

if TYPE_CHECKING:
    from pellucid.align.online import OnlineConfig, OnlineLoop
    from pellucid.align.prompts import Prompts
    from pellucid.align.rewards import RewardSet
    from pellucid.tasks import Problem, Task
    from pellucid.tokenizers import Tokenizer

DEFAULT_TASKS = ("countdown", "arithmetic", "sorting", "calculator")


@dataclass(frozen=True)
class Online(OpensModel):
    """What the online methods share."""

    ALIASES: ClassVar[dict[str, str]] = {"--task": "--tasks", "--rewards": "--reward"}

    model: Positional[str]
    """Checkpoint to start from: a folder or a Hub id. Also as --model.
    起始检查点：目录或 Hub id；也可写作 --model。"""
    tasks: tuple[str, ...] = ()
    """Tasks in equal shares (also --task): countdown, arithmetic, sorting, calculator, copying, chain, brackets, json, lookup, toolrl, brevity,
    hackable, bandit, or your own as file.py:Class. Without --data the default is the first four.
    任务，等比例混合（也可写作 --task）；可用 file.py:Class 指定自己的任务。未给 --data 时默认前四个。"""
    data: str | None = None
    """Prompts to learn from, instead of tasks: a .jsonl, .json or .parquet file, a folder or a Hub id; needs a --reward.
    提示数据（代替任务）：.jsonl、.json、.parquet 文件、目录或 Hub id；需同时给出 --reward。"""
    split: str = "train"
    """Which part of a data set with several.
    数据集含多个部分时取哪一部分。"""
    reward: tuple[str, ...] = ()
    """Rewards: [NAME=]file.py:function, module:function, a checker such as math, or a component of the task; then *WEIGHT and @OTHER>=1 (only
    where that one is reached). May be repeated.
    奖励：[名称=]file.py:函数、module:函数、内置检查器或任务分量；可接 *权重 与 @其他>=1。可重复。"""
    reward_model: tuple[str, ...] = ()
    """Trained reward models (of `align rm` or `align prm`): [NAME=]FOLDER, then *WEIGHT; of a process model also ?combine=product (min, mean,
    last). May be repeated.
    训练好的奖励模型（由 align rm 或 align prm 得到）：[名称=]目录，可接 *权重；过程奖励模型还可接 ?combine=product（min、mean、last）。可重复。"""
    recipe: str | None = None
    """Objective, instead of the method's own: ppo, grpo, dr-grpo, dapo, gspo, gdpo, rloo, reinforce++, cispo, sapo, pellucid-grow ...
    目标函数预设（代替方法自带的）。"""
    advantage: str | None = None
    """group, gdpo, pass@k, gae (a critic), returns; by default the method's, as for all that follow up to --set.
    优势估计；以下直到 --set 的选项默认均取方法自带的值。"""
    scale: str | None = None
    """Divide advantages by the std of: group, batch, none.
    优势除以何处的标准差。"""
    aggregation: str | None = None
    """From tokens to the loss: sequence-mean, token-mean, token-mean-local, constant, sequence-sum, token-sum.
    词元损失的汇总方式。"""
    clip_low: float | None = None
    """The ratio is clipped below 1 minus this.
    比率下截断。"""
    clip_high: float | None = None
    """The ratio is clipped above 1 plus this.
    比率上截断。"""
    beta: float | None = None
    """Weight of the KL term in the loss.
    损失中 KL 项的权重。"""
    kl: str | None = None
    """Estimator of that term: k1, k2, k3, k3+, k3-corrected, abs.
    KL 估计量。"""
    reward_beta: float | None = None
    """Weight of the KL penalty inside the reward.
    奖励中 KL 惩罚的权重。"""
    entropy: float | None = None
    """Weight of the entropy bonus.
    熵奖励的权重。"""
    set: tuple[str, ...] = ()
    """Any other choice of the objective or the loop as NAME=VALUE: whiten=token, ratio=sequence, truncated=mask, dead_groups=drop, lag=1
    (the next rollout is sampled beside the update), top_k=50, rounds=4, correction=truncate ...
    目标函数或训练循环的其他选择，写作 名称=值。"""
    prompts: int = 32
    """Prompts in a rollout.
    每轮提示数。"""
    group: int = 8
    """Completions of each prompt.
    每个提示的采样数。"""
    max_tokens: int = 100
    """Longest completion; of a dialogue with tools, all of it behind the prompt.
    最长回答；多轮工具对话则为提示之后的全部长度。"""
    temperature: float = 1.0
    """Sampling temperature, also of every log-probability in the objective.
    采样温度（目标中的对数概率同此温度）。"""
    top_p: float | None = None
    """Sample from the nucleus of this mass; ratios stay exact.
    核采样；比率保持精确。"""
    epochs: int = 1
    """Passes over each rollout.
    每轮采样学习的遍数。"""
    updates: int = 1
    """Optimizer steps in a pass.
    每遍的优化步数。"""
    micro_rows: int = 32
    """Packed rows in a micro-batch: memory only, the numbers stay.
    微批行数：只影响内存，不影响数值。"""
    tools: Literal["auto", "describe", "omit"] = "auto"
    """Whether the chat template is told of a task's tools; auto: in dialogues.
    是否在聊天模板中描述工具；auto：多轮对话时描述。"""
    steps: int | None = None
    """Steps, a rollout and what is learned from it each; or give --minutes. By default 20.
    步数（每步为一轮采样及其学习）；或用 --minutes。默认 20。"""
    minutes: float | None = None
    """Length of the run in minutes.
    分钟数。"""
    optimizer: Literal["muon", "adamw"] = "adamw"
    """Optimizer.
    优化器。"""
    lr: float = 2e-6
    """Learning rate (about 4e-4 for a model of a million parameters).
    学习率（百万参数的模型约 4e-4）。"""
    lora: int | None = None
    """Train adapters of this rank only; the reference is the model without them, so that it takes no memory.
    只训练此秩的 LoRA 适配器；参考模型即关闭适配器的原模型，不另占内存。"""
    lora_experts: bool = False
    """With --lora: adapters for every expert of a mixture, too (PEFT's target_parameters).
    与 --lora 同用：为混合专家的每个专家也加适配器（即 PEFT 的 target_parameters）。"""
    problems: int = 100
    """Most held-out problems or prompts of each evaluation.
    每次评测最多的留出题数。"""
    out: Path | None = None
    """Folder for the model, the log and the resume state; by default runs/METHOD.
    结果、日志与续训状态的目录；默认 runs/方法名。"""
    processes: int = 1
    """Processes that do the run together, each its share of a step (torchrun does as well); one computes the same.
    共同完成训练的进程数，各做每步的一份（也可用 torchrun 启动）；结果与单进程相同。"""
    dry_run: bool = False
    """Print the formula, the arithmetic of a step, the memory and the first group as the model sees it, and stop.
    只打印公式、每步算术、内存与模型所见的第一组样本，然后停止。"""
    resume: bool = False
    """Go on with the interrupted run in the same folder.
    继续同一目录中被中断的训练。"""


FLAGS = {"advantage": "advantage", "scale": "scale", "aggregation": "aggregation", "clip_low": "clip_low", "clip_high": "clip_high",
         "beta": "beta", "kl": "kl", "reward_beta": "reward_beta", "entropy": "entropy_coef"}  # of the verb -> of the objective
NONE_IS_A_NAME = ("whiten", "scale", "correction", "weighting")  # of a choice, not its absence
LOOP = ("rounds", "lag", "overlap", "top_k", "evaluations", "samples_shown", "clip")  # of the loop, by --set


def settings_of(config: Online, method: str) -> OnlineConfig:
    """The resolved choices, refused where they are impossible, before any work."""
    from pellucid.align import recipe
    from pellucid.align.online_config import OnlineConfig, check_config
    from pellucid.optim import OptimConfig

    check_length(config.steps, config.minutes)
    objective, loop = choices_of(config.set)
    given = {field: getattr(config, flag) for flag, field in FLAGS.items() if getattr(config, flag) is not None}
    if twice := sorted(set(given) & set(objective)):
        raise BadInput(f"{twice[0]} is given twice", "as a flag and by --set", "give it once")
    name, changes = config.recipe or method, given | objective
    if name == "dr-grpo" or changes.get("aggregation") == "constant":
        changes.setdefault("max_tokens", config.max_tokens)
    seconds = None if config.minutes is None else config.minutes * 60
    steps = config.steps if config.steps is not None or seconds is not None else 20
    settings = OnlineConfig(
        stage=method, steps=steps, seconds=seconds, prompts=config.prompts, group=config.group, max_tokens=config.max_tokens,
        temperature=config.temperature, top_p=config.top_p, epochs=config.epochs, updates=config.updates, micro_rows=config.micro_rows,
        objective=recipe(name, **changes), optim=OptimConfig(config.optimizer, lr=config.lr), seed=config.seed or 0)
    settings = replace(settings, **loop)
    check_config(settings)
    return settings


def check_length(steps: int | None, minutes: float | None) -> None:
    """A run by steps and by the clock at once, or of no length, is refused before data and weights are read."""
    from pellucid.train.budget import Budget

    if steps is not None or minutes is not None:  # neither: the method's own number
        Budget(steps, None if minutes is None else minutes * 60)


def choices_of(words: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """--set NAME=VALUE ... as choices of the objective and of the loop."""
    from dataclasses import fields

    from pellucid.align import ObjectiveConfig

    made = chosen(words, [*(f.name for f in fields(ObjectiveConfig)), *LOOP], "whiten=token lag=1")
    return {k: v for k, v in made.items() if k not in LOOP}, {k: v for k, v in made.items() if k in LOOP}


def chosen(words: tuple[str, ...], known: Sequence[str], example: str) -> dict[str, Any]:
    """NAME=VALUE ... by name; values are JSON where they can be read as such, else texts."""
    made: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in known:
            raise BadInput(f"--set {word} cannot be read" if not equals else f"there is no choice {name!r}{nearest(name, list(known))}",
                           f"the choices are {', '.join(known)}", f"for instance --set {example}")
        try:
            made[name] = None if text == "none" and name not in NONE_IS_A_NAME else json.loads(text)
        except ValueError:
            made[name] = text
    return made


def prompts_of(config: Online) -> Task | Prompts:
    """Where problems come from."""
    from pellucid.align.prompts import Prompts
    from pellucid.cli.eval import task_of

    if config.data is not None and config.tasks:
        raise BadInput("--data and --tasks are both given", "a run learns from one of them", "leave one out")
    if config.data is not None:
        return Prompts.open(config.data, config.split, config.seed or 0)
    return task_of(config.tasks or DEFAULT_TASKS)


def rewards_of(config: Online, task: Any, tokenizer: Tokenizer, device: str) -> RewardSet:
    """What completions are graded with, tried against the columns there are."""
    from pellucid.align.prompts import Prompts
    from pellucid.align.reward_specs import model_of, reward_set

    data = isinstance(task, Prompts)
    if data and not (config.reward or config.reward_model):
        raise BadInput("no reward was given", "data have no grades of their own",
                       "give a function: --reward rewards.py:function, or a trained model: --reward-model FOLDER")
    models = [model_of(spec, tokenizer, device) for spec in config.reward_model]
    rewards = reward_set(config.reward, None if data else task, models)
    rewards.check(["problem", "answer", "finished", "turns", *(task.columns if data else ())])
    return rewards


def with_what_is_graded(config: Online, settings: OnlineConfig, rewards: RewardSet) -> OnlineConfig:
    """A preset may name a component (DAPO's `correct`) that these rewards do not have: then any difference counts, and is told."""
    from pellucid import events

    on = settings.objective.live_on
    if settings.objective.dead_groups != "drop" or on in ("any", "total", *rewards.names):
        return settings
    if any(word.startswith("live_on=") for word in config.set):
        raise BadInput(f"live_on={on}: there is no reward {on!r}{nearest(on, rewards.names)}", f"there are {', '.join(rewards.names)}",
                       "name one of these, or any, or total")
    events.note(f"no reward is called {on!r}: groups count as alive where any reward differs (--set live_on=NAME)")
    return replace(settings, objective=replace(settings.objective, live_on="any"))


def online(config: Online, method: str) -> None:
    """The whole run of a method."""
    from pellucid import events
    from pellucid.align import formula
    from pellucid.align.online import OnlineLoop
    from pellucid.align.recording import recorded
    from pellucid.cli.align_page import report_of
    from pellucid.models import load, save
    from pellucid.models.lora import STACKS, LoraConfig, attach, save_adapters
    from pellucid.tokenizers import Tokenizer
    from pellucid.train.ranks import joined

    settings, task = settings_of(config, method), prompts_of(config)
    device, tokenizer = prepare(config), Tokenizer.load(config.model)
    rewards = rewards_of(config, task, tokenizer, str(device))
    settings = with_what_is_graded(config, settings, rewards)
    model = load(config.model, device=str(device), allow_missing=config.allow_missing)
    if config.lora is not None:
        stacks = tuple(STACKS) if config.lora_experts else ()
        attach(model, LoraConfig(config.lora, alpha=2.0 * config.lora, target_parameters=stacks), config.seed or 0)
    elif config.lora_experts:
        raise BadInput("--lora-experts has no meaning without --lora", next="give --lora RANK")
    if config.dry_run:
        from pellucid.cli.align_dry import show_online

        show_online(config, settings, task, rewards, model, tokenizer)
        return
    ranks = joined()
    events.note(formula(settings.objective))
    out, problems = config.out or Path("runs") / method, config.problems if config.data else held_out(task, config.problems)
    loop = OnlineLoop(model, tokenizer, task, settings, rewards=rewards, evaluate=lambda: measured(loop, problems),  # type: ignore[arg-type]
                      checkpoint=out / "checkpoint", resume_hint="the same command with --resume", ranks=ranks)
    loop.rollouts.tools = {"auto": None, "describe": True, "omit": False}[config.tools]
    name, before, _ = measured(loop, problems)  # of the given weights: before a resumed run's own are read
    if config.resume and not loop.resume():
        events.note(f"nothing to resume in {out}: starting from {config.model}", "warning")
    with recorded(out, loop) if ranks.first else contextlib.nullcontext():
        history = loop.run()
        after = history.evaluations[-1][1] if history.evaluations else measured(loop, problems)[1]
        events.emit(events.StageEnd(method, history.seconds, before, after, name, "", True))
    if not ranks.first:
        return
    save(loop.plain, out / "model", tokenizer=tokenizer)  # with adapters: merged, and the adapters apart for PEFT
    if config.lora is not None:
        save_adapters(model, out / "adapters", config.model)
    shown = (f"{before:.1%} -> {after:.1%}" if name.startswith(("pass@1", "correct")) else f"{before:.4f} -> {after:.4f}")
    print(f"held-out {'accuracy' if name == 'pass@1' else name} {shown}; model in {out / 'model'}; report in {report_of(out)}")


def held_out(task: Task, most: int) -> int:
    """How many different problems a task holds out, at most so many: some have few."""
    from pellucid import events

    rng, found = random.Random(1), set()
    for _ in range(100 * most + 1000):
        found.add(task.sample(rng, "heldout").prompt)
        if len(found) == most:
            return most
    events.note(f"{task.name} holds out {len(found)} different problems; they are all measured")
    return held_out(task, len(found))


def measured(loop: OnlineLoop, problems: int) -> tuple[str, float, dict[str, Any]]:
    """On what was held out, greedily: a task's accuracy; of data the mean of what is rewarded, or of `correct` if there is one."""
    from pellucid import tasks
    from pellucid.align.components import total_reward
    from pellucid.align.prompts import Prompts
    from pellucid.align.rollout import components

    task, rollouts = loop.task, loop.rollouts
    if not isinstance(task, Prompts):
        scores = tasks.evaluate(task, loop.for_evaluation(0), problems, 1, 1)
        return "pass@1", scores.pass_at_1, {"problems": problems, "format": scores.format, "mean_length": scores.mean_length}
    asked: list[Problem] = task.measured(problems)
    parts = components(loop.groups(asked, 1, 0.0, 0))
    means = {name: float(values.nanmean()) for name, values in parts.items()}
    if "correct" in means:
        return "correct answers", means["correct"], means | {"problems": len(asked)}
    weights = {name: w for name, w in rollouts.rewards.weights.items() if name in parts}
    total = float(total_reward(parts, weights).nanmean()) if parts else float("nan")
    return "reward", total, means | {"prompts": len(asked)}
