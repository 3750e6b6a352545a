"""Expectations by enumeration: the mean of an estimator over every possible sample against the exact gradient.

A bandit small enough to list: the first token ends the answer or goes on to a second one, so lengths differ. The
policy is a table of logits; J = expected reward; every group of G samples is listed with its probability.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from pellucid.align import (
    ObjectiveConfig,
    gdpo_advantages,
    group_advantages,
    kl_penalty,
    pass_at_k_advantages,
    token_advantages,
)
from pellucid.align.aggregation import Counts
from pellucid.align.head import entropy_rows
from pellucid.align.objective import objective
from pellucid.errors import BadInput

OUTCOMES = [(0,), *itertools.product((1, 2), (0, 1, 2))]  # token 0 first: the answer ends
REWARD = torch.tensor([0.3, 1.0, 0.0, 0.1, 0.7, 0.0, 0.9], dtype=torch.float64)
ENDLESS = dict(clip_low=1.0, clip_high=1e9)


def table(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_()


def token_logps(theta):
    """Log-probabilities of the tokens of every outcome: row 0 for the first token, row 1 + first for the second."""
    p = theta.log_softmax(-1)
    return [torch.stack([p[0, o[0]], *[p[1 + o[0], x] for x in o[1:]]]) for o in OUTCOMES]


def exact_gradient(theta):
    probability = torch.stack([t.sum() for t in token_logps(theta)]).exp()
    return torch.autograd.grad((probability * REWARD).sum(), theta)[0], probability.detach()


def mean_gradient(theta, size, cfg, *, behaviour=None, **advantage_choices):
    """Expected gradient of the loss over all groups of `size` samples of the behaviour policy (default: on-policy)."""
    logps = token_logps(theta)
    olds = None if behaviour is None else [t.detach() for t in token_logps(behaviour)]
    _, probability = exact_gradient(theta if behaviour is None else behaviour)
    groups = torch.tensor(list(itertools.product(range(len(OUTCOMES)), repeat=size)))
    advantages = group_advantages(REWARD[groups], **advantage_choices) if advantage_choices else REWARD[groups]
    weighted = advantages * probability[groups].prod(1, keepdim=True)  # positive weights: the clip's branch is kept
    picked = groups.flatten().tolist()
    lengths = torch.tensor([len(OUTCOMES[i]) for i in picked])
    sequence = torch.arange(len(picked)).repeat_interleave(lengths)
    old = None if olds is None else torch.cat([olds[i] for i in picked])
    loss, _ = objective(torch.cat([logps[i] for i in picked]), old, None, weighted.flatten()[sequence], sequence, cfg,
                        Counts(tokens=size, sequences=size))
    return torch.autograd.grad(loss, theta)[0]


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


SUM = ObjectiveConfig(aggregation="sequence-sum")
CONSTANT = ObjectiveConfig(aggregation="constant", max_tokens=2)


def test_reinforce_is_the_policy_gradient():
    theta = table(0)
    exact, _ = exact_gradient(theta)
    assert exact.abs().max() > 0.01
    close(mean_gradient(theta, 1, SUM), -exact)
    close(mean_gradient(theta, 1, CONSTANT), -exact / 2)


@pytest.mark.parametrize("size", [2, 3])
def test_mean_baseline_shrinks_and_leave_one_out_is_exact(size):
    theta = table(1)
    exact, _ = exact_gradient(theta)
    close(mean_gradient(theta, size, SUM, scale="none"), -(1 - 1 / size) * exact)
    close(mean_gradient(theta, size, SUM, scale="none", baseline="leave-one-out"), -exact)
    close(mean_gradient(theta, size, CONSTANT, scale="none", baseline="leave-one-out"), -exact / 2)


def test_what_is_not_the_policy_gradient():
    """Division by the group's std (difficulty bias) and by the length (length bias) change the direction."""
    theta = table(1)
    exact, _ = exact_gradient(theta)

    def cosine(gradient):
        return float(torch.nn.functional.cosine_similarity(gradient.flatten(), -exact.flatten(), dim=0))

    assert cosine(mean_gradient(theta, 3, SUM, scale="none")) == pytest.approx(1, abs=1e-6)
    assert cosine(mean_gradient(theta, 3, SUM, scale="group")) < 0.9999
    assert cosine(mean_gradient(theta, 3, ObjectiveConfig(), scale="none")) < 0.999


def test_on_policy_clip_width_does_not_matter():
    theta = table(2)
    exact, _ = exact_gradient(theta)
    narrow = ObjectiveConfig(aggregation="sequence-sum", clip_low=1e-9, clip_high=1e-9)
    close(mean_gradient(theta, 2, narrow, scale="none", baseline="leave-one-out"), -exact)


def test_importance_ratio_corrects_off_policy_samples():
    """One-token answers (there the token's ratio is the whole ratio): sampled from another policy, exact again."""
    theta, behaviour = table(3), table(4)
    p, q = theta[0].softmax(-1), behaviour[0].softmax(-1).detach()
    reward = torch.tensor([0.2, 1.0, 0.5], dtype=torch.float64)
    (exact,) = torch.autograd.grad((p * reward).sum(), theta, retain_graph=True)
    groups = torch.tensor(list(itertools.product(range(3), repeat=2)))
    advantages = group_advantages(reward[groups], scale="none", baseline="leave-one-out")
    weighted = (advantages * q[groups].prod(1, keepdim=True)).flatten()
    picked, sequence = groups.flatten(), torch.arange(groups.numel())
    args = (p.log()[picked], q.log()[picked], None, weighted, sequence)
    loss, _ = objective(*args, ObjectiveConfig(aggregation="sequence-sum", **ENDLESS), Counts(2, 2))
    close(torch.autograd.grad(loss, theta, retain_graph=True)[0], -exact)
    clipped, _ = objective(*args, ObjectiveConfig(aggregation="sequence-sum"), Counts(2, 2))
    assert (torch.autograd.grad(clipped, theta)[0] + exact).abs().max() > 1e-3  # the clip has its price


# --- KL estimators ----------------------------------------------------------------------------------------------------


@pytest.fixture
def policies():
    g = torch.Generator().manual_seed(6)
    logits = torch.randn(5, generator=g, dtype=torch.float64).requires_grad_()
    ref, old = (torch.randn(5, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    return logits, logits.log_softmax(-1), ref, old


def test_kl_values_and_gradients_as_losses(policies):
    """The table of kl.py, by enumeration over the vocabulary."""
    logits, logp, ref, _ = policies
    p = logp.exp().detach()
    kl, forward = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    (grad_kl,), (grad_forward,) = (torch.autograd.grad(x, logits, retain_graph=True) for x in (kl, forward))
    zero = torch.zeros_like(grad_kl)
    table = {"k1": (kl, zero), "k2": (None, grad_kl), "k3": (kl, grad_forward), "k3+": (kl, grad_kl),
             "k3-corrected": (kl, grad_kl)}
    for name, (value, gradient) in table.items():
        mean = (p * kl_penalty(logp, ref, name, ratio=(logp - logp.detach()).exp())).sum()
        if value is not None:
            assert float(mean.detach()) == pytest.approx(float(kl.detach())), name
        close(torch.autograd.grad(mean, logits, retain_graph=True)[0], gradient)
    assert (grad_kl - grad_forward).abs().max() > 0.01


def test_corrected_estimator_is_right_off_policy(policies):
    logits, logp, ref, old = policies
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    for name, right in (("k3-corrected", True), ("k2", False), ("k3+", False)):
        mean = (old.exp() * kl_penalty(logp, ref, name, ratio=(logp - old).exp())).sum()
        (gradient,) = torch.autograd.grad(mean, logits, retain_graph=True)
        assert bool((gradient - exact).abs().max() < 1e-7) is right, name


def test_estimators_inside_the_reward(policies):
    """Policy gradient with the penalty as reward: k1 gives grad KL(p||ref), k3 does not."""
    logits, logp, ref, _ = policies
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits, retain_graph=True)
    for name, expected in (("k1", exact), ("k3", exact - forward)):
        reward = kl_penalty(logp, ref, name).detach()
        close(torch.autograd.grad((logp.exp() * reward).sum(), logits, retain_graph=True)[0], expected)


def test_objective_adds_beta_times_the_estimator(policies):
    """With zero advantages the objective is the KL term alone, unclipped and with the ratio's gradient."""
    logits, logp, ref, old = policies
    zeros, sequence = torch.zeros(5, dtype=torch.float64), torch.arange(5)
    for name in ("k2", "k3", "k3+", "k3-corrected"):
        cfg = ObjectiveConfig(aggregation="token-sum", beta=0.7, kl=name)
        loss, _ = objective(logp, old, ref, zeros, sequence, cfg, Counts(5, 5))
        expected = 0.7 * kl_penalty(logp, ref, name, ratio=(logp - old).exp()).sum()
        close(loss.detach(), expected.detach())
        close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected)))


# --- token-level estimators, other policy terms, corrections: every sample enumerated ---------------------------------


def flat(theta, behaviour=None):
    """All outcomes laid end to end: log p (M,), log q (M,), sequence (M,), probability of each outcome under q (S,)."""
    logps, olds = token_logps(theta), token_logps(theta if behaviour is None else behaviour)
    sequence = torch.arange(len(OUTCOMES)).repeat_interleave(torch.tensor([len(o) for o in OUTCOMES]))
    return torch.cat(logps), torch.cat(olds).detach(), sequence, torch.stack([o.sum() for o in olds]).exp().detach()


def gradient_of(theta, logp, old, advantages, sequence, probability, cfg, **given):
    """Expected gradient of the loss of one sample, advantages by token; probabilities are put into the advantages."""
    loss, _ = objective(logp, old, None, advantages * probability[sequence], sequence, cfg, Counts(1, 1), **given)
    return torch.autograd.grad(loss, theta, retain_graph=True)[0]


def critic_of(theta, exact):
    """V(prefix): of the empty prefix and after the first token; `exact`: the true expected reward, else rubbish."""
    p = theta.detach().softmax(-1)
    after = torch.stack([REWARD[0]] + [(p[1 + first] * REWARD[1 + 3 * (first - 1) : 4 + 3 * (first - 1)]).sum() for first in (1, 2)])
    start = (p[0] * after).sum()
    rubbish = torch.tensor([0.9, -0.4, 0.2], dtype=torch.float64)
    values = [v for o in OUTCOMES for v in ([start, after[o[0]]] if exact else [rubbish[0], rubbish[o[0]]])[: len(o)]]
    return torch.stack(values)


def token_level(theta, critic=None, **choices):
    logp, old, sequence, probability = flat(theta)
    cfg = ObjectiveConfig(aggregation="token-sum", **choices)
    advantages, _ = token_advantages(REWARD, sequence, cfg, critic=critic)
    return gradient_of(theta, logp, old, advantages.double(), sequence, probability, cfg)


def test_token_returns_and_gae_are_the_policy_gradient():
    """Returns always; GAE with lam = 1 whatever the critic says; with lam < 1 only if the critic is right."""
    theta = table(5)
    exact, _ = exact_gradient(theta)
    close(token_level(theta, advantage="returns"), -exact)
    for right, lam, unbiased in ((True, 1.0, True), (False, 1.0, True), (True, 0.3, True), (False, 0.3, False)):
        gradient = token_level(theta, critic_of(theta, right), advantage="gae", lam=lam)
        assert bool((gradient + exact).abs().max() < 1e-6) is unbiased, (right, lam)


def test_a_kl_inside_the_reward_is_the_gradient_of_the_regularised_objective():
    """J - beta KL(p || ref) over whole answers, by k1 on every token."""
    theta, ref = table(6), [t.detach() for t in token_logps(table(7))]
    logps = token_logps(theta)
    probability = torch.stack([t.sum() for t in logps]).exp()
    kl = torch.stack([(a - b).sum() for a, b in zip(logps, ref)])
    (exact,) = torch.autograd.grad((probability * (REWARD - 0.3 * kl)).sum(), theta, retain_graph=True)
    logp, old, sequence, p = flat(theta)
    for estimator, right in (("k1", True), ("k2", False), ("k3", False)):
        cfg = ObjectiveConfig(advantage="returns", reward_beta=0.3, reward_kl=estimator, aggregation="token-sum")
        advantages, _ = token_advantages(REWARD, sequence, cfg, old=old, ref=torch.cat(ref))
        gradient = gradient_of(theta, logp, old, advantages.double(), sequence, p, cfg)
        assert bool((gradient + exact).abs().max() < 1e-6) is right, estimator


def test_policy_terms_agree_on_policy():
    """Every surrogate has the plain policy gradient where the ratio is 1; GMPO and GSPO that of the mean log ratio."""
    theta = table(8)
    logp, old, sequence, p = flat(theta)
    exact, _ = exact_gradient(theta)
    args = (theta, logp, old, REWARD[sequence], sequence, p)
    for choices in (dict(), dict(delta=1.5), dict(policy="cispo"), dict(policy="sapo"), dict(policy="reinforce"),
                    dict(ratio="sequence-token")):
        close(gradient_of(*args, ObjectiveConfig(aggregation="token-sum", **choices)), -exact)
    mean = gradient_of(*args, ObjectiveConfig())
    assert (mean + exact).abs().max() > 1e-3  # 1/|o| is another objective
    for choices in (dict(policy="gmpo"), dict(ratio="sequence")):
        close(gradient_of(*args, ObjectiveConfig(**choices)), mean)
    close(gradient_of(*args, ObjectiveConfig(ratio="sequence-sum")), -exact)  # the whole answer's ratio: no 1/|o| left


def test_exact_off_policy_corrections():
    """Answers of several tokens sampled from q: the product of ratios is exact, token ratios are not; the same for the
    correction of samples that another engine drew."""
    theta, q = table(9), table(10)
    exact, _ = exact_gradient(theta)
    logp, sampler, sequence, p = flat(theta, q)
    free = dict(clip_low=1.0, clip_high=1e9)
    args = (theta, logp, sampler, REWARD[sequence], sequence, p)
    close(gradient_of(*args, ObjectiveConfig(ratio="sequence-sum", **free)), -exact)
    assert (gradient_of(*args, ObjectiveConfig(aggregation="token-sum", **free)) + exact).abs().max() > 1e-3
    on_policy = (theta, logp, None, REWARD[sequence], sequence, p)
    for level, right in (("sequence", True), ("token", False), ("sequence-mean", False)):
        cfg = ObjectiveConfig(aggregation="token-sum", correction="truncate", correction_level=level, correction_high=None)
        gradient = gradient_of(*on_policy, cfg, sampler=sampler)
        assert bool((gradient + exact).abs().max() < 1e-6) is right, level
        plain = ObjectiveConfig(policy="reinforce", **{f: getattr(cfg, f) for f in (
            "aggregation", "correction", "correction_level", "correction_high")})
        close(gradient_of(*on_policy, plain, sampler=sampler), gradient)


@pytest.mark.parametrize("size", [2, 3])
def test_pass_at_k_is_the_gradient_of_the_expected_best(size):
    theta = table(11)
    logps = token_logps(theta)
    probability = torch.stack([t.sum() for t in logps]).exp()
    groups = torch.tensor(list(itertools.product(range(len(OUTCOMES)), repeat=size)))
    (exact,) = torch.autograd.grad((probability[groups].prod(1) * REWARD[groups].amax(1)).sum(), theta, retain_graph=True)
    advantages = pass_at_k_advantages(REWARD[groups]) * probability.detach()[groups].prod(1, keepdim=True)
    picked = groups.flatten().tolist()
    sequence = torch.arange(len(picked)).repeat_interleave(torch.tensor([len(OUTCOMES[i]) for i in picked]))
    loss, _ = objective(torch.cat([logps[i] for i in picked]), None, None, advantages.flatten()[sequence], sequence, SUM,
                        Counts(1, 1))
    close(torch.autograd.grad(loss, theta)[0], -exact)


def test_gdpo_is_the_sum_of_what_each_reward_teaches():
    theta = table(12)
    logps, (_, p) = token_logps(theta), exact_gradient(theta)
    other = torch.tensor([0.0, 0, 1, 0, 1, 1, 0], dtype=torch.float64)
    groups = torch.tensor(list(itertools.product(range(len(OUTCOMES)), repeat=3)))
    weight = p[groups].prod(1, keepdim=True)
    picked = groups.flatten().tolist()
    sequence = torch.arange(len(picked)).repeat_interleave(torch.tensor([len(OUTCOMES[i]) for i in picked]))

    def gradient(advantages):
        a = (advantages * weight).flatten()[sequence]
        loss, _ = objective(torch.cat([logps[i] for i in picked]), None, None, a, sequence, SUM, Counts(3, 3))
        return torch.autograd.grad(loss, theta, retain_graph=True)[0]

    parts = {"a": REWARD[groups], "b": other[groups]}
    alone = [gradient(group_advantages(x, eps=0.0)) for x in parts.values()]
    close(gradient(gdpo_advantages(parts, weights={"a": 1.0, "b": 0.5}, eps=0.0)), alone[0] + 0.5 * alone[1])


def test_entropy_bonus_has_its_gradient():
    """T23: a bonus without gradient does nothing, and is refused."""
    theta = table(13)
    logp, old, sequence, _ = flat(theta)
    rows = torch.tensor([row for o in OUTCOMES for row in ([0, 1 + o[0]] if len(o) == 2 else [0])])
    logits = theta[rows]
    H = entropy_rows(logits)
    zeros, counts = torch.zeros_like(old), Counts(len(old), len(OUTCOMES))
    cfg = ObjectiveConfig(entropy_coef=0.3)
    loss, _ = objective(logp, old, None, zeros, sequence, cfg, counts, entropy=H)
    p = logits.softmax(-1)
    expected = torch.autograd.grad(-0.3 * (-(p * p.log()).sum(-1)).mean(), theta, retain_graph=True)[0]
    close(torch.autograd.grad(loss, theta, retain_graph=True)[0], expected)
    assert expected.abs().max() > 1e-3
    with pytest.raises(BadInput, match="gradient"):
        objective(logp, old, None, zeros, sequence, cfg, counts, entropy=H.detach())
