"""Advantages, policy losses, aggregations, corrections, value loss and KL estimators against verl 0.9.1's own functions.

Values and, where there is one, the gradient. Completions of unequal length with observation tokens inside, off-policy, so
that a wrong mask, clip or normaliser shows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import verl_core

if not verl_core.installed():
    pytest.skip("optional reference: pip install --no-deps verl==0.9.1", allow_module_level=True)

from pellucid.align import (
    EntropyController,
    KLController,
    ObjectiveConfig,
    assign_credit,
    count,
    gae,
    gdpo_advantages,
    group_advantages,
    importance_weights,
    kl_penalty,
    objective_padded,
    pass_at_k_advantages,
    recipe,
    returns_to_go,
    value_loss,
    whiten,
)
from pellucid.align.aggregation import Counts, aggregate
from pellucid.align.corrections import normalised

N, G, T = 3, 4, 9
DOUBLE = torch.float64


@pytest.fixture(scope="module")
def verl():
    return verl_core.load()


class Config(dict):
    """verl reads its configurations both as attributes and with .get."""

    __getattr__ = dict.__getitem__


@pytest.fixture
def rows():
    """12 completions of lengths 1 to 9 with observation tokens inside; log-probabilities that drifted far."""
    g = torch.Generator().manual_seed(3)
    lengths = torch.tensor([1, 9, 4, 7, 5, 2, 8, 3, 6, 9, 2, 5])
    mask = (torch.arange(T)[None] < lengths[:, None])
    mask[1, 3:5] = mask[3, 2] = mask[6, 0] = mask[9, 4:8] = False
    logp = (-2 * torch.rand(N * G, T, generator=g, dtype=DOUBLE)).requires_grad_()
    old = logp.detach() + 0.5 * torch.randn(N * G, T, generator=g, dtype=DOUBLE)
    scores = torch.randn(N * G, generator=g, dtype=DOUBLE)
    values = torch.randn(N * G, T, generator=g, dtype=DOUBLE)
    return logp, old, scores, values, mask


def last(mask):
    return mask.long().cumsum(1).argmax(1)


def terminal(scores, mask):
    """Scores on the last model token, as both sides want them."""
    return torch.zeros(mask.shape, dtype=scores.dtype).scatter(1, last(mask)[:, None], scores[:, None])


INDEX = np.repeat(np.arange(N), G)


def per_sequence(advantages, mask):
    """verl's (B, T) advantages -> (N, G): the value at every completion's model tokens."""
    assert not torch.where(mask, advantages - advantages.gather(1, last(mask)[:, None]), 0.0).any()
    return advantages.gather(1, last(mask)[:, None]).view(N, G)


def close(a, b, atol=2e-7):
    torch.testing.assert_close(a.double(), b.double(), atol=atol, rtol=1e-6)


# --- advantages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.95, 0.0)])
def test_gae(verl, rows, gamma, lam):
    _, _, scores, values, mask = rows
    rewards = terminal(scores, mask) + torch.where(mask, 0.1 * values.flip(1), 0.0)
    theirs, targets = verl.compute_gae_advantage_return(rewards, values, mask.double(), gamma, lam)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    close(returns[mask], targets[mask])
    close(whiten(advantages[mask]), theirs[mask])


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_reinforce_plus_plus(verl, rows, gamma):
    _, _, scores, values, mask = rows
    rewards = terminal(scores, mask) + torch.where(mask, 0.1 * values, 0.0)
    theirs, targets = verl.compute_reinforce_plus_plus_outcome_advantage(rewards, mask.double(), Config(gamma=gamma))
    returns = returns_to_go(rewards, mask, gamma=gamma)
    close(returns, targets)
    close(whiten(returns[mask]), theirs[mask])


@pytest.mark.parametrize("name, choices", [
    ("grpo", dict(eps=1e-6)), ("dr", dict(scale="none")), ("rloo", dict(scale="none", baseline="leave-one-out")),
    ("opo", dict(scale="none", baseline="length-weighted"))])
def test_group_advantages(verl, rows, name, choices):
    _, _, scores, _, mask = rows
    call = {"grpo": verl.compute_grpo_outcome_advantage, "rloo": verl.compute_rloo_outcome_advantage,
            "dr": lambda *a: verl.compute_grpo_outcome_advantage(*a, norm_adv_by_std_in_grpo=False),
            "opo": verl.compute_opo_outcome_advantage}[name]
    theirs = per_sequence(call(terminal(scores, mask), mask.double(), INDEX)[0], mask)
    close(group_advantages(scores.view(N, G), lengths=mask.sum(1).view(N, G), **choices), theirs)
    assert theirs.std() > 0.1


def test_baseline_form_of_reinforce_plus_plus(verl, rows):
    """Whitened over tokens: long answers count more."""
    _, _, scores, _, mask = rows
    theirs = verl.compute_reinforce_plus_plus_baseline_outcome_advantage(terminal(scores, mask), mask.double(), INDEX)[0]
    credit = assign_credit({"r": scores.view(N, G)}, mask.sum(1).view(N, G), recipe("reinforce++-baseline"))
    close(credit.advantages, per_sequence(theirs, mask), atol=1e-6)
    assert abs(float(credit.advantages.mean())) > 1e-3  # over completions the mean is not 0


@pytest.mark.parametrize("scale", ["group", "none"])
def test_pass_at_k(verl, rows, scale):
    _, _, scores, _, mask = rows
    scores = scores.clone()
    scores[4] = scores[5] = 3.0  # a tie at the top
    config = Config(norm_adv_by_std_in_grpo=scale == "group")
    theirs = verl.compute_grpo_passk_outcome_advantage(terminal(scores, mask), mask.double(), INDEX, config=config)[0]
    mine = pass_at_k_advantages(scores.view(N, G), scale=scale)
    close(mine, per_sequence(theirs, mask))
    assert not mine[1].any() and (mine[0] != 0).sum() == (mine[2] != 0).sum() == 1


@pytest.mark.parametrize("weights", [None, [1.0, 0.25]])
def test_gdpo(verl, rows, weights):
    """Their masked whitening over tokens. In fp32 there; one dead group, which whitening over tokens shifts off zero."""
    _, _, scores, _, mask = rows
    mask = torch.arange(T)[None] < mask.sum(1)[:, None]  # they find the last token by the count: no observations
    r = {"format": (scores > 0).double(), "right": (scores * 2).round()}
    for x in r.values():
        x[8:12] = x[8]
    config = Config(gdpo_reward_keys=["format", "right"], gdpo_reward_weights=weights)
    batch = {"prompts": torch.zeros(N * G, 2), "attention_mask": torch.cat([torch.ones(N * G, 2), mask], 1).long()}
    theirs = verl.compute_gdpo_outcome_advantage(
        torch.zeros(N * G, T), mask.float(), INDEX, config=config, non_tensor_batch={k: x.numpy() for k, x in r.items()},
        batch=batch)[0]
    named = None if weights is None else dict(zip(r, weights))
    parts = {k: x.view(N, G) for k, x in r.items()}
    raw = gdpo_advantages(parts, weights=named, eps=1e-6)
    lengths = mask.sum(1).view(N, G)
    close(whiten(raw, lengths), per_sequence(theirs, mask), atol=2e-6)
    cfg = ObjectiveConfig(advantage="gdpo", whiten="token", eps=1e-6, aggregation="token-mean")
    credit = assign_credit(parts, lengths, cfg, weights=named)
    close(credit.advantages[:2], per_sequence(theirs, mask)[:2], atol=2e-6)
    assert not credit.advantages[2].any() and per_sequence(theirs, mask)[2].abs().min() > 1e-3  # ours stays at 0


# --- policy losses ----------------------------------------------------------------------------------------------------


def actor(**choices):
    config = verl_core.load("verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2, **choices)
    object.__setattr__(config, "global_batch_info", {})
    return config


CLIPS = dict(clip_ratio_low=0.1, clip_ratio_high=0.28)
POLICIES = {
    # verl's name: (its configuration, ours, its aggregation)
    "vanilla": (dict(clip_ratio_c=3.0, **CLIPS), dict(clip_low=0.1, clip_high=0.28, delta=3.0), "token-mean"),
    "vanilla-narrow": (dict(clip_ratio_c=1.4, **CLIPS), dict(clip_low=0.1, clip_high=0.28, delta=1.4), "seq-mean-token-mean"),
    "gspo": (dict(clip_ratio_low=0.4, clip_ratio_high=0.5), dict(ratio="sequence-token", clip_low=0.4, clip_high=0.5),
             "seq-mean-token-mean"),
    "cispo": (CLIPS, dict(policy="cispo", clip_low=0.1, clip_high=0.28), "token-mean"),
    "sapo": (dict(tau_pos=1.0, tau_neg=1.05), dict(policy="sapo"), "seq-mean-token-mean"),
    "geo_mean": (CLIPS, dict(policy="gmpo", clip_low=0.1, clip_high=0.28), "seq-mean-token-mean"),
}
OURS = {"token-mean": "token-mean", "seq-mean-token-mean": "sequence-mean"}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_policy_losses(verl, rows, name, corrected):
    theirs, ours, agg = POLICIES[name]
    logp, old, scores, _, mask = rows
    advantages = scores[:, None] * mask
    weights = None
    sampler = old - 0.4 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    row = torch.arange(N * G)[:, None].expand(mask.shape)
    level = "sequence-mean" if name == "geo_mean" else "token"  # geo_mean joins the tokens' weights by their mean log
    if corrected:
        weights = torch.ones_like(old)
        weights[mask] = importance_weights(old[mask], sampler[mask], row[mask], level=level, high=1.5)
        ours = ours | dict(correction="truncate", correction_level=level, correction_high=1.5)
    loss, _ = verl.get_policy_loss_fn(name.split("-")[0])(old, logp, advantages, mask.double(), agg, actor(**theirs), weights)
    mine, _ = objective_padded(logp, old, None, scores, mask, ObjectiveConfig(aggregation=OURS[agg], **ours), sampler=sampler)
    close(mine, loss)
    a, b = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (mine, loss))
    close(a, b)
    assert float(b.abs().max()) > 1e-3


def test_reinforce_with_correction(verl, rows):
    """verl's bypass mode: the samplers' log-probabilities are the old ones, the weight multiplies -A log p."""
    logp, old, scores, _, mask = rows
    row = torch.arange(N * G)[:, None].expand(mask.shape)
    weights = torch.ones_like(old)
    weights[mask] = importance_weights(logp[mask], old[mask], row[mask], high=2.0)
    loss, _ = verl.compute_policy_loss_reinforce(old, logp, scores[:, None] * mask, mask.double(), "seq-mean-token-sum",
                                                 actor(), weights)
    cfg = ObjectiveConfig(policy="reinforce", correction="truncate", aggregation="sequence-sum")
    mine, _ = objective_padded(logp, None, None, scores, mask, cfg, sampler=old)
    close(mine, loss)
    close(*(torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (mine, loss)))


def test_verl_default_is_verls_grpo(verl, rows):
    logp, old, scores, _, mask = rows
    a = verl.compute_grpo_outcome_advantage(terminal(scores, mask), mask.double(), INDEX)[0]
    theirs, _ = verl.compute_policy_loss_vanilla(old, logp, a, mask.double(), "token-mean", actor())
    cfg = recipe("verl-default")
    credit = assign_credit({"r": scores.view(N, G)}, mask.sum(1).view(N, G), cfg)
    mine, _ = objective_padded(logp, old, None, credit.advantages.flatten(), mask, cfg, credit.counts)
    close(mine, theirs)


# --- aggregation, value, KL, corrections ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, ours", [
    ("token-mean", "token-mean"), ("token-sum", "token-sum"), ("seq-mean-token-sum", "sequence-sum"),
    ("seq-mean-token-mean", "sequence-mean"), ("seq-mean-token-sum-norm", "constant")])
def test_aggregations_whole_and_in_parts(verl, rows, mode, ours):
    """Their two data-parallel ranks (losses times 2, gradients averaged) and our shares are one number; an empty row."""
    _, _, _, values, mask = rows
    mask = mask.clone()
    mask[5] = False
    counts = count(mask.sum(1))
    row = torch.arange(N * G)[:, None].expand(mask.shape)
    sizes = dict(batch_num_tokens=counts.tokens, global_batch_size=counts.sequences, loss_scale_factor=13)
    whole = verl.agg_loss(values, mask.double(), mode, **sizes)
    close(aggregate(values[mask], row[mask], ours, counts, 13), whole)
    ranks = [verl.agg_loss(values[r], mask[r].double(), mode, dp_size=2, **sizes) for r in (slice(0, 4), slice(4, 12))]
    close(sum(ranks) / 2, whole)
    shares = [aggregate(values[r][mask[r]], row[r][mask[r]], ours, counts, 13) for r in (slice(0, 4), slice(4, 12))]
    close(sum(shares), whole)


def test_value_loss(verl, rows):
    _, _, _, values, mask = rows
    v = (values + 0.4 * values.flip(0)).requires_grad_()
    returns, row = values.flip(1), torch.arange(N * G)[:, None].expand(mask.shape)
    theirs, fraction = verl.compute_value_loss(v, returns, values, mask.double(), 0.2)
    mine = aggregate(value_loss(v, returns, values, 0.2)[mask], row[mask], "token-mean", Counts(int(mask.sum()), N * G))
    close(mine, theirs)
    close(*(torch.autograd.grad(x, v, retain_graph=True)[0] for x in (mine, theirs)))
    from pellucid.align.metrics import critic_table

    table = critic_table(v[mask], returns[mask], values[mask], 0.2)
    assert table["critic/clipped"] == pytest.approx(float(fraction), abs=1e-6) and float(fraction) > 0.1


@pytest.mark.parametrize("name, ours", [("k1", "k1"), ("abs", "abs"), ("k2", "k2"), ("k3", "k3"), ("k3+", "k3+")])
def test_kl_estimators(verl, rows, name, ours):
    logp, old, *_ = rows
    theirs, mine = verl.kl_penalty(logp, old, name), kl_penalty(logp, old, ours)
    close(mine, theirs)
    close(*(torch.autograd.grad(x.sum(), logp, retain_graph=True)[0] for x in (mine, theirs)))


def test_adaptive_kl(verl):
    theirs, mine = verl.AdaptiveKLController(0.1, 6.0, 1000), KLController(0.1, 6.0, 1000)
    for kl in (1.0, 6.0, 7.0, 30.0, 0.0):
        theirs.update(kl, 64)
        assert mine.update(kl, 64) == pytest.approx(theirs.value, abs=1e-15)
    assert KLController(**mine.state()) == mine and KLController(0.2).update(99.0, 64) == 0.2
    assert EntropyController(0.3).update(0.1) == 0.3


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("band", [2.0, "0.5_1.5"])
@pytest.mark.parametrize("normalise", [False, True])
def test_rollout_corrections(rows, level, band, normalise):
    helper = verl_core.load("verl.trainer.ppo.rollout_corr_helper")
    logp, old, _, _, mask = rows
    trainer, row = logp.detach(), torch.arange(N * G)[:, None].expand(mask.shape)[mask]
    theirs, metrics = helper.compute_rollout_correction_weights(
        (trainer - old) * mask, mask.double(), level, band, normalise)
    low, high = (None, band) if isinstance(band, float) else (0.5, 1.5)
    mine = importance_weights(trainer[mask], old[mask], row, level=level, mode="mask" if low else "truncate", low=low, high=high)
    if low:
        dropped = float((mine == 0).double().mean())
        assert dropped == pytest.approx(metrics["rollout_is_oob_ratio"], abs=1e-7) and 0 < dropped < 1
    close(normalised(mine, row, level) if normalise else mine, theirs[mask])
