"""Whole updates of the online loop against verl 0.9.1's own functions: rewards with KL inside, advantages, critic, losses.

A rollout of our own; every completion is then run alone, padded, and goes through verl's chain as its trainer has it: two
mini-batches, policy and critic one plain gradient step each, so that the second is off-policy. Gradients and weights of both
models must be ours.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import verl_core

if not verl_core.installed():
    pytest.skip("optional reference: pip install --no-deps verl==0.9.1", allow_module_level=True)

from test_against_verl import Config, actor
from test_online import REWARDS, Recorder, config, differs, loop, padded
from tiny_policy import policy, weights

from pellucid.align import ObjectiveConfig, recipe
from pellucid.align.reward_model import RewardModel

LR, TEMPERATURE = 0.3, 0.7
TOKEN = dict(aggregation="token-mean", delta=3.0, log_ratio_bound=20.0)
METHODS = {
    # name: (our objective, verl's advantage, verl's policy loss, its aggregation, its configuration, kl in the loss)
    "ppo": (recipe("ppo", reward_beta=0.2, **TOKEN), "gae", "vanilla", "token-mean", {}, None),
    "ppo, gamma and lambda": (recipe("ppo", gamma=0.9, lam=0.8, value_clip=0.05, **TOKEN), "gae", "vanilla", "token-mean", {}, None),
    "reinforce++": (recipe("reinforce++", reward_beta=0.2, **TOKEN), "rf", "vanilla", "token-mean", {}, None),
    "reinforce++-baseline": (recipe("reinforce++-baseline", beta=0.2, delta=3.0, log_ratio_bound=20.0), "rf-baseline", "vanilla",
                             "token-mean", {}, "k2"),
    "grpo": (recipe("verl-default", beta=0.1, kl="k3+"), "grpo", "vanilla", "token-mean", {}, "k3+"),
    "rloo": (ObjectiveConfig(scale="none", baseline="leave-one-out", reward_beta=0.2, **TOKEN), "rloo", "vanilla", "token-mean", {}, None),
    "gspo": (ObjectiveConfig(eps=1e-6, ratio="sequence-token", clip_low=0.4, clip_high=0.5), "grpo", "gspo", "seq-mean-token-mean",
             dict(clip_ratio_low=0.4, clip_ratio_high=0.5), None),
    "gdpo": (ObjectiveConfig(advantage="gdpo", whiten="token", eps=1e-6, **TOKEN), "gdpo", "vanilla", "token-mean", {}, None),
    "cispo": (ObjectiveConfig(eps=1e-6, policy="cispo", clip_low=0.1, clip_high=0.2, aggregation="token-mean"), "grpo", "cispo",
              "token-mean", dict(clip_ratio_low=0.1, clip_ratio_high=0.2), None),
    "sapo": (ObjectiveConfig(eps=1e-6, policy="sapo"), "grpo", "sapo", "seq-mean-token-mean", dict(tau_pos=1.0, tau_neg=1.05), None),
}


@pytest.fixture(scope="module")
def verl():
    return verl_core.load()


def values_alone(critic, samples):
    """(S, longest): the score at the place before each token, each completion run alone."""
    rows = []
    for s in samples:
        hidden = critic.hidden(torch.tensor([s.prompt + s.tokens[:-1]]))[0, len(s.prompt) - 1 :]
        rows.append(critic.score(hidden)[:, 0])
    longest = max(map(len, rows))
    return torch.stack([torch.nn.functional.pad(r, (0, longest - len(r))) for r in rows])


def advantages_of(verl, name, cfg, groups, rewards, values, mask):
    """verl's (B, T) advantages, and the critic's targets."""
    m, index = mask.float(), np.repeat(np.arange(len(groups)), 4)
    if name == "gae":
        return verl.compute_gae_advantage_return(rewards, values, m, cfg.gamma, cfg.lam)
    if name == "rf":
        return verl.compute_reinforce_plus_plus_outcome_advantage(rewards, m, Config(gamma=cfg.gamma))
    if name == "gdpo":
        parts = {k: np.array([r[k] for g in groups for r in g.rewards]) for k in REWARDS}
        options = Config(gdpo_reward_keys=list(parts), gdpo_reward_weights=[REWARDS[k] for k in parts])
        batch = {"prompts": torch.zeros(len(mask), 2), "attention_mask": torch.cat([torch.ones(len(mask), 2), m], 1).long()}
        return verl.compute_gdpo_outcome_advantage(torch.zeros_like(m), m, index, config=options, non_tensor_batch=parts, batch=batch)
    call = {"grpo": verl.compute_grpo_outcome_advantage, "rloo": verl.compute_rloo_outcome_advantage,
            "rf-baseline": verl.compute_reinforce_plus_plus_baseline_outcome_advantage}[name]
    return call(rewards, m, index)


class Theirs:
    """verl's trainer on our rollout: what is computed once, then a mini-batch at a time."""

    def __init__(self, verl, method, groups, model, critic, reference):
        self.verl, self.model, self.critic = verl, model, critic
        self.cfg, name, self.loss, self.agg, options, self.kl = method
        self.actor, self.samples = actor(**options), [s for g in groups for s in g.samples]
        with torch.no_grad():
            self.old, self.mask = padded(model, self.samples, TEMPERATURE)
            self.ref = padded(reference, self.samples, TEMPERATURE)[0]
            self.values = values_alone(critic, self.samples)
        totals = torch.tensor([sum(REWARDS[k] * v for k, v in r.items()) for g in groups for r in g.rewards])
        rewards = torch.zeros_like(self.old).scatter(1, self.mask.sum(1, keepdim=True) - 1, totals[:, None])
        rewards = rewards - self.cfg.reward_beta * self.verl.kl_penalty(self.old, self.ref, "kl") * self.mask
        self.advantages, self.returns = advantages_of(verl, name, self.cfg, groups, rewards, self.values, self.mask)

    def step(self, part):
        """The gradients of one mini-batch; moves both models."""
        rows = [4 * i + j for i in part for j in range(4)]
        chosen = [self.samples[k] for k in rows]
        width = int(self.mask[rows].sum(1).max())
        old, ref, m, advantages, returns, before = (
            x[rows, :width] for x in (self.old, self.ref, self.mask.float(), self.advantages, self.returns, self.values))
        logp, _ = padded(self.model, chosen, TEMPERATURE)
        loss, _ = self.verl.get_policy_loss_fn(self.loss)(old, logp, advantages, m, self.agg, self.actor, None)
        if self.kl:
            loss = loss + self.cfg.beta * self.verl.agg_loss(self.verl.kl_penalty(logp, ref, self.kl), m, self.agg)
        gradients = [self._move(self.model, loss)]
        if self.cfg.advantage == "gae":
            v = values_alone(self.critic, chosen)
            loss, _ = self.verl.compute_value_loss(v, returns, before, m, self.cfg.value_clip)
            gradients.append(self._move(self.critic, self.cfg.value_coef * loss))
        return gradients

    @staticmethod
    def _move(model, loss):
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients):
                p.sub_(LR * g)
        return gradients


@pytest.mark.parametrize("name", METHODS)
def test_two_mini_batches(verl, name):
    method = METHODS[name]
    cfg = method[0]
    judge = RewardModel.of(policy(), seed=2)  # a critic that says something from the start
    running = loop(config(objective=cfg, updates=2, prompts=8, temperature=TEMPERATURE, micro_rows=2), lr=LR,
                   critic=judge if cfg.advantage == "gae" else None)
    if running.critic is not None:
        running.critic.stepper.optimizer = Recorder(judge, LR)
    reference = policy() if running.reference is None else running.reference
    with torch.no_grad():
        reference.head_weight.mul_(1.2)
    groups = [g for g in running.sampling.collect().groups if differs(g)]
    theirs = Theirs(verl, method, groups, copy.deepcopy(running.model), copy.deepcopy(judge), reference)
    x, credit = running._judge(groups, running.resolved())
    for k, (i, j) in enumerate(x.places):
        mine = x.advantages[x.sequence == k]
        torch.testing.assert_close(mine, theirs.advantages[4 * i + j, : len(mine)].float(), atol=2e-5, rtol=1e-4)
    assert x.advantages.std() > 0.1

    order = running._order(list(range(len(groups))), 0)
    numbers = running._update(x, credit, running.resolved(), 0.5)
    for number, part in enumerate((order[0::2], order[1::2])):
        for recorder, gradients in zip([running.stepper.optimizer, *([running.critic.stepper.optimizer] if running.critic else [])],
                                       theirs.step(part), strict=True):
            size = max(float(g.abs().max()) for g in gradients)
            assert size > 1e-3, "vacuous: no gradient"
            for a, b in zip(recorder.gradients[number], gradients, strict=True):
                assert float((a - b).abs().max()) <= 2e-5 * max(1.0, size)
    assert numbers["kl/old_k3"] > 1e-4, "the second mini-batch must be off-policy"
    for mine, other in ((running.model, theirs.model), *([(running.critic.model, theirs.critic)] if running.critic else [])):
        for a, b in zip(weights(mine), weights(other), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
