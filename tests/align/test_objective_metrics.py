"""The metric table: against numpy, by hand, and over nothing."""

from __future__ import annotations

import fnmatch
import math

import numpy as np
import pytest
import torch

from pellucid.align import ObjectiveConfig, count
from pellucid.align import metrics as table
from pellucid.align.objective import objective

NAN = math.nan


def test_reward_table_by_hand():
    correct = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1]])
    style = torch.tensor([[NAN] * 4, [1, 0, NAN, 0], [1, NAN, 1, 1], [0, 0, 0, 0]])
    got = table.reward_table({"correct": correct, "style": style}, {"correct": 1.0, "style": 0.5})
    assert got["reward/correct/mean"] == pytest.approx(float(correct.mean()))
    assert got["reward/correct/std"] == pytest.approx(np.std(correct.double().numpy(), ddof=1))
    assert (got["reward/correct/informative"], got["reward/correct/all_wrong"], got["reward/correct/all_right"]) == (
        0.25, 0.25, 0.25)
    assert got["reward/style/mean"] == pytest.approx(4 / 10)
    assert got["reward/style/informative"] == pytest.approx(1 / 3)  # nobody graded the first group
    assert (got["reward/style/all_wrong"], got["reward/style/all_right"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert got["reward/total/mean"] == pytest.approx((2 + 0.5 + 4 + 1.5 + 0.4) / 16)
    assert got["reward/total/informative"] == 0.75


def test_quantiles_equal_numpy():
    g = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 10, 101):
        h = torch.rand(size, generator=g, dtype=torch.float64)
        got = table.entropy_table(h)
        assert got["entropy/mean"] == pytest.approx(h.numpy().mean())
        assert got["entropy/p10"] == pytest.approx(np.quantile(h.numpy(), 0.1))
        assert got["entropy/p90"] == pytest.approx(np.quantile(h.numpy(), 0.9))


def test_length_table_by_hand():
    lengths = torch.tensor([[2, 4], [6, 20]])
    got = table.length_table(lengths, lengths == 20, torch.tensor([[True, True], [False, False]]))
    assert got["length/mean"] == 8 and got["length/max"] == 20 and got["length/truncated"] == 0.25
    assert got["length/right"] == 3 and got["length/wrong"] == 13
    assert got["length/p95"] == pytest.approx(np.quantile([2, 4, 6, 20], 0.95))
    none_right = table.length_table(lengths, lengths == 20, torch.zeros(2, 2))
    assert math.isnan(none_right["length/right"]) and none_right["length/wrong"] == 8


def test_advantages_diversity_engine():
    a = torch.tensor([[1.0, -1.0, 0.0, -0.0], [1.0 + 1e-9, 0.5, 0.0, -1.5]])
    got = table.advantage_table(a)
    assert (got["advantage/min"], got["advantage/max"], got["advantage/distinct"]) == (-1.5, pytest.approx(1), 5)
    assert got["advantage/std"] == pytest.approx(a.double().std().item())
    assert table.diversity_table([["x", "x"], ["x", "y"], []])["diversity/distinct"] == 0.75
    assert table.diversity_table([[(1, 2), (1, 2), (3,)]])["diversity/distinct"] == pytest.approx(2 / 3)
    assert table.diversity_table([["ab", "ab"], ["abc", "abd"], ["x", "y"]])["diversity/bigrams"] == pytest.approx((1 / 2 + 3 / 4) / 2)
    same = torch.randn(9)
    assert table.engine_table(same, same) == {"engine/gap_mean": 0, "engine/gap_max": 0, "engine/ess": 1}
    w = np.array([1.0, 1.0, 2.0])
    got = table.engine_table(torch.tensor(np.log(w)), torch.zeros(3))
    assert got["engine/ess"] == pytest.approx(w.sum() ** 2 / (w**2).sum() / 3)
    assert got["engine/gap_max"] == pytest.approx(math.log(2))
    assert table.engine_table(torch.tensor([800.0, 0.0]), torch.zeros(2))["engine/ess"] == pytest.approx(0.5)


def test_means_over_nothing_are_nan():
    nothing, no = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    for got in (table.entropy_table(nothing), table.length_table(nothing, no, no), table.engine_table(nothing, nothing),
                table.advantage_table(nothing), table.diversity_table([])):
        assert all(math.isnan(v) for v in got.values())


def test_drift_by_hand():
    logp, old = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.2, -1.5, -0.5])
    ref, a = torch.tensor([-1.1, -2.5, -0.5]), torch.tensor([1.0, -1.0, 0.0])
    sequence = torch.tensor([0, 0, 1])
    _, m = objective(logp, old, ref, a, sequence, ObjectiveConfig(clip_low=0.3), count(torch.tensor([2, 1])))
    r = np.exp([0.2, -0.5, 0.0])
    assert float(m["ratio/mean"]) == pytest.approx(r.mean()) and float(m["ratio/max"]) == pytest.approx(r.max())
    assert float(m["clip/low"]) == pytest.approx(1 / 3) and float(m["clip/high"]) == pytest.approx(1 / 3)
    assert float(m["kl/old_k1"]) == pytest.approx((-0.2 + 0.5) / 3)
    assert float(m["kl/old_k3"]) == pytest.approx((np.exp(0.2) - 1.2 + np.exp(-0.5) - 0.5) / 3)
    assert float(m["kl/ref_k1"]) == pytest.approx((0.1 + 0.5) / 3)
    assert float(m["kl/ref_k3"]) == pytest.approx((np.exp(-0.1) - 0.9 + np.exp(-0.5) - 0.5) / 3)
    assert float(m["advantage/token_abs"]) == pytest.approx(2 / 3)


def test_merge_adds_and_takes_maxima():
    parts = [{"ratio/mean": torch.tensor(0.25), "ratio/max": torch.tensor(3.0)}, {"ratio/mean": 0.5, "ratio/max": 2.0}]
    assert table.merge(parts) == {"ratio/mean": 0.75, "ratio/max": 3.0}
    assert table.merge([{"ratio/max": -2.0}, {"ratio/max": -3.0}]) == {"ratio/max": -2.0} and table.merge([]) == {}


def test_every_metric_is_explained_and_every_explanation_used():
    x = torch.rand(4)
    cfg = ObjectiveConfig(beta=0.1, delta=2.0, log_ratio_bound=20.0, kl_bound=10.0, correction="mask")
    keys = set(objective(x, x, x, x, torch.arange(4), cfg, count(torch.ones(4)), sampler=x)[1])
    for got in (table.reward_table({"a": x.view(2, 2)}), table.advantage_table(x), table.entropy_table(x),
                table.length_table(x, x > 1, x > 0), table.diversity_table([["a", "b"]]), table.engine_table(x, x),
                table.correction_table(x, torch.arange(4)), table.critic_table(x, x * 2, x, 0.2)):
        keys |= set(got)
    used = {pattern: [k for k in keys if fnmatch.fnmatch(k, pattern)] for pattern in table.MEANING}
    assert all(used.values()), [p for p, found in used.items() if not found]
    assert {k for found in used.values() for k in found} == keys


def test_what_a_clip_acts_on():
    """CISPO: tokens whose weight is cut, whatever the sign of A; GMPO: whose log ratio is."""
    log_r = torch.tensor([-0.5, 0.1, 0.5, 2.0])
    zero, a = torch.zeros(4), torch.tensor([1.0, -1.0, -1.0, 1.0])
    counts, sequence = count(torch.ones(4)), torch.arange(4)
    for policy, low, high, expect in (("cispo", 0.2, 0.4, (1, 2)), ("cispo", 1.0, 4.0, (0, 1)), ("gmpo", 0.2, 0.4, (1, 2)),
                                      ("gmpo", 0.6, 0.05, (0, 3))):
        cfg = ObjectiveConfig(policy=policy, clip_low=low, clip_high=high)
        _, m = objective(log_r, zero, None, a, sequence, cfg, counts)
        assert (4 * float(m["clip/low"]), 4 * float(m["clip/high"])) == pytest.approx(expect), (policy, low)
    _, m = objective(log_r, zero, None, a, sequence, ObjectiveConfig(policy="sapo"), counts)
    assert "clip/low" not in m  # a soft gate silences nobody


def test_critic_table_by_hand():
    v, target = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 5.0])
    got = table.critic_table(v, target, v - torch.tensor([0.0, 0.5, 0.0]), 0.2)
    assert got["critic/explained"] == pytest.approx(1 - np.var([0, 1, 2]) / np.var([1, 3, 5]))
    assert (got["critic/value"], got["critic/return"]) == (2, 3) and got["critic/clipped"] == pytest.approx(1 / 3)
    assert math.isnan(table.critic_table(v, torch.ones(3), v, None)["critic/explained"])
