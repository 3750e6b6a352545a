"""GDPO (arXiv 2601.05242): figure 3 whole and exactly, worked numbers, the exact zeros, and what the paper gets wrong."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from pellucid.align import (
    ObjectiveConfig,
    assign_credit,
    conditioned,
    gdpo_advantages,
    group_advantages,
    total_reward,
    whiten,
)
from pellucid.align.advantages import whitening
from pellucid.errors import BadInput


def rewards(*groups):
    return torch.tensor(groups, dtype=torch.float64)


def parts_of(*rows):
    """Reward vectors of one group -> components."""
    return {f"r{k}": rewards(list(row)) for k, row in enumerate(rows)}


# --- figure 3: how many different sets of advantages can n binary rewards and G rollouts give? ------------------------

LEFT = {"grpo": {2: 2, 3: 4, 4: 7}, "no-std": {2: 3, 3: 6, 4: 10}, "gdpo": {2: 3, 3: 6, 4: 14}}  # n = 2, by G
RIGHT = {"grpo": {2: 7, 3: 14, 4: 23}, "no-std": {2: 10, 3: 20, 4: 35}, "gdpo": {2: 14, 3: 45, 4: 127}}  # G = 4, by n
CHUNK = 2**16


def distinct(rows):
    """The number of different multisets of advantages, after rounding to 1e-6 (and, the same, to 1e-9); rows come in
    chunks of (groups, G)."""
    found: dict[float, set[bytes]] = {1e6: set(), 1e9: set()}
    for advantages in rows:
        for places, seen in found.items():
            steps = (advantages.double() * places).round().to(torch.int64).sort(1).values  # integers: -0.0 is 0
            seen |= {row.tobytes() for row in np.unique(steps.numpy(), axis=0)}
    assert len(found[1e6]) == len(found[1e9])
    return len(found[1e6])


def group_series(G, n, scale):
    """Totals 0 .. n of G rollouts, as multisets: all that a sum of n binary rewards can be."""
    totals = torch.tensor(list(itertools.combinations_with_replacement(range(n + 1), G)), dtype=torch.float64)
    return distinct(group_advantages(part, scale=scale, eps=0.0) for part in totals.split(CHUNK))


def gdpo_series(G, n):
    """Multisets of n reward vectors from {0, 1}^G: the order of rewards, all of weight 1, does not matter."""
    columns = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * G)
    alone = group_advantages(columns, eps=0.0)  # (2^G, G), every reward normalised by itself
    picks = itertools.combinations_with_replacement(range(len(columns)), n)

    def chunks():
        while part := list(itertools.islice(picks, CHUNK)):
            yield alone[torch.tensor(part)].sum(1).round(decimals=12)

    return distinct(chunks())


def test_the_sum_of_columns_is_gdpo():
    g = torch.Generator().manual_seed(0)
    r = torch.randint(0, 2, (3, 50, 5), generator=g).double()
    expected = sum(group_advantages(x, eps=0.0) for x in r)
    torch.testing.assert_close(gdpo_advantages({f"r{k}": x for k, x in enumerate(r)}, eps=0.0), expected, atol=1e-12, rtol=0)


def test_figure_3_published_numbers():
    for G in (2, 3, 4):
        assert group_series(G, 2, "group") == LEFT["grpo"][G]
        assert group_series(G, 2, "none") == LEFT["no-std"][G]
        assert gdpo_series(G, 2) == LEFT["gdpo"][G]
    for n in (2, 3, 4):
        assert group_series(4, n, "group") == RIGHT["grpo"][n]
        assert group_series(4, n, "none") == RIGHT["no-std"][n]
        assert gdpo_series(4, n) == RIGHT["gdpo"][n]


def test_figure_3_whole():
    """Both panels to their ends: left G = 2 .. 16 (GDPO, as plotted, to 11), right n = 2 .. 8 (GDPO to 6)."""
    left = {G: (group_series(G, 2, "group"), group_series(G, 2, "none")) for G in range(2, 17)}
    right = {n: (group_series(4, n, "group"), group_series(4, n, "none")) for n in range(2, 9)}
    for G, (std, plain) in left.items():  # closed forms: multisets of 0, 1, 2 up to a shift; up to shift and scale
        assert plain == math.comb(G + 1, 2) and std == math.comb(G, 2) + 1
    for n, (_, plain) in right.items():
        assert plain == math.comb(n + 3, 3)
    gdpo_left, gdpo_right = {G: gdpo_two(G) for G in range(2, 12)}, {n: gdpo_series(4, n) for n in range(2, 7)}
    assert {G: (*left[G], gdpo_left.get(G)) for G in left} == FIGURE_3_LEFT
    assert {n: (*right[n], gdpo_right.get(n)) for n in right} == FIGURE_3_RIGHT
    assert gdpo_left[2] == left[2][1] and gdpo_left[3] == left[3][1]  # a tie that the paper does not mention


def gdpo_two(G):
    """n = 2 without 2^(2G) assignments: only how many rollouts got (0, 0), (0, 1), (1, 0), (1, 1) matters."""
    kinds = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    groups = kinds[torch.tensor(list(itertools.combinations_with_replacement(range(4), G)))]
    return distinct([gdpo_advantages({"a": groups[..., 0], "b": groups[..., 1]}, eps=0.0)])


def test_two_ways_of_counting_agree():
    for G in (2, 3, 4, 5, 6):
        assert gdpo_two(G) == gdpo_series(G, 2)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_exact_arithmetic_agrees(n):
    """G = 4 without any rounding: (x - p) / std is rational for one or three ones, a rational times sqrt 3 for two."""
    columns = []
    for row in itertools.product((0, 1), repeat=4):
        ones = sum(row)
        plain = [2 * (4 * x - ones) if ones in (1, 3) else 0 for x in row]  # times 4
        root = [4 * x - ones if ones == 2 else 0 for x in row]
        columns.append(list(zip(plain, root)))
    groups = itertools.combinations_with_replacement(columns, n)
    sums = {tuple(sorted((sum(c[i][0] for c in g), sum(c[i][1] for c in g)) for i in range(4))) for g in groups}
    assert len(sums) == FIGURE_3_RIGHT[n][2]


# G or n: (GRPO, GRPO without std, GDPO as far as the paper plots it)
FIGURE_3_LEFT = {
    2: (2, 3, 3), 3: (4, 6, 6), 4: (7, 10, 14), 5: (11, 15, 26), 6: (16, 21, 38), 7: (22, 28, 59), 8: (29, 36, 81),
    9: (37, 45, 109), 10: (46, 55, 145), 11: (56, 66, 186), 12: (67, 78, None), 13: (79, 91, None), 14: (92, 105, None),
    15: (106, 120, None), 16: (121, 136, None)}
FIGURE_3_RIGHT = {
    2: (7, 10, 14), 3: (14, 20, 45), 4: (23, 35, 127), 5: (41, 56, 318), 6: (56, 84, 722), 7: (89, 120, None),
    8: (119, 165, None)}


# --- worked numbers ---------------------------------------------------------------------------------------------------


def test_numbers_of_two_rollouts():
    half = 0.5**0.5
    assert gdpo_advantages(parts_of((0, 1), (0, 0)), eps=0.0)[0].tolist() == pytest.approx([-half, half])
    assert gdpo_advantages(parts_of((0, 1), (0, 1)), eps=0.0)[0].tolist() == pytest.approx([-2 * half, 2 * half])
    assert group_advantages(rewards([0, 2]), scale="none")[0].tolist() == [-1, 1]


def test_numbers_of_four_rollouts():
    parts = parts_of((1, 0, 1, 0), (1, 1, 0, 0))
    assert gdpo_advantages(parts, eps=0.0)[0].tolist() == pytest.approx([1.7320508, 0, 0, -1.7320508])
    assert group_advantages(total_reward(parts), eps=0.0)[0].tolist() == pytest.approx([1.2247449, 0, 0, -1.2247449])


def test_numbers_of_two_prompts():
    parts = {"a": rewards([0, 1], [0, 1]), "b": rewards([0, 1], [0, 0])}
    raw = gdpo_advantages(parts)
    assert raw.flatten().tolist() == pytest.approx([-1.414, 1.414, -0.707, 0.707], abs=5e-4)
    final = assign_credit(parts, torch.ones(2, 2, dtype=torch.int64), ObjectiveConfig(advantage="gdpo", whiten="sequence"))
    assert final.advantages.flatten().tolist() == pytest.approx([-1.0954, 1.0954, -0.5477, 0.5477], abs=5e-5)


def test_scale_trade_off():
    """The badly answered, well-formatted sample ranks above the perfect unformatted one: people must see this."""
    parts = {"correct": rewards([3, -1, 1, -3]), "format": rewards([0, 1, 0, 1])}
    assert gdpo_advantages(parts)[0].tolist() == pytest.approx([0.296, 0.4786, -0.4786, -0.296], abs=5e-4)
    assert group_advantages(total_reward(parts))[0].tolist() == pytest.approx([1.2009, -0.2402, 0.2402, -1.2009], abs=5e-5)


def test_constant_totals():
    """Section 3.1 of the paper expects non-zero advantages for (1,1,0) and (0,0,1). They are exactly zero: for two binary
    rewards with a constant total A_2 = -A_1. Other weights, or three rewards, can break the tie."""
    parts = parts_of((1, 1, 0), (0, 0, 1))
    assert not gdpo_advantages(parts, eps=0.0).any()
    weighted = gdpo_advantages(parts, weights={"r0": 1.0, "r1": 0.5}, eps=0.0)
    assert weighted[0].tolist() == pytest.approx([0.2886751, 0.2886751, -0.5773503])
    three = gdpo_advantages(parts_of((1, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)), eps=0.0)
    assert three[0].tolist() == pytest.approx([-0.134, -0.134, 0.134, 0.134], abs=5e-4)
    for G in (2, 3, 5):  # every pair of complementary binary rewards
        for row in itertools.product((0, 1), repeat=G):
            assert not gdpo_advantages(parts_of(row, [1 - x for x in row]), eps=0.0).any()


# --- exact zeros ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("whiten_over", ["sequence", "token"])
def test_constant_rewards_are_exactly_zero(dtype, whiten_over):
    """H1: no information must be no update, also after batch normalisation, for any constant and size."""
    noisy = 0
    for advantage in ("gdpo", "group"):
        choices = dict(scale="none") if advantage == "group" else {}
        cfg = ObjectiveConfig(advantage=advantage, whiten=whiten_over, aggregation="token-mean", **choices)
        for constant in (0.1, 0.3, 0.7, 1 / 3, 1e-3, 3.3, -0.6, 123.456):
            for G in (2, 3, 5, 6, 7, 12, 31):
                dead = torch.full((3, G), constant, dtype=dtype)
                dead[1] *= 3
                noisy += bool((dead - dead.mean(1, keepdim=True)).any())
                lengths = torch.arange(1, 3 * G + 1).view(3, G)
                credit = assign_credit({"a": dead, "b": 7 * dead}, lengths, cfg)
                assert not credit.advantages.any() and credit.skip and credit.factor == 1.0
                mixed = dead.clone()
                mixed[1, 0] += 1
                credit = assign_credit({"a": mixed, "b": 7 * dead}, lengths, cfg)
                assert not credit.advantages[[0, 2]].any() and credit.advantages[1].all() and not credit.skip
    assert noisy > 20


def test_cancelling_rewards_are_not_enlarged():
    """All groups cancel: A_1 + A_2 is rounding noise, which a division by its own std would make full-sized."""
    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 2, (6, 5), generator=g).double()
    a[:, 0], a[:, 1] = 0, 1
    parts, ones = {"a": 0.1 + 0.3 * a, "b": 0.7 - 0.3 * a}, torch.ones(6, 5, dtype=torch.int64)
    noise = group_advantages(parts["a"]) + group_advantages(parts["b"])
    assert 0 < float(noise.abs().max()) < 1e-12
    credit = assign_credit(parts, ones, ObjectiveConfig(advantage="gdpo", whiten="sequence"))
    assert not credit.advantages.any() and credit.skip
    # Of different scale, eps leaves a remainder of its own, which is not noise. eps = 0 is exact, and allowed.
    other = parts | {"b": 0.7 - 0.1 * a}
    with_eps = assign_credit(other, ones, ObjectiveConfig(advantage="gdpo", whiten="sequence"))
    assert with_eps.advantages.abs().max() > 0.5
    assert not assign_credit(other, ones, ObjectiveConfig(advantage="gdpo", whiten="sequence", eps=0.0)).advantages.any()


# --- properties -------------------------------------------------------------------------------------------------------


def random_parts(seed=3, N=5, G=6):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(N, G, generator=g, dtype=torch.float64) for name in "abc"}


def test_affine_invariance():
    """r -> a r + b changes nothing under GDPO, and much under GRPO."""
    parts = random_parts()
    moved = parts | {"a": 7.3 * parts["a"] - 2.0, "b": 0.2 * parts["b"] + 5.0}
    torch.testing.assert_close(gdpo_advantages(moved, eps=0.0), gdpo_advantages(parts, eps=0.0), atol=1e-10, rtol=0)
    difference = group_advantages(total_reward(moved), eps=0.0) - group_advantages(total_reward(parts), eps=0.0)
    assert float(difference.abs().max()) > 0.5


def test_order_changes_nothing():
    parts = random_parts()
    g = torch.Generator().manual_seed(1)
    rows, columns = torch.randperm(5, generator=g), torch.randperm(6, generator=g)
    lengths = torch.randint(1, 9, (5, 6), generator=g)
    weights = {"a": 0.3, "b": 2.0, "c": 1.0}
    for over in ("none", "sequence", "token"):
        cfg = ObjectiveConfig(advantage="gdpo", whiten=over, aggregation="token-mean")
        whole = assign_credit(parts, lengths, cfg, weights=weights).advantages
        moved = {name: parts[name][rows][:, columns] for name in "cab"}
        again = assign_credit(moved, lengths[rows][:, columns], cfg, weights=weights).advantages
        torch.testing.assert_close(again, whole[rows][:, columns])


def test_sequence_and_token_normalisation():
    """Equal lengths: the same up to eps. Unequal: over tokens a group's advantages do not add up to 0."""
    parts = random_parts()
    raw = gdpo_advantages(parts)
    even, uneven = torch.full((5, 6), 4), torch.arange(1, 31).view(5, 6)
    by_sequence = whiten(raw, eps=0.0, eps_in="std")
    torch.testing.assert_close(whiten(raw, even, eps=0.0), by_sequence * math.sqrt((120 - 1) / 120 * 30 / 29), atol=1e-9, rtol=1e-9)
    assert float(by_sequence.sum(1).abs().max()) < 1e-9
    assert float(whiten(raw, uneven).sum(1).abs().min()) > 1e-3


@pytest.mark.parametrize("G", [4, 8])
@pytest.mark.parametrize("live", [1.0, 0.5, 0.1])
def test_reinflation(G, live):
    """With a fraction f of informative groups the factor is about 1 / sqrt(f (G - 1) / G): x3.38 at f = 0.1, G = 8."""
    N = 400
    r = torch.ones(N, G, dtype=torch.float64)
    r[: int(live * N), : G // 2] = 0
    credit = assign_credit({"r": r}, torch.ones(N, G, dtype=torch.int64),
                           ObjectiveConfig(advantage="gdpo", whiten="sequence", eps=1e-9))
    assert credit.factor == pytest.approx(1 / math.sqrt(live * (G - 1) / G), rel=2e-3)
    if (G, live) == (8, 0.1):
        assert credit.factor == pytest.approx(3.38, abs=0.01)


def test_one_reward_is_grpo_with_batch_normalisation():
    """Not a no-op: the batch is normalised too."""
    r = random_parts()["a"]
    raw = gdpo_advantages({"a": r})
    torch.testing.assert_close(raw, group_advantages(r), atol=1e-11, rtol=0)
    mean, factor = whitening(raw, eps=1e-4, eps_in="std")
    torch.testing.assert_close(whiten(raw, eps=1e-4, eps_in="std"), (raw - mean) * factor)
    assert abs(float(factor) - 1) > 0.01


def test_missing_rewards():
    """A reward that nobody graded is average under GDPO; where no reward was graded the completion gets 0."""
    nan = math.nan
    parts = {"a": rewards([1, 0, nan, 1], [nan, nan, nan, nan]), "b": rewards([0, 1, 1, nan], [1, 0, 1, 0])}
    raw = gdpo_advantages(parts, eps=0.0)
    a = group_advantages(rewards([1, 0, 1]), eps=0.0)[0]
    b = group_advantages(rewards([0, 1, 1]), eps=0.0)[0]
    assert raw[0].tolist() == pytest.approx([float(a[0] + b[0]), float(a[1] + b[1]), float(b[2]), float(a[2])])
    torch.testing.assert_close(raw[1], group_advantages(parts["b"], eps=0.0)[1], atol=1e-11, rtol=0)
    excluded = gdpo_advantages(parts, eps=0.0, missing="exclude")
    assert excluded[0].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(excluded[1], raw[1])  # what the whole group lacks excludes nobody
    with pytest.raises(BadInput, match="missing"):
        gdpo_advantages(parts, missing="refuse")


def test_conditioned_rewards():
    parts = {"right": rewards([1, 0, math.nan, 1]), "short": rewards([1, 1, 1, 0.25])}
    got = conditioned(parts, "short", on="right")
    assert got["short"][0, [0, 1, 3]].tolist() == [1, 0, 0.25] and got["short"][0, 2].isnan()
    assert torch.equal(got["right"].nan_to_num(), parts["right"].nan_to_num())
    assert conditioned(parts, "short", on="right", otherwise=-1.0)["short"][0, 1] == -1
    assert conditioned(parts, "right", on="short", at_least=0.5)["right"][0, [0, 1, 3]].tolist() == [1, 0, 0]
    with pytest.raises(BadInput, match="'short'"):
        conditioned(parts, "shrot", on="right")
    with pytest.raises(BadInput, match="itself"):
        conditioned(parts, "short", on="short")
