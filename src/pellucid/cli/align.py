"""`pellucid align grpo`: reinforcement learning on verifiable tasks, for any checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pellucid.cli.base import OpensModel, Positional, prepare


@dataclass(frozen=True)
class Grpo(OpensModel):
    """Group-relative policy optimisation: sample groups, grade them, push towards what earned more.
    组相对策略优化：成组采样、打分、朝得分高的方向更新。

    $ pellucid align grpo runs/grow/model --tasks countdown sorting --minutes 3
    """

    model: Positional[str]
    """Checkpoint to start from: a folder or a Hub id.
    起始检查点：目录或 Hub id。"""
    tasks: tuple[str, ...] = ("countdown", "arithmetic", "sorting", "calculator")
    """Tasks, in equal shares: countdown, arithmetic, sorting, calculator.
    任务（等比例混合）。"""
    out: Path = Path("runs/grpo")
    """Folder for the model and the resume state.
    结果与续训状态的目录。"""
    steps: int | None = None
    """Rollouts; or give --minutes.
    采样轮数；或用 --minutes。"""
    minutes: float | None = None
    """Length of the run in minutes.
    分钟数。"""
    prompts: int = 32
    """Problems in a rollout.
    每轮题目数。"""
    group: int = 8
    """Completions of each problem.
    每题采样数。"""
    max_tokens: int = 100
    """Longest completion.
    最长回答。"""
    temperature: float = 1.0
    """Sampling temperature, also of every log-probability in the objective.
    采样温度（目标中的对数概率同此温度）。"""
    recipe: str = "pellucid-grow"
    """Objective: pellucid-grow, grpo, dr-grpo, dapo, gspo, gdpo, rloo, cispo, sapo ... Its formula is printed.
    目标函数预设；公式会打印出来。"""
    optimizer: Literal["muon", "adamw"] = "adamw"
    """Optimizer.
    优化器。"""
    lr: float = 2e-6
    """Learning rate (about 4e-4 for a model of a million parameters).
    学习率（百万参数的模型约 4e-4）。"""
    problems: int = 100
    """Held-out problems of each evaluation.
    每次评测的留出题数。"""
    resume: bool = False
    """Go on with the interrupted run in the same folder.
    继续同一目录中被中断的训练。"""


def grpo(config: Grpo) -> None:
    from pellucid import events
    from pellucid.align import formula, recipe
    from pellucid.align.online import OnlineConfig, OnlineLoop
    from pellucid.cli.eval import task_of
    from pellucid.models import load, save
    from pellucid.optim import OptimConfig
    from pellucid.tasks import evaluate as measure
    from pellucid.tokenizers import Tokenizer

    device, task = prepare(config), task_of(config.tasks)
    extra: dict[str, Any] = {"max_tokens": config.max_tokens} if config.recipe == "dr-grpo" else {}
    objective = recipe(config.recipe, **extra)
    events.note(formula(objective))
    model, tokenizer = load(config.model, device=str(device), allow_missing=config.allow_missing), Tokenizer.load(config.model)
    seconds = None if config.minutes is None else config.minutes * 60
    steps = config.steps if config.steps is not None or seconds is not None else 20
    loop = OnlineLoop(
        model, tokenizer, task, OnlineConfig(
            steps=steps, seconds=seconds, prompts=config.prompts, group=config.group, max_tokens=config.max_tokens,
            temperature=config.temperature, objective=objective, optim=OptimConfig(config.optimizer, lr=config.lr),
            seed=config.seed or 0),
        evaluate=lambda: evaluation(), checkpoint=config.out / "checkpoint", resume_hint="the same command with --resume")

    def evaluation() -> tuple[str, float, dict[str, Any]]:
        scores = measure(task, loop.rollouts.for_evaluation(0), config.problems, 1, 1)
        return "pass@1", scores.pass_at_1, {"format": scores.format, "mean_length": scores.mean_length}

    before = evaluation()[1]  # of the given weights: measured before a resumed run's own are read
    if config.resume and not loop.resume():
        events.note(f"nothing to resume in {config.out}: starting from {config.model}", "warning")
    history = loop.run()
    save(model, config.out / "model", tokenizer=tokenizer)
    after = history.evaluations[-1][1]
    events.emit(events.StageEnd("grpo", history.seconds, before, after, "greedy accuracy on held-out problems", "", True))
    print(f"held-out accuracy {before:.1%} -> {after:.1%}; model in {config.out / 'model'}")
