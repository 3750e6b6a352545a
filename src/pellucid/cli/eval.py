"""`pellucid eval`: numbers on held-out problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pellucid.cli.base import Common, Positional, prepare

if TYPE_CHECKING:
    from pellucid.tasks import Mixture


@dataclass(frozen=True)
class Eval(Common):
    """Greedy accuracy and pass@k on problems that no training has seen; format, reasoning and length apart.
    在训练从未见过的题目上：贪心准确率与 pass@k；格式、推理、长度分开统计。

    $ pellucid eval runs/grow/model --tasks countdown sorting --k 8
    """

    model: Positional[str]
    """Checkpoint: a folder or a Hub id.
    检查点：目录或 Hub id。"""
    tasks: tuple[str, ...] = ("countdown", "arithmetic", "sorting", "calculator")
    """Tasks, in equal shares.
    任务（等比例）。"""
    problems: int = 200
    """Held-out problems.
    留出题数。"""
    k: int = 1
    """Above 1: k samples of each problem at temperature 1, and pass@k.
    大于 1 时：每题以温度 1 采样 k 次，并给出 pass@k。"""
    max_tokens: int = 100
    """Longest completion.
    最长回答。"""


def task_of(names: tuple[str, ...]) -> Mixture:
    """The named tasks in equal shares."""
    from pellucid import tasks

    return tasks.Mixture([(tasks.make(name), 1.0) for name in names])


def evaluate(config: Eval) -> None:
    from pellucid import events, tasks
    from pellucid.align.rollout import Rollouts
    from pellucid.models import load
    from pellucid.tokenizers import Tokenizer

    device, task = prepare(config), task_of(config.tasks)
    model, tokenizer = load(config.model, device=str(device)), Tokenizer.load(config.model)
    rollouts = Rollouts(model, tokenizer, task, max_tokens=config.max_tokens)
    scores = tasks.evaluate(task, rollouts.for_evaluation(config.seed or 0), config.problems, config.k, config.seed or 0)
    events.emit(events.Evaluation("eval", "pass@1", scores.pass_at_1, scores.record()))
    print(f"{'task':<12} {'pass@1':>8} {f'pass@{scores.k}':>8} {'format':>8} {'length':>8} {'cut off':>8}")
    for name, row in [*scores.by_task.items(), ("all", scores.record())]:
        print(f"{name:<12} {row['pass_at_1']:>8.1%} {row['pass_at_k']:>8.1%} {row['format']:>8.1%} "
              f"{row['mean_length']:>8.1f} {row['truncated']:>8.1%}")
    print(f"temperature {scores.temperature:g}, {scores.n} problems, standard error of pass@1 {scores.standard_error:.1%}")
