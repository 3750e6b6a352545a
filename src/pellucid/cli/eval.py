"""`pellucid eval`: numbers on held-out problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pellucid.cli.base import OpensModel, Positional, prepare
from pellucid.errors import BadInput

if TYPE_CHECKING:
    from pellucid.align.rewards import Reward
    from pellucid.align.rollout import Group
    from pellucid.nn import Decoder
    from pellucid.tasks import Completion, Mixture, Problem
    from pellucid.tokenizers import Tokenizer


@dataclass(frozen=True)
class Eval(OpensModel):
    """Greedy accuracy and pass@k on problems that no training has seen; format, reasoning and length apart.
    在训练从未见过的题目上：贪心准确率与 pass@k；格式、推理、长度分开统计。

    $ pellucid eval runs/grow/model --tasks countdown sorting --k 8
    $ pellucid eval runs/grow/model --tasks sorting --budgets 0 16 32 64
    $ pellucid eval runs/grow/model --tasks arithmetic --k 8 --reward-model runs/prm/model
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
    """Above 1: k samples of each problem at temperature 1: pass@k, and what a choice among them would reach (the answer that most of them
    end in; with --reward-model the best scored, and votes weighted by the score).
    大于 1 时：每题以温度 1 采样 k 次，给出 pass@k 以及从中选择所能达到的准确率（多数投票；给出 --reward-model 时还有最高分与加权投票）。"""
    reward_model: tuple[str, ...] = ()
    """Trained reward models that choose among the k samples: [NAME=]FOLDER, then *WEIGHT. A process model (`align prm`) is recognised: it
    judges the steps, and their minimum, product and last one each choose and weigh votes (with ?combine=last only that one).
    在 k 个样本中作选择的奖励模型：[名称=]目录，可接 *权重。过程奖励模型（align prm）会被识别：它逐步打分，分别以各步的最小值、乘积、末步
    作选择与加权投票（?combine=last 则只用该种）。"""
    budgets: tuple[int, ...] = ()
    """Accuracy against thinking: most tokens of a thought, which is ended for the model when they are spent; one measurement each.
    准确率随思考长度的曲线：思考词元的上限，用尽时替模型结束思考；每个上限测一次。"""
    waits: int = 0
    """With --budgets: how often the end of a thought is taken back, and "Wait" written instead.
    与 --budgets 同用：撤回思考结束并写入 "Wait" 的次数。"""
    max_tokens: int = 100
    """Longest completion.
    最长回答。"""
    corpus: Path | None = None
    """Text for bits per byte, all of it; by default the held-out part of Python's own documentation.
    用于计算每字节比特的文本（全部使用）；默认为 Python 自带文档的留出部分。"""


def task_of(names: tuple[str, ...]) -> Mixture:
    """The named tasks in equal shares."""
    from pellucid import tasks

    return tasks.Mixture([(tasks.make(name), 1.0) for name in names])


def text_bits(config: Eval, model: Decoder, tokenizer: Tokenizer) -> tuple[float, int]:
    """Bits per byte, and over how many bytes."""
    from pellucid.data import corpora, packing
    from pellucid.data.split import divide
    from pellucid.train import bits_per_byte, held_out_loss, token_bytes

    texts = list(corpora.read(config.corpus)) if config.corpus else divide(corpora.standard_library("docs"))[1]
    T = min(256, model.spec.context)
    rows = packing.pack_stream(tokenizer.encode_each([d.text for d in texts]), T, remainder="pad", pad_id=tokenizer.pad_id)
    sizes = token_bytes(tokenizer)
    labels = rows.labels[rows.labels != packing.IGNORE]
    return bits_per_byte(held_out_loss(model, rows)[0], labels, sizes), int(sizes[labels].sum())


def choices(task: Mixture, groups: Sequence[Group], ks: Sequence[int], scored: Sequence[Sequence[float]] = (),
            process: Mapping[str, Sequence[Sequence[float]]] = {}) -> dict[str, list[float]]:
    """Accuracy of each way to choose among k of the samples, for each k. scored: the score of every sample, if there are any (log-odds);
    process: the same by process models, ways to combine their steps by name (probabilities, which are votes as they are)."""
    import math

    from pellucid.align.checkers import part_of
    from pellucid.align.rollout import completions
    from pellucid.align.selection import best_of_k, vote_of_k
    from pellucid.tasks import finished_only, pass_at_k
    from pellucid.tasks.evaluate import grade

    table: dict[str, list[list[float]]] = {}
    for i, (group, made) in enumerate(zip(groups, completions(groups))):
        right = [finished_only(grade(task, group.problem, c), c.finished)["correct"] == 1.0 for c in made]
        answers = [" ".join(part_of((c.turns or (c.text,))[-1], "answer").split()) or None if c.finished else None for c in made]
        rows = {"pass@k": [pass_at_k(len(right), sum(right), k) for k in ks],
                "majority": [vote_of_k(right, answers, k, None, str.__eq__) for k in ks]}
        if scored:
            weights = [1 / (1 + math.exp(-max(min(s, 500.0), -500.0))) for s in scored[i]]
            rows |= {"best-of-k": [best_of_k(right, scored[i], k) for k in ks],
                     "weighted": [vote_of_k(right, answers, k, weights, str.__eq__) for k in ks]}
        for how, each in process.items():
            rows |= {f"best-of-k {how}": [best_of_k(right, each[i], k) for k in ks],
                     f"weighted {how}": [vote_of_k(right, answers, k, each[i], str.__eq__) for k in ks]}
        for name, row in rows.items():
            table.setdefault(name, []).append(row)
    return {name: [math.fsum(column) / len(rows) for column in zip(*rows)] for name, rows in table.items()}


def show_choices(config: Eval, task: Mixture, groups: Sequence[Group], models: Sequence[Reward]) -> None:
    from pellucid import events
    from pellucid.align.components import total_reward
    from pellucid.align.rewards import RewardSet, batch_of
    from pellucid.align.selection import ProcessReward

    scored: list[list[float]] = []
    process = [model for model in models if isinstance(model.function, ProcessReward)]
    if outcome := [model for model in models if not isinstance(model.function, ProcessReward)]:
        given = RewardSet(outcome).score(batch_of(groups))
        scored = total_reward(given.matrix(config.k), given.weights).nan_to_num(nan=-1e9).tolist()
    ks = sorted({2**i for i in range(config.k.bit_length())} | {config.k})
    table = choices(task, groups, ks, scored, by_steps(groups, process))
    events.emit(events.Evaluation("eval", "choosing", table["majority"][-1], {"k": ks, **table}))
    width = max(12, *map(len, table))
    print(f"{'of k samples':<{width}} " + " ".join(f"{k:>8}" for k in ks))
    for name, row in table.items():
        print(f"{name:<{width}} " + " ".join(f"{value:>8.1%}" for value in row))


def by_steps(groups: Sequence[Group], models: Sequence[Reward]) -> dict[str, list[list[float]]]:
    """What process models say of every sample, by how the scores of its steps are combined; 0 where it has no step that could be read."""
    from pellucid.align.rewards import batch_of
    from pellucid.align.selection import COMBINE, ProcessReward

    batch, found = batch_of(groups), dict[str, list[list[float]]]()
    for model in models:
        assert isinstance(model.function, ProcessReward)
        steps = model.function.by_step(batch.prompts, batch.completions)
        for how in (model.function.combine,) if model.function.combine else ("min", "product", "last"):
            ends = iter(COMBINE[how](s) if s else 0.0 for s in steps)
            found[f"{model.name} {how}" if len(models) > 1 else how] = [[next(ends) for _ in group.samples] for group in groups]
    return found


def show_budgets(config: Eval, task: Mixture, model: Decoder, tokenizer: Tokenizer) -> None:
    from pellucid.align.thinking import Budget, thinking_curve
    from pellucid.engine import LLM

    points = thinking_curve(LLM(model, tokenizer), task, [Budget(b, config.max_tokens, config.waits) for b in config.budgets],
                            config.problems, seed=config.seed or 0)
    print(f"{'budget':<12} {'thought':>8} {'pass@1':>8} {'±':>8} {'forced':>8} {'waits':>8}")
    for p in points:
        print(f"{p.budget:<12} {p.thinking_tokens:>8.1f} {p.accuracy:>8.1%} {p.standard_error:>8.1%} {p.forced:>8.1%} {p.waited:>8.2f}")


def evaluate(config: Eval) -> None:
    from pellucid import events, tasks
    from pellucid.align.reward_specs import model_of
    from pellucid.align.rollout import Rollouts, completions
    from pellucid.engine.opening import open_model
    from pellucid.tokenizers import Tokenizer

    if config.reward_model and config.k < 2:
        raise BadInput("--reward-model chooses among samples", "there is one of each problem", "give --k 8")
    if config.waits and not config.budgets:
        raise BadInput("--waits goes with --budgets", "without a budget a thought has no end that is watched", "give --budgets 64")
    prepare(config)
    task = task_of(config.tasks)
    judging = [model_of(spec, Tokenizer.load(config.model), config.device) for spec in config.reward_model]
    # As `serve` and `chat` open it: an INT8 folder is measured with its INT8 products.
    model, tokenizer = open_model(config.model, device=config.device, allow_missing=config.allow_missing), Tokenizer.load(config.model)
    rollouts = Rollouts(model, tokenizer, task, max_tokens=config.max_tokens)
    groups: list[Group] = []

    def generate(problems: list[Problem], draws: int, temperature: float) -> list[list[Completion]]:
        groups[:] = rollouts.ungraded(problems, draws, temperature, config.seed or 0)
        return completions(groups)

    scores = tasks.evaluate(task, generate, config.problems, config.k, config.seed or 0)
    events.emit(events.Evaluation("eval", "pass@1", scores.pass_at_1, scores.record()))
    print(f"{'task':<12} {'pass@1':>8} {f'pass@{scores.k}':>8} {'format':>8} {'length':>8} {'cut off':>8}")
    for name, row in [*scores.by_task.items(), ("all", scores.record())]:
        print(f"{name:<12} {row['pass_at_1']:>8.1%} {row['pass_at_k']:>8.1%} {row['format']:>8.1%} "
              f"{row['mean_length']:>8.1f} {row['truncated']:>8.1%}")
    if config.k > 1:
        show_choices(config, task, groups, judging)
    if config.budgets:
        show_budgets(config, task, model, tokenizer)
    value, size = text_bits(config, model, tokenizer)
    events.emit(events.Evaluation("eval", "bits per byte", value, {"bytes": size}))
    print(f"bits per byte {value:.3f} on {size:,} bytes of {config.corpus or 'held-out Python documentation'}")
    print(f"temperature {scores.temperature:g}, {scores.n} problems, standard error of pass@1 {scores.standard_error:.1%}")
