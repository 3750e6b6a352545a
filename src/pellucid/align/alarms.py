"""Alarms: what the numbers of a run show, said by the name that the field has for it, with what to do.

    with events.subscribed(Alarms()):      # reads `step`, `evaluation` and `group` events, emits `alarm` events
        loop.run()

Every rule compares the first steps of a stage with the latest: the difference of the two means must exceed twice its
standard error AND a least size, so that noise raises no alarm and neither does a trend too small to matter. An alarm is
raised once; only when its rule has been silent for a whole window can it come again. `replay` finds the alarms of a log.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pellucid import events
from pellucid.messages import Text, add, both, say

WINDOW = 8  # steps at either end that are compared
TRUE_METRICS = ("pass@1", "accuracy", "correct answers")  # evaluations that no reward has a part in; higher is better

add({
    "alarm.entropy_collapse": ("entropy collapse: {first:.3f} -> {last:.3f} nats a token, at {accuracy:.0%} right answers",
                               "熵坍缩：每词元 {first:.3f} -> {last:.3f} 纳特，正确率 {accuracy:.0%}"),
    "alarm.entropy_collapse.next": (
        "the policy stops exploring: raise --clip-high (0.28), add an entropy bonus (--entropy), a KL term (--beta), or lower the learning rate",
        "策略停止探索：提高 --clip-high（0.28）、加熵奖励（--entropy）、加 KL 项（--beta），或降低学习率"),
    "alarm.entropy_explosion": ("entropy explosion: {first:.3f} -> {last:.3f} nats a token", "熵爆炸：每词元 {first:.3f} -> {last:.3f} 纳特"),
    "alarm.entropy_explosion.next": (
        "the policy becomes noise: lower the learning rate or the entropy bonus, or hold it with a KL term (--beta)",
        "策略变成噪声：降低学习率或熵奖励，或用 KL 项（--beta）约束"),
    "alarm.dead_groups": (
        "dead groups: only {last:.0%} of the groups differ in reward ({right:.0%} all right, {wrong:.0%} all wrong); the others teach nothing",
        "无效组：只有 {last:.0%} 的组内奖励有差别（{right:.0%} 全对，{wrong:.0%} 全错），其余学不到东西"),
    "alarm.dead_groups.next": (
        "mostly all right: raise the difficulty; mostly all wrong: more SFT first, easier problems, partial credit; either way a larger group or dynamic sampling (--set dead_groups=drop)",
        "多为全对：提高难度；多为全错：先多做 SFT、降低难度或给部分分；两种情况都可增大组或用动态采样（--set dead_groups=drop）"),
    "alarm.reward_hacking": (
        "reward hacking: the reward rises {reward_first:.3f} -> {reward_last:.3f} while the true metric falls {true_first:.3f} -> {true_last:.3f}",
        "奖励作弊：奖励 {reward_first:.3f} -> {reward_last:.3f} 上升，而真实指标 {true_first:.3f} -> {true_last:.3f} 下降"),
    "alarm.reward_hacking.next": (
        "read completions with the highest reward, close the loophole in the reward or make it depend on the true check, and keep the checkpoint with the best held-out metric",
        "阅读奖励最高的回答，堵上奖励的漏洞或让它以真实检查为条件，并保留留出指标最好的检查点"),
    "alarm.length_drift": ("length drift: {first:.0f} -> {last:.0f} tokens a completion without more right answers ({before:.0%} -> {after:.0%})",
                           "长度漂移：每个回答 {first:.0f} -> {last:.0f} 词元，正确率却没有提高（{before:.0%} -> {after:.0%}）"),
    "alarm.length_drift.next": (
        "compare length/right with length/wrong; use a normaliser without length bias (--recipe dr-grpo or dapo) or a length reward conditioned on correctness",
        "比较 length/right 与 length/wrong；改用无长度偏置的归一化（--recipe dr-grpo 或 dapo），或以正确为条件的长度奖励"),
    "alarm.truncation": ("truncation: {last:.0%} of the completions are cut at the length limit ({first:.0%} at first)",
                         "截断：{last:.0%} 的回答在长度上限处被截断（起初 {first:.0%}）"),
    "alarm.truncation.next": ("raise --max-tokens, mask what was cut (--set truncated=mask), or penalise length softly before the limit",
                              "提高 --max-tokens、屏蔽被截断的回答（--set truncated=mask），或在上限前软惩罚长度"),
    "alarm.engine_mismatch": ("sampler-trainer mismatch: |log p| differs by {gap:.4f} a token on average, effective sample size {ess:.0%}",
                              "采样器与训练器不一致：每词元 |log p| 平均相差 {gap:.4f}，有效样本量 {ess:.0%}"),
    "alarm.engine_mismatch.next": (
        "rounding alone gives about 1e-6 in float32 and 1e-2 in bfloat16: check temperature and dtype of the sampler, sample with fresher weights, or correct (--set correction=truncate)",
        "仅舍入误差时 float32 约 1e-6、bfloat16 约 1e-2：检查采样器的温度与精度、用更新的权重采样，或加修正（--set correction=truncate）"),
    "alarm.chosen_falls": ("log p of the chosen answers falls {first:.2f} -> {last:.2f} nats while the margin grows {margin_first:.3f} -> {margin_last:.3f}",
                           "被选中回答的 log p 下降 {first:.2f} -> {last:.2f} 纳特，而间隔 {margin_first:.3f} -> {margin_last:.3f} 增大"),
    "alarm.chosen_falls.next": (
        "expected: only the margin is optimised, and both answers can lose to others. If it must not, add the sft loss (rpo), raise beta, or train shorter",
        "这是预期现象：只优化间隔，两个回答都可能让位于其他回答。若不希望如此，加 sft 损失（rpo）、增大 beta 或缩短训练"),
    "alarm.domination": ("one reward dominates: {name} makes {share:.0%} of the spread of the total", "单一奖励占主导：{name} 占总奖励离散度的 {share:.0%}"),
    "alarm.domination.next": ("the others hardly move the advantage: rescale or reweigh the rewards, or normalise each by itself (--recipe gdpo)",
                              "其他奖励几乎不影响优势：重新缩放或加权，或各自归一化（--recipe gdpo）"),
    "alarm.diversity": ("diversity drops: {first:.0%} -> {last:.0%} of the completions of a group differ, at {accuracy:.0%} right answers",
                        "多样性下降：组内不同回答的比例 {first:.0%} -> {last:.0%}，正确率 {accuracy:.0%}"),
    "alarm.diversity.next": ("copies of one answer teach nothing: raise the temperature or --clip-high, or lower the learning rate",
                             "相同的回答学不到东西：提高温度或 --clip-high，或降低学习率"),
})


@dataclass
class Alarm(events.Event):
    """A phenomenon that the numbers of a run show, and what to do about it. name: see `alarms.RULES`."""

    kind = "alarm"
    stage: str
    step: int
    name: str
    text: str
    remedy: str
    level: str = "warning"  # info: expected, worth knowing | warning
    numbers: dict[str, Any] = field(default_factory=dict)  # what `text` was made of


def in_both_languages(alarm: Mapping[str, Any]) -> tuple[Text, Text]:
    """Text and remedy of an alarm read from a log; as they were written where the log is of another version."""
    try:
        return both(f"alarm.{alarm['name']}", **alarm["numbers"]), both(f"alarm.{alarm['name']}.next")
    except (KeyError, TypeError, ValueError):
        told = (str(alarm.get(key, "")) for key in ("text", "remedy"))
        return tuple(Text(x, x) for x in told)  # type: ignore[return-value]


class Numbers:
    """The first and the latest values of every metric of a stage."""

    def __init__(self, window: int = WINDOW):
        self.window, self.step = window, 0
        self.evaluations: list[float] = []
        self.problems: int | None = None  # of each evaluation, where it says
        self.weights: dict[str, float] = {}
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, deque[float]] = {}

    def add(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self.step = step
        for name, value in metrics.items():
            if value is None or not math.isfinite(value):
                continue
            first = self._first.setdefault(name, [])
            if len(first) < self.window:
                first.append(value)
            else:  # both ends are full before they are compared, and share no step
                self._last.setdefault(name, deque(maxlen=self.window)).append(value)

    def first(self, name: str) -> float:
        return _mean(self._first.get(name, []))

    def last(self, name: str) -> float:
        """NaN until there is a whole window behind the first one."""
        values = self._last.get(name, ())
        return _mean(values) if len(values) == self.window else math.nan

    def change(self, name: str, least: float) -> float:
        """last - first where it is larger than twice its standard error and than `least`, else 0."""
        found = self.last(name) - self.first(name)
        if not math.isfinite(found):
            return 0.0
        error = math.sqrt(_variance(self._first[name]) / self.window + _variance(self._last[name]) / self.window)
        return found if abs(found) > max(2 * error, least) else 0.0


Found = dict[str, Any] | None
Rule = Callable[[Numbers], Found]
SOLVED = 0.9  # accuracy at which a policy may well be sure of itself


def entropy_collapse(n: Numbers) -> Found:
    first, last, accuracy = n.first("entropy/mean"), n.last("entropy/mean"), n.last("accuracy")
    falls = n.change("entropy/mean", 0.02) < 0 and last < 0.3 * first
    return {"first": first, "last": last, "accuracy": _or_zero(accuracy)} if falls and not accuracy >= SOLVED else None


def entropy_explosion(n: Numbers) -> Found:
    first, last = n.first("entropy/mean"), n.last("entropy/mean")
    return {"first": first, "last": last} if n.change("entropy/mean", 0.5) > 0 and last > 2 * first else None


def dead_groups(n: Numbers) -> Found:
    """By the component of which most groups differ: with GDPO a constant total may hide informative components."""
    parts = [*n.weights, "total"]
    shares = [x for p in parts if not math.isnan(x := n.last(f"reward/{p}/informative"))]
    if not shares or max(shares) >= 0.2:
        return None
    return {"last": max(shares), "right": _or_zero(n.last("reward/correct/all_right")), "wrong": _or_zero(n.last("reward/correct/all_wrong"))}


def reward_hacking(n: Numbers) -> Found:
    """The true metric: held-out evaluations, the latest against the best before it, or `correct` in the rollouts where it
    is no reward itself. Of n problems the share of right answers is known to about sqrt(p (1 - p) / n)."""
    rise = n.change("reward/total/mean", 0.02)
    if rise <= 0:
        return None
    reward = {"reward_first": n.first("reward/total/mean"), "reward_last": n.last("reward/total/mean")}
    if len(n.evaluations) > 1:
        best, last = max(n.evaluations[:-1]), n.evaluations[-1]
        if best - last > max(0.05, fall_of_chance(best, last, len(n.evaluations) - 1, n.problems)):
            return reward | {"true_first": best, "true_last": last}
    if n.change("accuracy", 0.05) < 0:
        return reward | {"true_first": n.first("accuracy"), "true_last": n.last("accuracy")}
    return None


def fall_of_chance(best: float, last: float, before: int, problems: int | None) -> float:
    """How far two shares of right answers may lie apart by chance: twice the standard error of their difference, more where the
    better one is the best of several. 0 where the number of problems is not known.

    The errors are those of p = (right + 1) / (problems + 2), so that all or none of a few is no certainty. The best of m is compared
    after each of m evaluations, about m^2 comparisons: sqrt(2^2 + 2 log m^2) in place of 2 keeps all of them together as rare.
    """
    if not problems:
        return 0.0
    shares = [(p * problems + 1) / (problems + 2) for p in (best, last)]
    error = math.sqrt(sum(p * (1 - p) for p in shares) / problems)
    return math.sqrt(4 + 4 * math.log(before)) * error


def length_drift(n: Numbers) -> Found:
    first, last = n.first("length/mean"), n.last("length/mean")
    moved = n.change("length/mean", 1.0) != 0 and (last > 1.5 * first or last < 0.6 * first)
    if not moved or n.change("accuracy", 0.03) > 0:
        return None
    return {"first": first, "last": last, "before": _or_zero(n.first("accuracy")), "after": _or_zero(n.last("accuracy"))}


def truncation(n: Numbers) -> Found:
    first, last = n.first("length/truncated"), n.last("length/truncated")
    return {"first": first, "last": last} if last > 0.2 and n.change("length/truncated", 0.1) > 0 else None


def engine_mismatch(n: Numbers) -> Found:
    gap, ess = n.last("engine/gap_mean"), n.last("engine/ess")
    return {"gap": gap, "ess": ess} if gap > 0.05 or ess < 0.9 else None


def chosen_falls(n: Numbers) -> Found:
    fall, grows = n.change("logps/chosen", 0.5), n.change("rewards/margin", 0.0)
    if fall >= 0 or grows <= 0:
        return None
    return {"first": n.first("logps/chosen"), "last": n.last("logps/chosen"), "margin_first": n.first("rewards/margin"),
            "margin_last": n.last("rewards/margin")}


def domination(n: Numbers) -> Found:
    """Shares of the summed |weight| x std. A component that nothing varies in is not dominated: it has nothing to say."""
    spreads = {name: abs(w) * s for name, w in n.weights.items() if w and (s := n.last(f"reward/{name}/std")) > 0}
    total = sum(spreads.values())
    if len(spreads) < 2 or not total:
        return None
    name = max(spreads, key=lambda k: spreads[k])
    share = spreads[name] / total
    return {"name": name, "share": share} if share > 0.9 else None


def diversity(n: Numbers) -> Found:
    first, last, accuracy = n.first("diversity/distinct"), n.last("diversity/distinct"), n.last("accuracy")
    falls = n.change("diversity/distinct", 0.1) < 0 and last < 0.5 * first
    return {"first": first, "last": last, "accuracy": _or_zero(accuracy)} if falls and not accuracy >= SOLVED else None


RULES: dict[str, Rule] = {f.__name__: f for f in (
    entropy_collapse, entropy_explosion, dead_groups, reward_hacking, length_drift, truncation, engine_mismatch, chosen_falls,
    domination, diversity)}
EXPECTED = ("chosen_falls",)


class Alarms:
    """Subscriber: emits an `Alarm` when a rule begins to hold; `raised` keeps them."""

    def __init__(self, window: int = WINDOW, rules: Mapping[str, Rule] = RULES, tell: Callable[[events.Event], None] = events.emit):
        self.window, self.rules, self.tell = window, rules, tell
        self.raised: list[Alarm] = []
        self._numbers: dict[str, Numbers] = {}
        self._silent: dict[tuple[str, str], int] = {}  # (stage, rule) -> steps since it last held

    def __call__(self, event: Any) -> None:
        if event.kind not in ("step", "evaluation", "group"):
            return
        n = self._numbers.setdefault(event.stage, Numbers(self.window))
        if event.kind == "group":
            n.weights = dict(event.weights)
        elif event.kind == "evaluation":
            if event.name in TRUE_METRICS and event.value is not None:
                n.evaluations.append(event.value)
                n.problems = event.details.get("problems", n.problems)
        else:
            n.add(event.step, event.metrics)
            for name, rule in self.rules.items():
                self._judge(event.stage, n, name, rule(n))

    def _judge(self, stage: str, n: Numbers, name: str, found: Found) -> None:
        key = stage, name
        silent = self._silent.get(key, self.window)
        self._silent[key] = silent + 1 if found is None else 0
        if found is None or silent < self.window:
            return
        numbers = {k: round(v, 6) if isinstance(v, float) else v for k, v in found.items()}
        alarm = Alarm(stage, n.step, name, say(f"alarm.{name}", **numbers), say(f"alarm.{name}.next"),
                      "info" if name in EXPECTED else "warning", numbers)
        self.raised.append(alarm)
        self.tell(alarm)


@dataclass
class _Logged:
    """An event of a log, by its fields."""

    kind: str
    stage: str = ""
    step: int = 0
    name: str = ""
    value: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def replay(log: Iterable[Mapping[str, Any]], window: int = WINDOW) -> list[Alarm]:
    """The alarms that the events of a run (`events.read_log`) raise."""
    alarms = Alarms(window, tell=lambda event: None)
    names = _Logged.__dataclass_fields__
    for event in log:
        if event.get("kind") in ("step", "evaluation", "group"):
            alarms(_Logged(**{k: v for k, v in event.items() if k in names}))
    return alarms.raised


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def _variance(values: Iterable[float]) -> float:
    values = list(values)
    mean = _mean(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1) if len(values) > 1 else 0.0


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
