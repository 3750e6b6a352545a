"""Advantages: golden numbers, exact zeros for groups without difference, missing rewards, dynamic sampling."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from pellucid.align import (
    ObjectiveConfig,
    assign_credit,
    group_advantages,
    informative_groups,
    live_groups,
    recipe,
    total_reward,
)
from pellucid.align.advantages import pass_at_k_advantages, whiten
from pellucid.align.aggregation import Counts
from pellucid.errors import BadInput

SCALES, BASELINES = ("group", "batch", "none"), ("mean", "leave-one-out")
NAN = math.nan


def rewards(*groups):
    return torch.tensor(groups, dtype=torch.float64)


# --- golden numbers ---------------------------------------------------------------------------------------------------


def test_golden_numbers():
    total = total_reward({"a": rewards([1, 0, 1, 0]), "b": rewards([1, 1, 0, 0])})
    exact = dict(eps=0.0)
    assert group_advantages(total, **exact)[0].tolist() == pytest.approx([1.2247449, 0, 0, -1.2247449])
    assert group_advantages(total, scale="none")[0].tolist() == [1, 0, 0, -1]
    assert group_advantages(total, scale="none", baseline="leave-one-out")[0].tolist() == pytest.approx(
        [4 / 3, 0, 0, -4 / 3])
    for low, high in ((0, 1), (0, 2), (1, 2)):
        assert group_advantages(rewards([low, high]), **exact)[0].tolist() == pytest.approx([-0.5**0.5, 0.5**0.5])
    total = total_reward({"correct": rewards([3, -1, 1, -3]), "format": rewards([0, 1, 0, 1])})
    assert group_advantages(total)[0].tolist() == pytest.approx([1.2009, -0.2402, 0.2402, -1.2009], abs=5e-5)


def test_leave_one_out_is_what_it_says():
    r = torch.rand(5, 6, dtype=torch.float64)
    a = group_advantages(r, scale="none", baseline="leave-one-out")
    for i, j in itertools.product(range(5), range(6)):
        others = [float(r[i, k]) for k in range(6) if k != j]
        assert float(a[i, j]) == pytest.approx(float(r[i, j]) - statistics.mean(others))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_equals_the_statistics_module_with_missing_rewards(scale, baseline):
    """Against Python's own mean and stdev (n - 1), group after group, over the valid completions only."""
    g = torch.Generator().manual_seed(1)
    r = torch.rand(7, 5, generator=g, dtype=torch.float64)
    r[0, 1] = r[3, 0] = r[3, 4] = NAN
    valid = torch.ones(7, 5, dtype=torch.bool)
    valid[2, 2] = valid[5, :4] = False  # group 5 has a single valid completion: nothing to compare with
    a = group_advantages(r, scale=scale, baseline=baseline, eps=1e-3, valid=valid)
    kept = [[float(r[i, j]) for j in range(5) if valid[i, j] and not r[i, j].isnan()] for i in range(7)]
    spread = statistics.stdev(itertools.chain(*kept))
    for i, j in itertools.product(range(7), range(5)):
        if not valid[i, j] or r[i, j].isnan() or len(kept[i]) < 2:
            assert float(a[i, j]) == 0
            continue
        n, mean = len(kept[i]), statistics.mean(kept[i])
        divisor = {"group": statistics.stdev(kept[i]) + 1e-3, "batch": spread + 1e-3, "none": 1}[scale]
        expected = (float(r[i, j]) - mean) / divisor * (n / (n - 1) if baseline == "leave-one-out" else 1)
        assert float(a[i, j]) == pytest.approx(expected, abs=1e-12)


# --- H1: constants without an exact binary representation -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_constant_groups_are_exactly_zero(dtype, scale, baseline):
    noisy = 0
    for constant in (0.1, 0.3, 0.7, 1 / 3, 1e-3, 3.3, -0.6, 123.456):
        for size in (2, 3, 5, 6, 7, 8, 12, 16, 31, 64):
            dead = torch.full((3, size), constant, dtype=dtype)
            dead[1] *= 3
            noisy += bool((dead - dead.mean(1, keepdim=True)).any())
            a = group_advantages(dead, scale=scale, baseline=baseline, eps=0.0)
            assert not a.any() and not a.isnan().any()
            mixed = dead.clone()
            mixed[1, 0] += 1  # one live group among dead ones
            a = group_advantages(mixed, scale=scale, baseline=baseline, eps=1e-9)
            assert not a[0].any() and not a[2].any() and a[1].all()
            components = {"r": mixed}
            assert informative_groups(components)["r"].tolist() == [False, True, False]
            assert live_groups(components, "total").tolist() == [False, True, False]
    assert noisy > 20, "the sweep must contain means that differ from the constant in the last bit"


def test_equal_totals_from_different_parts_are_equal():
    """0.1 + 0.2 != 0.3 + 0.0 in binary; the group is still without difference."""
    parts = {"a": rewards([0.1, 0.3], [0.7, 0.8]), "b": rewards([0.2, 0.0], [0.1, 0.0])}
    assert float(parts["a"][0, 0] + parts["b"][0, 0]) != float(parts["a"][0, 1] + parts["b"][0, 1])
    assert not group_advantages(total_reward(parts), eps=0.0).any()
    assert not live_groups(parts, "total").any() and live_groups(parts, "any").all()


def test_permutations():
    g = torch.Generator().manual_seed(2)
    parts = {name: torch.rand(4, 6, generator=g, dtype=torch.float64) for name in "abc"}
    weights = {"a": 0.3, "b": 1.0, "c": 2.0}
    total = total_reward(parts, weights)
    assert torch.equal(total, total_reward({name: parts[name] for name in "cab"}, weights))  # bit for bit
    columns, groups = torch.randperm(6, generator=g), torch.randperm(4, generator=g)
    for scale, baseline in itertools.product(SCALES, BASELINES):
        a = group_advantages(total, scale=scale, baseline=baseline)
        moved = group_advantages(total[groups][:, columns], scale=scale, baseline=baseline)
        torch.testing.assert_close(moved, a[groups][:, columns])


# --- missing rewards and refusals -------------------------------------------------------------------------------------


def test_missing_components():
    parts = {"a": rewards([1, NAN, NAN, 0]), "b": rewards([1, 1, NAN, 0])}
    zero, exclude = total_reward(parts), total_reward(parts, missing="exclude")
    assert zero[0, [0, 1, 3]].tolist() == [2, 1, 0] and zero[0, 2].isnan()
    assert exclude[0, [0, 3]].tolist() == [2, 0] and exclude[0, 1:3].isnan().all()
    assert float(group_advantages(zero, scale="none")[0, 2]) == 0
    assert group_advantages(exclude, scale="none")[0].tolist() == [1, 0, 0, -1]
    with pytest.raises(BadInput, match="missing"):
        total_reward(parts, missing="refuse")
    lacking = {"a": rewards([1, 0]), "b": rewards([NAN, NAN])}  # a whole group without the component: no effect
    for rule in ("zero", "exclude"):
        assert torch.equal(group_advantages(total_reward(lacking, missing=rule)), group_advantages(lacking["a"]))
    assert not informative_groups(lacking)["b"].any()


@pytest.mark.parametrize("call, told", [
    (lambda: group_advantages(rewards([1.0], [2.0])), "at least 2"),
    (lambda: group_advantages(torch.zeros(4)), "prompts"),
    (lambda: group_advantages(rewards([1, math.inf])), "infinite"),
    (lambda: group_advantages(total_reward({"a": rewards([1, -math.inf])})), "infinite"),
    (lambda: group_advantages(rewards([1, 0]), scale="groups"), "'group'"),
    (lambda: group_advantages(rewards([1, 0]), baseline="rloo"), "leave-one-out"),
    (lambda: group_advantages(rewards([1, 0]), valid=torch.ones(2, dtype=torch.bool)), "valid"),
    (lambda: total_reward({}), "no reward"),
    (lambda: total_reward({"correct": rewards([1, 0])}, {"corect": 2.0}), "'correct'"),
    (lambda: total_reward({"a": rewards([1, 0]), "b": rewards([1, 0, 0])}), "shape"),
    (lambda: total_reward({"a": rewards([1, 0]), "b": rewards([1, 0])}, {"a": 2.0}), "'b' has no weight"),
    (lambda: total_reward({"total": rewards([1, 0])}), "'total'"),
    (lambda: live_groups({"correct": rewards([1, 0])}, "correctt"), "'correct'"),
    (lambda: assign_credit({"a": rewards([1, 0])}, torch.ones(1, 2), recipe("dapo")), "truncated"),
])
def test_refusals(call, told):
    with pytest.raises(BadInput) as error:
        call()
    assert told in str(error.value)


# --- dynamic sampling and credit --------------------------------------------------------------------------------------


def test_live_groups_look_at_components():
    """Three rewards with a constant total: no GRPO signal, but the components differ (alignment notes, 8.5)."""
    parts = {"a": rewards([1, 1, 0, 0], [1, 1, 1, 1]), "b": rewards([0, 0, 1, 0], [0, 0, 0, 0]),
             "c": rewards([0, 0, 0, 1], [0, 1, 0, 1])}
    assert live_groups(parts).tolist() == [True, True]
    assert live_groups(parts, weights={"a": 1.0, "b": 1.0, "c": 0.0}).tolist() == [True, False]
    assert live_groups(parts, weights=dict.fromkeys("abc", 0.0)).tolist() == [False, False]
    assert live_groups(parts, "total").tolist() == [False, True]
    assert live_groups(parts, "a").tolist() == [True, False]
    assert {k: v.tolist() for k, v in informative_groups(parts).items()} == {
        "a": [True, False], "b": [True, False], "c": [True, True]}


def rollout():
    parts = {"correct": rewards([1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]), "format": torch.ones(3, 4)}
    lengths = torch.tensor([[3, 5, 2, 4], [1, 1, 1, 1], [9, 9, 2, 0]])
    cut = lengths == 9
    return parts, lengths, cut


def test_credit_keeps_everything_by_default():
    parts, lengths, _ = rollout()
    credit = assign_credit(parts, lengths, ObjectiveConfig())
    assert credit.live.all() and torch.equal(credit.lengths, lengths) and not credit.skip
    assert (credit.counts.tokens, credit.counts.sequences) == (38, 11)  # the completion of length 0 does not count
    assert assign_credit(parts, lengths, ObjectiveConfig(empty="count")).counts.sequences == 12
    assert float(credit.advantages[2, 3]) == 0 and credit.advantages.dtype == torch.float32
    three = group_advantages(rewards([0, 0, 1]))[0].float()  # the empty completion left its baseline
    torch.testing.assert_close(credit.advantages[2, :3], three)


def test_credit_drops_dead_groups():
    parts, lengths, _ = rollout()
    credit = assign_credit(parts, lengths, ObjectiveConfig(dead_groups="drop"))
    assert credit.live.tolist() == [True, False, True] and not credit.lengths[1].any()
    assert (credit.counts.tokens, credit.counts.sequences) == (34, 7)


def test_credit_of_truncated_completions():
    parts, lengths, cut = rollout()
    masked = assign_credit(parts, lengths, ObjectiveConfig(truncated="mask", empty="count"), truncated=cut)
    assert masked.lengths[2].tolist() == [0, 0, 2, 0] and masked.counts.tokens == 20 and masked.counts.sequences == 12
    kept = assign_credit(parts, lengths, ObjectiveConfig())
    assert torch.equal(masked.advantages, kept.advantages)  # still siblings in the baseline
    zeroed = assign_credit(parts, lengths, ObjectiveConfig(truncated="zero-reward", scale="none"), truncated=cut)
    assert zeroed.total[2].tolist() == [0, 0, 2, 1] and zeroed.counts.tokens == 38
    dapo = assign_credit(parts, lengths, recipe("dapo"), truncated=cut)
    assert dapo.live.tolist() == [True, False, True] and dapo.counts.tokens == 16


def test_nothing_to_learn_is_said():
    _, lengths, cut = rollout()
    dead = {"correct": torch.full((3, 4), 0.1), "format": torch.full((3, 4), 0.7)}
    for cfg in (ObjectiveConfig(), ObjectiveConfig(dead_groups="drop"), ObjectiveConfig(scale="batch", eps=0.0)):
        credit = assign_credit(dead, lengths, cfg)
        assert credit.skip and not credit.advantages.any()
    assert assign_credit(dead, lengths, ObjectiveConfig(dead_groups="drop")).counts.tokens == 0
    assert not assign_credit(dead, lengths, ObjectiveConfig(beta=0.1)).skip  # kept groups still feel the KL term
    assert assign_credit(dead, lengths, ObjectiveConfig(beta=0.1, dead_groups="drop")).skip
    only = {"correct": rewards([1, 0, 0, 0]), "format": rewards([1, 1, 1, 1])}  # all but cut ones are equal
    cut = torch.tensor([[True] * 4])
    assert assign_credit(only, torch.full((1, 4), 3), ObjectiveConfig(truncated="mask"), truncated=cut).skip


def test_clip_then_kl_then_baseline():
    """T11: the reward is clipped before the KL penalty, both before the baseline; worked on paper."""
    cfg = ObjectiveConfig(scale="none", baseline="leave-one-out", reward_clip=1.0, reward_beta=0.5)
    parts, ones = {"r": rewards([3.0, 0.5, -0.5])}, torch.ones(1, 3, dtype=torch.int64)
    kl = rewards([0.2, 0.4, -0.6])
    r = [1.0 - 0.1, 0.5 - 0.2, -0.5 + 0.3]
    expected = [r[0] - (r[1] + r[2]) / 2, r[1] - (r[0] + r[2]) / 2, r[2] - (r[0] + r[1]) / 2]
    assert assign_credit(parts, ones, cfg, kl=kl).advantages[0].tolist() == pytest.approx(expected)
    with pytest.raises(BadInput, match="pass kl"):
        assign_credit(parts, ones, cfg)
    assert not assign_credit({"r": rewards([1, 1, 1])}, ones, cfg, kl=kl).skip  # the KL itself tells them apart


def test_length_weighted_baseline():
    """OPO: sum of L R / sum of L; an empty or ungraded completion does not weigh."""
    a = group_advantages(rewards([1, 0, 4, NAN]), scale="none", baseline="length-weighted",
                         lengths=torch.tensor([[3, 1, 0, 9]]), valid=torch.tensor([[True, True, False, True]]))
    assert a[0].tolist() == pytest.approx([0.25, -0.75, 0, 0])
    with pytest.raises(BadInput, match="lengths"):
        group_advantages(rewards([1, 0]), baseline="length-weighted")


def test_the_smallest_difference_counts():
    r = rewards([1.0, 1.0, math.nextafter(1.0, 2)])
    assert informative_groups({"r": r})["r"].item() and group_advantages(r, scale="none")[0].any()


def test_token_level_credit_is_the_score():
    """For `gae` and `returns` the credit of a completion is its score; a group of one is no obstacle there."""
    parts, ones = {"r": rewards([2.0], [NAN])}, torch.ones(2, 1, dtype=torch.int64)
    credit = assign_credit(parts, ones, recipe("ppo"))
    assert credit.advantages.flatten().tolist() == [2, 0] and not credit.skip
    with pytest.raises(BadInput, match="at least 2"):
        assign_credit(parts, ones, ObjectiveConfig())


@pytest.mark.parametrize("advantage", ["gae", "returns"])
def test_what_nobody_graded_is_no_score_of_zero(advantage):
    """Without a group to compare with, it is left out of the step: 0 may be the best grade there is."""
    lengths = torch.tensor([[3, 2], [4, 1]])
    credit = assign_credit({"r": rewards([-5.0, math.nan], [-9.0, -7.0])}, lengths, ObjectiveConfig(advantage=advantage))
    assert credit.lengths.tolist() == [[3, 0], [4, 1]] and credit.counts == Counts(8, 3) and not credit.skip
    none = assign_credit({"r": rewards([math.nan, math.nan])}, lengths[:1], ObjectiveConfig(advantage=advantage))
    assert none.counts.tokens == 0 and none.skip


def test_soft_overlong_is_trls():
    from pellucid.align import soft_overlong

    assert soft_overlong(torch.tensor([80, 90, 100, 101]), 100, 20).tolist() == [0, -0.5, -1, -1]
    with pytest.raises(BadInput, match="margin"):
        soft_overlong(torch.tensor([1]), 10, 20)


def test_pass_at_k_and_whitening_by_hand():
    assert pass_at_k_advantages(rewards([4, 1, 0, 0])).tolist() == [[3, 0, 0, 0]]
    for eps_in, divisor in (("variance", (2 + 0.5) ** 0.5), ("std", 2**0.5 + 0.5)):
        torch.testing.assert_close(whiten(torch.tensor([0.0, 2.0]), eps=0.5, eps_in=eps_in), torch.tensor([-1.0, 1.0]) / divisor)
