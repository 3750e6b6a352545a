"""Whole runs of the online loop against trl's trainers: the same rollout, two optimizer steps (the second off-policy), and in
the end the same weights.

trl samples and scores on a tiny Qwen2 and takes two plain gradient steps on what it sampled. Our loop starts from the same
folder, is given trl's completions and rewards, and goes over them twice.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="optional reference: pip install pellucid[parity]")

from test_against_trl import LONGEST, MICRO_BATCH, WEIGHTS, G, folder, one_thread, tokenizer, trainer_of
from test_online import Recorder, config
from tiny_policy import Noise
from tiny_policy import tokenizer as our_tokenizer

import pellucid
from pellucid.align import recipe
from pellucid.align.objective_config import ObjectiveConfig
from pellucid.align.online import OnlineLoop
from pellucid.align.rewards import Reward, RewardSet
from pellucid.align.rollout import Group
from pellucid.engine import Sample, SamplingParams
from pellucid.tasks import Problem

__all__ = ["folder", "one_thread", "tokenizer"]  # fixtures
LR = 0.05
SGD = dict(optim="sgd", learning_rate=LR, max_grad_norm=1e9)
WIDE = dict(clip_low=0.9, clip_high=2.0)
METHODS = {
    # name: (options of trl, our objective)
    "dapo": (dict(loss_type="dapo", beta=0.04, epsilon=0.1, epsilon_high=0.28, delta=1.5),
             ObjectiveConfig(aggregation="token-mean", beta=0.04, clip_low=0.1, clip_high=0.28, delta=1.5)),
    "grpo": (dict(loss_type="grpo", beta=0.1, use_bias_correction_kl=False, mask_truncated_completions=True),
             ObjectiveConfig(beta=0.1, kl="k3", empty="count", truncated="mask")),
    "dr_grpo": (dict(loss_type="dr_grpo", scale_rewards="none"), recipe("dr-grpo", max_tokens=LONGEST, truncated="keep", empty="count")),
    "gspo": (dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.9, epsilon_high=2.0),
             ObjectiveConfig(ratio="sequence", empty="count", **WIDE)),
    "cispo": (dict(loss_type="cispo", epsilon_high=2.0), ObjectiveConfig(policy="cispo", clip_low=1.0, clip_high=1.0, aggregation="token-mean")),
    "gdpo": (dict(loss_type="dapo", multi_objective_aggregation="normalize_then_sum"),
             ObjectiveConfig(advantage="gdpo", whiten="sequence", aggregation="token-mean")),
    "entropy": (dict(loss_type="dapo", entropy_coef=0.05, per_device_train_batch_size=2 * MICRO_BATCH, gradient_accumulation_steps=1,
                     steps_per_generation=1), ObjectiveConfig(aggregation="token-mean", entropy_coef=0.05)),
    "untouched": (dict(), recipe("trl-default")),
    "rloo": (dict(beta=0.05, gradient_accumulation_steps=1, steps_per_generation=1, per_device_train_batch_size=2 * MICRO_BATCH,
                  epsilon=0.3), recipe("rloo", clip_low=0.3, clip_high=0.3)),
}


def captured(trainer):
    """Trains; the rollout as groups."""
    found = {}
    reward, score = trainer._calculate_rewards, trainer._generate_and_score_completions

    def rewarded(*args):
        found["rewards"] = reward(*args)
        return found["rewards"]

    def scored(inputs):
        found["rollout"] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in score(inputs).items()}
        return score_result(found)

    def score_result(found):
        return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in found["rollout"].items()}

    trainer._calculate_rewards, trainer._generate_and_score_completions = rewarded, scored
    trainer.train()
    r, samples = found["rollout"], []
    for p, pm, c, n in zip(r["prompt_ids"], r["prompt_mask"].bool(), r["completion_ids"], lengths(r["completion_ids"])):
        tokens = c[:n].tolist()
        samples.append(Sample(p[pm].tolist(), SamplingParams(), 0, tokens, [0.0] * n, "stop" if tokens[-1] == 1 else "length"))
    rewards = [dict(zip(WEIGHTS, row)) for row in found["rewards"].tolist()]
    return [Group(Problem("", "", "", ""), samples[i : i + G], [""] * G, rewards[i : i + G]) for i in range(0, len(samples), G)]


def lengths(ids):
    """Up to the end token, or the whole width (masked completions too)."""
    return [row.index(1) + 1 if 1 in row else len(row) for row in ids.tolist()]


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_give_trls_weights(folder, tokenizer, tmp_path, name):
    options, objective = METHODS[name]
    kinds = {}
    if name == "rloo":
        from trl import RLOOConfig, RLOOTrainer

        kinds = dict(kind=RLOOTrainer, config=RLOOConfig)
    trainer = trainer_of(folder, tokenizer, tmp_path, SGD | options, **kinds)
    groups = captured(trainer)
    trainer.model.save_pretrained(tmp_path / "after")

    rewards = RewardSet([Reward(n, lambda completions, **_: [0.0] * len(completions), weight=w) for n, w in WEIGHTS.items()])
    cfg = config(objective=objective, epochs=2, temperature=0.7, micro_rows=3, max_tokens=LONGEST)
    running = OnlineLoop(pellucid.load(folder).requires_grad_(), our_tokenizer(), Noise(), cfg, rewards=rewards)
    running.stepper.optimizer = Recorder(running.model, LR)
    padding = torch.ones(len(running.model.embed.weight), 1)
    padding[0] = 0  # transformers never trains the embedding of the padding token, which this random model samples too
    running.model.embed.weight.register_hook(lambda gradient: gradient * padding)
    if running.reference is not None:
        with torch.no_grad():
            running.reference.head_weight.mul_(0.9)
    x, credit = running._judge(groups, running.resolved())
    running._update(x, credit, running.resolved(), 0.5)
    first, second = running.stepper.optimizer.gradients
    assert max(float(g.abs().max()) for g in first) > 1e-2 and max(float(g.abs().max()) for g in second) > 1e-2
    start, after = pellucid.load(folder), pellucid.load(tmp_path / "after")
    for (n, mine), theirs, before in zip(running.model.named_parameters(), after.parameters(), start.parameters(), strict=True):
        moved = float((theirs - before).detach().abs().max())
        assert float((mine - theirs).detach().abs().max()) <= 2e-6 + 2e-4 * moved, n
    assert max(float((a - b).detach().abs().max()) for a, b in zip(after.parameters(), start.parameters())) > 1e-3
