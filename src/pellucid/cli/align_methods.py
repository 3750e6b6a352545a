"""The online methods of `pellucid align`, one verb each: a preset of the objective under the same loop and options."""

from __future__ import annotations

from dataclasses import dataclass

from pellucid.cli.align import Online, online


@dataclass(frozen=True)
class Grpo(Online):
    """Group-relative policy optimisation (DeepSeekMath): each completion against its group, divided by the group's spread, KL held in the loss.
    组相对策略优化（DeepSeekMath）：组内比较并除以组内标准差，损失中带 KL 项。

    $ pellucid align grpo runs/grow/model --tasks countdown sorting --minutes 3 --lr 4e-4
    $ pellucid align grpo --model runs/grow/model --data prompts.jsonl --reward rewards.py:short --dry-run
    """


@dataclass(frozen=True)
class Ppo(Online):
    """Proximal policy optimisation with a critic: generalised advantages token by token, KL inside the reward.
    带价值网络的 PPO：逐词元的广义优势估计，KL 惩罚在奖励之中。

    $ pellucid align ppo runs/grow/model --task sorting --epochs 4 --lr 1e-4 --steps 40
    """


@dataclass(frozen=True)
class DrGrpo(Online):
    """Dr. GRPO: no division by the spread, and a constant length in place of each completion's, so that neither length nor difficulty biases.
    Dr. GRPO：不除标准差，以常数长度归一，消除长度偏差与难度偏差。

    $ pellucid align dr-grpo runs/grow/model --task arithmetic --lr 4e-4
    """


@dataclass(frozen=True)
class Dapo(Online):
    """DAPO: clip-higher, the mean over tokens, groups that all fail or all succeed are replaced, cut completions are left out.
    DAPO：上截断放宽、词元平均、动态采样、超长样本不计损失。

    $ pellucid align dapo runs/grow/model --task countdown --lr 4e-4 --set rounds=4
    """


@dataclass(frozen=True)
class Gspo(Online):
    """GSPO: the ratio of the whole completion in place of each token's, with its narrow clip; meant for several updates a rollout.
    GSPO：以整个回答的比率代替逐词元比率，截断很窄；适合每轮多次更新。

    $ pellucid align gspo runs/grow/model --task sorting --updates 4 --lr 4e-4
    """


@dataclass(frozen=True)
class Gdpo(Online):
    """GDPO: every reward is normalised by itself before they are added, so that none drowns the others.
    GDPO：各奖励先各自归一再相加，互不淹没。

    $ pellucid align gdpo runs/grow/model --data prompts.jsonl --reward rewards.py:correct "short=rewards.py:short*0.5@correct>=1"
    """


@dataclass(frozen=True)
class Rloo(Online):
    """REINFORCE leave-one-out: against the mean of the others of its group, without bias; KL inside the reward.
    RLOO：以组内其余回答的均值为基线，无偏；KL 惩罚在奖励之中。

    $ pellucid align rloo runs/grow/model --task copying --lr 4e-4
    """


@dataclass(frozen=True)
class Reinforce(Online):
    """REINFORCE++: no groups and no critic; returns of token rewards with the KL inside, normalised over the batch.
    REINFORCE++：无组、无价值网络；含 KL 的逐词元回报在批内归一。

    $ pellucid align reinforce++ runs/grow/model --task copying --group 1 --prompts 256 --lr 4e-4
    """


@dataclass(frozen=True)
class ReinforceBaseline(Online):
    """REINFORCE++ with groups: centred in the group, normalised over the batch, KL as a k2 loss.
    REINFORCE++ 基线版：组内居中、批内归一，KL 以 k2 损失加入。

    $ pellucid align reinforce++-baseline runs/grow/model --task copying --lr 4e-4
    """


@dataclass(frozen=True)
class Cispo(Online):
    """CISPO (MiniMax-M1): no token is clipped away; its importance weight is capped instead.
    CISPO：不截断任何词元，只限制其重要性权重。

    $ pellucid align cispo runs/grow/model --task sorting --updates 4 --lr 4e-4
    """


@dataclass(frozen=True)
class Sapo(Online):
    """SAPO: a soft gate in place of the clip.
    SAPO：以软门控代替截断。

    $ pellucid align sapo runs/grow/model --task sorting --updates 4 --lr 4e-4
    """


@dataclass(frozen=True)
class TrlDefault(Online):
    """What trl's GRPOTrainer computes untouched: DAPO's normaliser, divided by the group's spread, symmetric clip, no KL term.
    trl 的 GRPOTrainer 默认计算的目标。

    $ pellucid align trl-default runs/grow/model --task sorting --lr 4e-4
    """


@dataclass(frozen=True)
class VerlDefault(Online):
    """What verl computes with adv_estimator=grpo, otherwise untouched: dual clip, bounded log ratio, no KL term.
    verl 以 adv_estimator=grpo 默认计算的目标。

    $ pellucid align verl-default runs/grow/model --task sorting --lr 4e-4
    """


def grpo(config: Grpo) -> None:
    online(config, "grpo")


def ppo(config: Ppo) -> None:
    online(config, "ppo")


def dr_grpo(config: DrGrpo) -> None:
    online(config, "dr-grpo")


def dapo(config: Dapo) -> None:
    online(config, "dapo")


def gspo(config: Gspo) -> None:
    online(config, "gspo")


def gdpo(config: Gdpo) -> None:
    online(config, "gdpo")


def rloo(config: Rloo) -> None:
    online(config, "rloo")


def reinforce(config: Reinforce) -> None:
    online(config, "reinforce++")


def reinforce_baseline(config: ReinforceBaseline) -> None:
    online(config, "reinforce++-baseline")


def cispo(config: Cispo) -> None:
    online(config, "cispo")


def sapo(config: Sapo) -> None:
    online(config, "sapo")


def trl_default(config: TrlDefault) -> None:
    online(config, "trl-default")


def verl_default(config: VerlDefault) -> None:
    online(config, "verl-default")
