"""Advantages of tokens: by hand, and the same with and without the observation tokens of a multi-turn episode."""

from __future__ import annotations

import pytest
import torch

from pellucid.align import ObjectiveConfig, gae, recipe, returns_to_go, token_advantages, token_rewards, whiten
from pellucid.align.returns import Layout
from pellucid.align.value import value_clipped, value_loss
from pellucid.errors import BadInput

DOUBLE = torch.float64


def episode(seed=0, B=4, T=12):
    """Random rewards and values with observation spans inside and at the end."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=g) < 0.6
    mask[:, 0] = True
    mask[2] = True
    rewards, values = (torch.randn(B, T, generator=g, dtype=DOUBLE) for _ in range(2))
    return rewards * mask, values, mask


def test_gae_by_hand():
    """Two model tokens, an observation between them, gamma 0.9, lam 0.8: worked on paper."""
    rewards = torch.tensor([[0.5, 0.0, 2.0]], dtype=DOUBLE)
    values = torch.tensor([[1.0, 77.0, 3.0]], dtype=DOUBLE)
    mask = torch.tensor([[True, False, True]])
    last = 2.0 - 3.0
    first = (0.5 + 0.9 * 3.0 - 1.0) + 0.9 * 0.8 * last
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    assert advantages[0].tolist() == pytest.approx([first, 0, last])
    assert returns[0].tolist() == pytest.approx([first + 1.0, 0, 2.0])  # of the unwhitened advantages (T3)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_observation_tokens_change_nothing(gamma, lam):
    """T4: an episode with its observation tokens deleted gives identical numbers, bit for bit."""
    rewards, values, mask = episode()
    with_them = gae(rewards, values.masked_fill(~mask, float("nan")), mask, gamma=gamma, lam=lam)
    returns = returns_to_go(rewards, mask, gamma=gamma)
    for b in range(len(mask)):
        keep = mask[b]
        alone = gae(rewards[b : b + 1, keep], values[b : b + 1, keep], keep[keep][None], gamma=gamma, lam=lam)
        assert all(torch.equal(a[b, keep], x[0]) and not a[b, ~keep].any() for a, x in zip(with_them, alone))
        plain = returns_to_go(rewards[b : b + 1, keep], keep[keep][None], gamma=gamma)
        assert torch.equal(returns[b, keep], plain[0])


def test_lambda_one_is_the_return_minus_the_value():
    rewards, values, mask = episode()
    advantages, returns = gae(rewards, values, mask, lam=1.0)
    torch.testing.assert_close(returns, returns_to_go(rewards, mask))
    torch.testing.assert_close(advantages, (returns - values) * mask)


def test_padding_and_order():
    rewards, values, mask = episode()
    pad = torch.nn.functional.pad
    a, b = gae(rewards, values, mask), gae(pad(rewards, (0, 5)), pad(values, (0, 5), value=9.0), pad(mask, (0, 5)))
    assert all(torch.equal(y[:, :12], x) and not y[:, 12:].any() for x, y in zip(a, b))
    order = torch.tensor([2, 0, 3, 1])
    c = gae(rewards[order], values[order], mask[order])
    assert all(torch.equal(x[order], y) for x, y in zip(a, c))


def test_score_stands_on_the_last_token_of_the_model():
    """Two completions interleaved; KL on every token, the score on the last of each."""
    sequence = torch.tensor([0, 1, 0, 1, 1])
    kl = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), sequence, kl, beta=0.5)
    assert rewards.tolist() == pytest.approx([-0.05, -0.1, 2 - 0.15, -0.2, -1 - 0.25])
    with pytest.raises(BadInput, match="did not write"):
        gae(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[True, False]]))
    with pytest.raises(BadInput, match="shape"):
        returns_to_go(torch.ones(1, 2), torch.ones(1, 3).bool())


def test_the_critics_loss_by_hand():
    """The larger of both errors, each way: near the old value and far from the return, or clipped to a smaller error."""
    values, returns, old = (torch.tensor(x, dtype=DOUBLE) for x in ([1.0, 1.0, 3.0], [2.0, 0.0, 0.0], [0.0, 3.0, 2.0]))
    assert value_loss(values, returns, old, 0.5).tolist() == pytest.approx([2.25 / 2, 6.25 / 2, 9 / 2])
    assert value_loss(values, returns).tolist() == value_loss(values, returns, old).tolist() == pytest.approx([0.5, 0.5, 4.5])
    assert value_clipped(values, returns, old, 0.5).tolist() == [True, True, False]


def test_layout_goes_there_and_back():
    sequence = torch.tensor([2, 0, 2, 2, 0, 3])
    values = torch.arange(6.0)
    layout = Layout(sequence)
    assert layout.rows(values).tolist() == [[1, 4, 0], [0, 0, 0], [0, 2, 3], [5, 0, 0]]
    assert layout.mask.sum(1).tolist() == [2, 0, 3, 1]
    assert torch.equal(layout.flat(layout.rows(values)), values)
    assert layout.is_last.tolist() == [False, False, False, True, True, True]


def test_flat_tokens_equal_rows():
    """`token_advantages` of PPO and REINFORCE++ against the padded functions; whatever order the completions lie in."""
    g = torch.Generator().manual_seed(2)
    lengths, T = torch.tensor([3, 1, 6, 4]), 6
    mask = torch.arange(T)[None] < lengths[:, None]
    sequence = torch.arange(4)[:, None].expand(4, T)[mask]
    old, ref, critic = (torch.randn(len(sequence), generator=g, dtype=DOUBLE) for _ in range(3))
    score = torch.randn(4, generator=g, dtype=DOUBLE)
    rewards = torch.zeros(4, T, dtype=DOUBLE)
    rewards[mask] = -0.05 * (old - ref)
    rewards[torch.arange(4), lengths - 1] += score
    values = torch.zeros(4, T, dtype=DOUBLE)
    values[mask] = critic
    expected, targets = gae(rewards, values, mask)
    cfg = recipe("ppo")
    a, r = token_advantages(score, sequence, cfg, old=old, ref=ref, critic=critic)
    torch.testing.assert_close(a, whiten(expected[mask]).float())
    torch.testing.assert_close(r, targets[mask].float())
    order = torch.tensor([4, 0, 10, 1, 5, 3, 6, 11, 2, 7, 12, 8, 9, 13])  # tokens of a completion keep their order
    b, _ = token_advantages(score, sequence[order], cfg, old=old[order], ref=ref[order], critic=critic[order])
    torch.testing.assert_close(b, a[order])
    plain, none = token_advantages(score, sequence, recipe("reinforce++", reward_beta=0.05), old=old, ref=ref)
    torch.testing.assert_close(plain, whiten(returns_to_go(rewards, mask)[mask]).float())
    assert none is None
    group, _ = token_advantages(score, sequence, ObjectiveConfig())
    assert torch.equal(group, score[sequence])
    with pytest.raises(BadInput, match="critic"):
        token_advantages(score, sequence, cfg, old=old, ref=ref)
    with pytest.raises(BadInput, match="ref"):
        token_advantages(score, sequence, cfg, critic=critic)


def test_whitening():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=g, dtype=DOUBLE)
    white = whiten(x, eps=0.0)
    assert float(white.mean()) == pytest.approx(0, abs=1e-12) and float(white.std()) == pytest.approx(1)
    scaled = whiten(x, eps=0.0, shift=False)
    assert float(scaled.mean()) == pytest.approx(float(x.mean())) and float(scaled.std()) == pytest.approx(1)
    weight = torch.randint(0, 4, (50,), generator=g)
    repeated = whiten(x.repeat_interleave(weight))
    torch.testing.assert_close(whiten(x, weight).repeat_interleave(weight), repeated)
    assert not whiten(x, weight)[weight == 0].any()
    for constant in (0.1, 1 / 3, -7.7):
        same = torch.full((7,), constant, dtype=DOUBLE)
        assert not whiten(same, eps=0.0).any() and torch.equal(whiten(same, eps=0.0, shift=False), same)
    assert not whiten(torch.zeros(0)).numel() and not whiten(torch.tensor([3.0])).any()
