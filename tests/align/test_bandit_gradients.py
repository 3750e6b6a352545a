"""The whole loop on the bandit: its mean step over every possible rollout against the exact gradient of what it maximises.

A transformer answers the bandit's prompt; what it may write is limited to the outcomes (the kept support of each place), so
they can all be listed with their probabilities. A rollout then holds every group that can be drawn, and each group's step is
weighted with its probability.
"""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from test_online import Recorder, config, loop
from tiny_policy import policy, tokenizer

from pellucid.align import ObjectiveConfig
from pellucid.align.aggregation import Counts
from pellucid.align.reward_model import RewardModel
from pellucid.align.rollout import Group
from pellucid.align.update import Experience, Update
from pellucid.engine import Sample, SamplingParams
from pellucid.tasks.bandit import Bandit, BanditDials

TASK = Bandit(BanditDials(arms="abc", pulls=2, contexts=5, seed=1))
ENDLESS = dict(clip_low=1.0, clip_high=1e9)
SUM = dict(aggregation="sequence-sum", **ENDLESS)
WHOLE = dict(aggregation="sequence-mean", ratio="sequence-sum")  # one ratio a completion, counted once


def problem():
    return TASK.sample(random.Random(0), "train")


def outcomes(asked):
    """The bandit's answers as samples, each place with what could stand there instead."""
    tok = tokenizer()
    prompt = tok.encode_chat([{"role": "user", "content": asked.prompt}], add_generation_prompt=True)[0]
    written = [[*tok.encode(o), tok.end_of_turn_id] for o in TASK.outcomes()]
    return [Sample(prompt, SamplingParams(), 0, ids, [0.0] * len(ids), "stop", [
        torch.tensor(sorted({other[t] for other in written if other[:t] == ids[:t]})) for t in range(len(ids))]) for ids in written]


def probabilities(model, samples):
    """Of every outcome, with gradient."""
    x = Experience([Group(problem(), samples, [""] * len(samples), [])], [0])
    logp, _, whose, _ = Update(x, range(len(samples)), Counts(0, 0)).forward(model, slice(None), 1.0)
    return torch.zeros(len(samples)).index_add(0, whose, logp).exp()


def payoffs(asked):
    return torch.tensor([TASK.payoff_of(asked, o) for o in TASK.outcomes()])


def exact(model, value=None):
    """d J / d theta, J = sum of probability x payoff."""
    asked, samples = problem(), outcomes(problem())
    p = probabilities(model, samples)
    assert float(p.sum().detach()) == pytest.approx(1.0, abs=1e-5)
    J = (p * (payoffs(asked) if value is None else value(p))).sum()
    return torch.autograd.grad(J, list(model.parameters()))


def mean_step(objective, size, *, model=None, sampler=None, lag=0, critic=None, reference=None):
    """Minus the mean gradient of the loop's loss over all groups of `size`, by the policy or by another `sampler`."""
    asked, model = problem(), model or policy()
    running = loop(config(objective=objective, group=max(size, 2), lag=lag, micro_rows=64), task=TASK, model=model, lr=0.0, critic=critic)
    if reference is not None:
        running.reference.load_state_dict(reference.state_dict())
    base = outcomes(asked)
    with torch.no_grad():
        p = probabilities(sampler or model, base)
        for s in base:
            x = Experience([Group(asked, [s], [""], [])], [0])
            (logp,) = Update(x, [0], Counts(0, 0)).logprobs(sampler or model, 1, 1.0)
            s.logprobs = logp.tolist()
    pay = payoffs(asked).tolist()
    chosen = list(itertools.product(range(len(base)), repeat=size))
    groups = [Group(asked, [copy.copy(base[i]) for i in g], [""] * size, [{"payoff": pay[i]} for i in g]) for g in chosen]
    if running.critic is not None:
        running.critic.stepper.optimizer = Recorder(running.critic.model, 0.0)
    x, credit = running._judge(groups, running.resolved())
    weight = torch.tensor([float(p[list(g)].prod()) for g in chosen]) * len(groups)
    x.advantages *= weight[torch.tensor([i for i, _ in x.places])][x.sequence]
    running._update(x, credit, running.resolved(), 0.5)
    (gradients,) = running.stepper.optimizer.gradients
    return [-g for g in gradients], running


def close(mine, theirs, factor=1.0):
    assert max(float(t.abs().max()) for t in theirs) > 1e-3
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, factor * b, atol=2e-6, rtol=1e-4)


def differs(mine, theirs):
    return max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True)) > 1e-3


ONE = {
    "reinforce": ObjectiveConfig(advantage="returns", policy="reinforce", aggregation="sequence-sum"),
    "reinforce++ without whitening": ObjectiveConfig(advantage="returns", **SUM),
    "ppo at ratio 1": ObjectiveConfig(advantage="returns", aggregation="sequence-sum"),
    "cispo": ObjectiveConfig(advantage="returns", policy="cispo", **SUM),
    "sapo": ObjectiveConfig(advantage="returns", policy="sapo", aggregation="sequence-sum"),
}


@pytest.mark.parametrize("name", ONE)
def test_token_returns_are_the_policy_gradient(name):
    close(mean_step(ONE[name], 1)[0], exact(policy()))


@pytest.mark.parametrize("size", [2, 3])
def test_group_baselines(size):
    """Minus the mean of the group: (1 - 1/G) of the gradient; minus the mean of the others: the gradient."""
    gradient = exact(policy())
    close(mean_step(ObjectiveConfig(scale="none", **SUM), size)[0], gradient, 1 - 1 / size)
    close(mean_step(ObjectiveConfig(scale="none", baseline="leave-one-out", **SUM), size)[0], gradient)
    close(mean_step(ObjectiveConfig(scale="none", baseline="leave-one-out", **WHOLE, **ENDLESS), size)[0], gradient)
    assert differs(mean_step(ObjectiveConfig(**SUM), size)[0], gradient)  # divided by the group's std it is another gradient


def test_gae_with_a_critic_that_knows_nothing():
    """lambda = 1: whatever the critic says, the gradient is right; lambda < 1: as wrong as the critic is."""
    gradient, judge = exact(policy()), RewardModel.of(policy(), seed=4)
    for lam, right in ((1.0, True), (0.3, False)):
        cfg = ObjectiveConfig(advantage="gae", lam=lam, **SUM)
        mine, running = mean_step(cfg, 1, critic=copy.deepcopy(judge))
        assert differs(mine, gradient) is not right
        if right:
            close(mine, gradient)
    assert running.critic.stepper.optimizer.gradients


@pytest.mark.parametrize("advantage", [dict(advantage="returns"), dict(scale="none", baseline="leave-one-out")], ids=str)
def test_a_kl_inside_the_reward(advantage):
    """J - beta KL(p || ref), by tokens and by completions."""
    model, other = policy(), policy()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.15)
    reference = probabilities(other, outcomes(problem())).detach()
    gradient = exact(model, lambda p: payoffs(problem()) - 0.3 * (p / reference).log())
    cfg = ObjectiveConfig(reward_beta=0.3, **advantage, **SUM)
    close(mean_step(cfg, 1 if cfg.by_token else 2, reference=other)[0], gradient)
    assert differs(gradient, exact(model))


@pytest.mark.parametrize("choices", [WHOLE | ENDLESS, dict(correction="truncate", correction_level="sequence", correction_high=None, **SUM)],
                         ids=["ratio", "correction"])
def test_samples_of_older_weights(choices):
    """One step off: with the whole answer's ratio, or corrected from the sampler to the policy, the gradient is exact."""
    older = policy()
    with torch.no_grad():
        for p in older.parameters():
            p.mul_(1.2)
    gradient = exact(policy())
    cfg = ObjectiveConfig(scale="none", baseline="leave-one-out", **choices)
    # The baseline is of the sampler's rewards; on average it adds nothing.
    close(mean_step(cfg, 2, sampler=older, lag=1)[0], gradient)
    wrong = ObjectiveConfig(scale="none", baseline="leave-one-out", clip_low=0.05, clip_high=0.05, **WHOLE)
    assert differs(mean_step(wrong, 2, sampler=older, lag=1)[0], gradient)  # the clip has its price


def test_gdpo_is_the_sum_of_what_each_reward_teaches():
    """With one reward it is GRPO's advantage; both divide by the group's std."""
    one = mean_step(ObjectiveConfig(advantage="gdpo", **SUM), 2)[0]
    close(one, mean_step(ObjectiveConfig(**SUM), 2)[0])
