"""The objective on its own: golden numbers, invariances, refusals. Parity with trl is in test_against_trl.py."""

from __future__ import annotations

import doctest
import math
from dataclasses import fields, replace

import pytest
import torch

from pellucid.align import (
    RECIPES,
    ObjectiveConfig,
    aggregate,
    count,
    formula,
    formulas,
    kl_penalty,
    notes,
    objective_padded,
    recipe,
)
from pellucid.align.aggregation import AGGREGATIONS, Counts
from pellucid.align.metrics import merge
from pellucid.align.objective import objective
from pellucid.align.policy_losses import cispo, clipped_surrogate, high_entropy_tokens, log_ratio, sapo
from pellucid.errors import BadInput

INVARIANT = [mode for mode in AGGREGATIONS if mode != "token-mean-local"]
NEEDS = {"constant": {"max_tokens": 9}}


def config(mode="sequence-mean", **choices):
    return ObjectiveConfig(aggregation=mode, **(NEEDS.get(mode, {}) | choices))


@pytest.fixture
def rows():
    """Six completions of lengths 1, 7, 3, 0 (fully masked), 5, 2 in padded form, with drift and clipping."""
    g = torch.Generator().manual_seed(5)
    lengths = torch.tensor([1, 7, 3, 0, 5, 2])
    mask = torch.arange(7)[None] < lengths[:, None]
    logp = (-2 * torch.rand(6, 7, generator=g, dtype=torch.float64)).requires_grad_()
    old = logp.detach() + 0.4 * torch.randn(6, 7, generator=g, dtype=torch.float64)
    ref = logp.detach() + 0.5 * torch.randn(6, 7, generator=g, dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.7, 0.3, 2.0, -1.5, 0.4], dtype=torch.float64)
    return logp, old, ref, advantages, mask


def value_and_grad(rows, cfg, counts=None):
    logp, old, ref, advantages, mask = rows
    loss, metrics = objective_padded(logp, old, ref, advantages, mask, cfg, counts)
    (grad,) = torch.autograd.grad(loss, logp)
    return loss.detach(), grad, metrics


# --- golden numbers ---------------------------------------------------------------------------------------------------


def test_clipped_surrogate_by_hand():
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5, 2.0, 2.0], dtype=torch.float64)
    a = torch.tensor([1.0, -1.0, 3.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    plain = clipped_surrogate(ratio, a, low=0.2, high=0.28)
    assert plain.tolist() == pytest.approx([-0.5, 0.8, -3.0, -1.28, 1.5, 2.0, -1.28])
    two_sided = clipped_surrogate(ratio, a, low=0.2, high=0.28, delta=1.6)
    assert two_sided.tolist() == pytest.approx([-0.5, 0.8, -3.0, -1.28, 1.5, 1.6, -1.28])


def test_weighted_and_gated_terms_by_hand():
    """CISPO: the clipped ratio is a weight, through which no gradient flows. SAPO: a gate with a temperature for each sign."""
    old = torch.tensor([-1.0, -1.0, -2.0], dtype=torch.float64)
    logp = (old + torch.tensor([0.5, 1.5, 1.1], dtype=torch.float64).log()).requires_grad_()
    ratio, a = (logp - old).exp(), torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    loss = cispo(ratio, logp, a, low=0.2, high=0.28)
    weight = torch.tensor([0.8, 1.28, 1.1], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), -weight * a * logp.detach())
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logp, retain_graph=True)[0], -weight * a)

    def gate(r, tau):
        return 4 / tau / (1 + math.exp(-tau * (r - 1)))

    soft = sapo(ratio, a, tau_pos=2.0, tau_neg=3.0)
    assert soft.tolist() == pytest.approx([-gate(0.5, 2), gate(1.5, 3), -2 * gate(1.1, 2)])


def test_levels_of_the_ratio_by_hand():
    old, sequence = torch.zeros(3, dtype=torch.float64), torch.tensor([0, 0, 1])
    logp = torch.tensor([0.1, 0.3, -0.2], dtype=torch.float64, requires_grad=True)
    for level, values in {"token": [0.1, 0.3, -0.2], "sequence": [0.2, 0.2, -0.2], "sequence-sum": [0.4, 0.4, -0.2],
                          "sequence-token": [0.2, 0.2, -0.2]}.items():
        found = log_ratio(logp, old, sequence, level)
        assert found.tolist() == pytest.approx(values), level
        grad = torch.autograd.grad((found * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)).sum(), logp)[0]
        assert grad.tolist() == {"sequence": [1.5, 1.5, 4.0], "sequence-sum": [3.0, 3.0, 4.0]}.get(level, [1.0, 2.0, 4.0])


def test_tokens_above_a_quantile_of_entropy():
    entropy = torch.tensor([0.7, 0.1, 1.0, 0.4, 0.5, 0.9, 0.2, 0.8, 0.3, 0.6])
    for fraction, lowest in ((0.3, 0.8), (0.2, 0.9), (0.5, 0.6), (0.04, 1.0), (1.0, 0.1)):
        assert entropy[high_entropy_tokens(entropy, fraction)].min() == pytest.approx(lowest), fraction


def test_kl_estimators_by_hand():
    logp, ref = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    golden = {"k1": [0.3, -0.2, 1.0], "abs": [0.3, 0.2, 1.0], "k2": [0.045, 0.02, 0.5],
              "k3": [0.0408182, 0.0214027, 0.3678794], "k3+": [0.0408182, 0.0214027, 0.3678794]}
    for name, values in golden.items():
        assert kl_penalty(logp, ref, name).tolist() == pytest.approx(values, abs=1e-7), name
    assert kl_penalty(logp, ref, "k3-corrected", ratio=torch.full((3,), 2.0)).tolist() == pytest.approx(
        [2 * x for x in golden["k3"]], abs=2e-7)
    assert kl_penalty(logp, ref, "k2", bound=0.25).tolist() == pytest.approx([0.03125, 0.02, 0.03125])
    with pytest.raises(BadInput, match="ratio"):
        kl_penalty(logp, ref, "k3-corrected")
    with pytest.raises(BadInput, match="k3"):
        kl_penalty(logp, ref, "k33")


def test_aggregations_by_hand():
    """Completions (1, 2, 3), (10), () with losses as named; a step of 3 completions, 4 tokens."""
    loss, sequence = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0, 0, 0, 1])
    lengths = torch.tensor([3, 1, 0])
    golden = {"sequence-mean": (6.0, 4.0), "token-mean": (4.0, 4.0), "token-mean-local": (4.0, 8 / 3),
              "constant": (16 / 10, 16 / 15), "sequence-sum": (8.0, 16 / 3), "token-sum": (16.0, 16.0)}
    for mode, (exclude, counted) in golden.items():
        assert float(aggregate(loss, sequence, mode, count(lengths), 5)) == pytest.approx(exclude), mode
        assert float(aggregate(loss, sequence, mode, count(lengths, "count"), 5)) == pytest.approx(counted), mode
    assert set(golden) == set(AGGREGATIONS)
    with pytest.raises(BadInput, match="sequence-mean"):
        aggregate(loss, sequence, "sequence-means", count(lengths))
    with pytest.raises(BadInput, match="constant"):
        aggregate(loss, sequence, "constant", count(lengths))
    with pytest.raises(BadInput, match="exclude"):
        count(lengths, "drop")


def naive_loss(rows, cfg):
    """The whole objective in Python floats, one completion after the other, written from the formulas."""
    logp, old, ref, advantages, mask = [x.detach().tolist() for x in rows]
    total, tokens = 0.0, sum(sum(m) for m in mask)
    alive = [i for i, m in enumerate(mask) if any(m)]
    n_seq = len(mask) if cfg.empty == "count" else len(alive)
    for i in alive:
        ts = [t for t, m in enumerate(mask[i]) if m]
        mean_log = sum(logp[i][t] - old[i][t] for t in ts) / len(ts)
        per_token = []
        for t in ts:
            r = math.exp(logp[i][t] - old[i][t] if cfg.ratio == "token" else mean_log)
            clipped = min(max(r, 1 - cfg.clip_low), 1 + cfg.clip_high)
            free = r if cfg.delta is None else min(r, cfg.delta)
            d = ref[i][t] - logp[i][t]
            k3 = math.exp(d) - d - 1
            kl = {"k1": -d, "abs": abs(d), "k2": d * d / 2, "k3": k3, "k3+": k3, "k3-corrected": r * k3}[cfg.kl]
            per_token.append(-min(free * advantages[i], clipped * advantages[i]) + cfg.beta * kl)
        s = sum(per_token)
        total += {"sequence-mean": s / len(ts) / n_seq, "token-mean": s / tokens, "token-sum": s,
                  "token-mean-local": s / tokens * len(alive) / n_seq, "sequence-sum": s / n_seq,
                  "constant": s / n_seq / (cfg.max_tokens or 1)}[cfg.aggregation]
    return total


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence-token"])
def test_equals_the_formula_written_out(rows, mode, ratio):
    for kl in ("k1", "abs", "k2", "k3", "k3+", "k3-corrected"):
        cfg = config(mode, ratio=ratio, beta=0.3, kl=kl, clip_low=0.1, clip_high=0.28, delta=1.4)
        assert float(value_and_grad(rows, cfg)[0]) == pytest.approx(naive_loss(rows, cfg), abs=1e-6)


# --- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_padding_changes_nothing(rows, mode):
    """Loss, every metric and the gradient are bit-equal under more padding, whatever the padding holds."""
    cfg = config(mode, beta=0.1, clip_low=0.1)
    loss, grad, metrics = value_and_grad(rows, cfg)
    assert float(grad.abs().sum()) > 0.1
    for rubbish in (0.0, 1.0, -1e9, math.nan, math.inf):
        logp, old, ref, advantages, mask = rows
        pad = torch.full((6, 4), rubbish, dtype=torch.float64)
        wide = [torch.cat([x.detach().masked_fill(~mask, rubbish), pad], 1) for x in (logp, old, ref)]
        wide_mask = torch.cat([mask, torch.zeros(6, 4, dtype=torch.bool)], 1)
        again = value_and_grad((wide[0].requires_grad_(), *wide[1:], advantages, wide_mask), cfg)
        assert again[0] == loss and torch.equal(again[1][:, :7], grad) and not again[1][:, 7:].any()
        assert set(again[2]) == set(metrics) and all(torch.equal(again[2][k], metrics[k]) for k in metrics)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_order_of_completions_changes_nothing(rows, mode):
    cfg = config(mode, ratio="sequence", beta=0.1)
    loss, grad, metrics = value_and_grad(rows, cfg)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    moved = [x.detach()[order] for x in rows]
    again = value_and_grad((moved[0].requires_grad_(), *moved[1:]), cfg)
    torch.testing.assert_close(again[0], loss)
    torch.testing.assert_close(again[1], grad[order])
    for name in metrics:
        torch.testing.assert_close(again[2][name], metrics[name])


CUTS = [[[0], [1], [2], [3], [4], [5]], [[0, 1, 2], [3, 4, 5]], [[3], [0, 5, 2], [1, 4]]]


def in_parts(rows, cfg, cut, counts):
    logp, *rest = rows
    parts = [objective_padded(logp[c], *[x[c] for x in rest], cfg, counts or None) for c in cut]
    loss = sum(p[0] for p in parts)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], merge([p[1] for p in parts])


@pytest.mark.parametrize("empty", ["exclude", "count"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("mode", INVARIANT)
def test_cutting_the_step_changes_nothing(rows, mode, ratio, empty):
    """Micro-batches and simulated ranks of unequal lengths, one holding only a fully masked completion."""
    choices = {"empty": empty} if mode in ("sequence-mean", "constant", "sequence-sum") else {}
    cfg = config(mode, ratio=ratio, beta=0.1, **choices)
    counts = count(rows[4].sum(1), empty)
    loss, grad, metrics = value_and_grad(rows, cfg, counts)
    for cut in CUTS:
        loss2, grad2, metrics2 = in_parts(rows, cfg, cut, counts)
        torch.testing.assert_close(loss2, loss, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(grad2, grad, atol=1e-9, rtol=1e-6)
        assert metrics2 == pytest.approx({k: float(v) for k, v in metrics.items()}, abs=1e-9)


def test_the_cut_shows_where_it_should(rows):
    """The invariance test has teeth: local counts, and the local mean, depend on the cut."""
    counts = count(rows[4].sum(1))
    for mode in ("sequence-mean", "token-mean"):
        whole = value_and_grad(rows, config(mode), counts)[0]
        assert abs(float(in_parts(rows, config(mode), CUTS[1], None)[0] - whole)) > 1e-2
    local = config("token-mean-local")
    whole = value_and_grad(rows, local, counts)[1]
    assert float((in_parts(rows, local, CUTS[1], counts)[1] - whole).abs().max()) > 1e-3
    assert count(rows[4].sum(1)[:3]) + count(rows[4].sum(1)[3:]) == counts


TERMS = {
    "cispo": dict(policy="cispo"), "sapo": dict(policy="sapo"), "gmpo": dict(policy="gmpo"), "reinforce": dict(policy="reinforce"),
    "sequence-sum": dict(ratio="sequence-sum"), "entropy": dict(entropy_coef=0.1), "high entropy": dict(high_entropy=0.5),
    "truncate": dict(correction="truncate", correction_high=1.2), "off-policy": dict(off_policy=0.05),
    "mask": dict(correction="mask", correction_level="sequence-mean", correction_low=0.9, correction_high=1.3),
    "max": dict(correction="mask", correction_level="sequence-max", correction_low=0.5, correction_high=1.8),
}


@pytest.mark.parametrize("mode", ["sequence-mean", "token-mean", "constant"])
@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_invariant(rows, mode, term):
    """Padding, order and cutting: loss, gradient and every metric, for every policy term, correction and bonus."""
    cfg = config(mode, beta=0.1, **TERMS[term])
    logp, old, ref, advantages, mask = rows
    g = torch.Generator().manual_seed(9)
    drift, scale = torch.randn(6, 7, generator=g, dtype=torch.float64), torch.rand(6, 7, generator=g, dtype=torch.float64)
    counts = count(mask.sum(1))

    def run(index, pad=0, rubbish=0.0):
        def wide(x):
            return torch.nn.functional.pad(x[index], (0, pad), value=rubbish)

        given = dict(sampler=wide(old + 0.3 * drift), entropy=wide(scale * logp.square()), keep=wide(scale > 0.4).bool())
        return objective_padded(wide(logp), wide(old), wide(ref), advantages[index], torch.nn.functional.pad(mask[index], (0, pad)), cfg, counts, **given)

    def checked(parts):
        loss = sum(p[0] for p in parts)
        return loss.detach(), torch.autograd.grad(loss, logp, retain_graph=True)[0], merge([p[1] for p in parts])

    whole = checked([run(list(range(6)))])
    assert float(whole[1].abs().sum()) > 0.05
    if "correction" in cfg.__dict__ and term in ("truncate", "mask", "max", "off-policy", "high entropy"):
        assert whole[2]["correction/mean"] not in (0.0, 1.0)
    others = [[run(list(range(6)), 4, math.nan)], [run([4, 2, 0, 5, 1, 3])], *[[run(c) for c in cut] for cut in CUTS]]
    for parts in others:
        loss, grad, metrics = checked(parts)
        torch.testing.assert_close(loss, whole[0], atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(grad, whole[1], atol=1e-9, rtol=1e-6)
        assert metrics == pytest.approx(whole[2], abs=1e-9)


def test_empty_micro_batch_is_zero_with_zero_gradient(rows):
    nothing = [x[3:4] for x in rows]
    for mode in AGGREGATIONS:
        loss, grad, metrics = value_and_grad(nothing, config(mode))
        assert float(loss) == 0 and not grad.any() and all(float(v) == 0 for v in metrics.values())


def test_on_policy_is_old_equal_to_new(rows):
    logp, _, ref, advantages, mask = rows
    cfg = config(beta=0.1, clip_low=0.0, clip_high=0.0)  # even a closed clip lets the on-policy gradient through
    a = value_and_grad((logp, None, ref, advantages, mask), cfg)
    b = value_and_grad((logp, logp.detach().clone(), ref, advantages, mask), cfg)
    assert a[0] == b[0] and torch.equal(a[1], b[1]) and float(a[2]["ratio/mean"]) == pytest.approx(1)
    plain = value_and_grad((logp, None, None, advantages, mask), config("token-sum"))[1]
    torch.testing.assert_close(plain, torch.where(mask, -advantages[:, None], 0.0))  # the policy gradient itself


@pytest.mark.parametrize("mode", ["sequence-mean", "token-mean", "constant"])
def test_gspo_token_form_equals_sequence_form(rows, mode):
    wide = dict(clip_low=0.9, clip_high=2.0)
    a, b = (value_and_grad(rows, config(mode, ratio=r, **wide)) for r in ("sequence", "sequence-token"))
    torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(a[1], b[1], atol=4e-9, rtol=1e-6)
    assert float((a[1] - value_and_grad(rows, config(mode, **wide))[1]).abs().max()) > 1e-3  # and not the token ratio


def test_silenced_tokens_have_no_gradient_and_are_counted(rows):
    logp, old, _, advantages, mask = rows
    _, grad, metrics = value_and_grad(rows, config("token-mean", clip_low=0.1, clip_high=0.28))
    ratio = (logp - old).exp().detach()
    low = (ratio < 0.9) & (advantages[:, None] < 0) & mask
    high = (ratio > 1.28) & (advantages[:, None] > 0) & mask
    assert low.any() and high.any()
    assert torch.equal(grad == 0, low | high | ~mask)
    assert float(metrics["clip/low"]) == pytest.approx(float(low.sum() / mask.sum()))
    assert float(metrics["clip/high"]) == pytest.approx(float(high.sum() / mask.sum()))


def test_runaway_ratio_is_bounded_and_counted():
    logp = torch.tensor([-1.0, -101.0, -1.0, -101.0, -1.0], requires_grad=True)
    old, sequence = torch.tensor([-101.0, -1.0, -101.0, -1.0, -1.1]), torch.arange(5)
    a = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    free, _ = objective(logp, old, None, a, sequence, ObjectiveConfig(), Counts(5, 5))
    assert not free.isfinite()  # without a bound the overflow is seen, not hidden
    loss, metrics = objective(logp, old, None, a, sequence, ObjectiveConfig(log_ratio_bound=20.0), Counts(5, 5))
    (grad,) = torch.autograd.grad(loss, logp)
    assert loss.isfinite() and grad.isfinite().all()
    assert float(metrics["ratio/bounded"]) == pytest.approx(0.8)


def test_half_precision_is_raised_to_float32(rows):
    half = [x.detach().bfloat16() if x.is_floating_point() else x for x in rows]
    loss, metrics = objective_padded(*half, config("token-mean", beta=0.1))
    assert loss.dtype == torch.float32 and metrics["kl/ref_k3"].dtype == torch.float32
    exact = objective_padded(*[x.double() if x.is_floating_point() else x for x in half], config("token-mean", beta=0.1))
    assert float(loss) == pytest.approx(float(exact[0]), abs=1e-6)


# --- configuration ----------------------------------------------------------------------------------------------------

OTHER = {  # another value for every field, with what it needs to have an effect
    "scale": dict(scale="batch"), "baseline": dict(baseline="leave-one-out"), "eps": dict(eps=1e-6),
    "missing": dict(missing="exclude"), "dead_groups": dict(dead_groups="drop"),
    "live_on": dict(dead_groups="drop", live_on="correct"), "truncated": dict(truncated="mask"),
    "ratio": dict(ratio="sequence"), "clip_low": dict(clip_low=0.1), "clip_high": dict(clip_high=0.28),
    "delta": dict(delta=2.0), "log_ratio_bound": dict(log_ratio_bound=20.0), "beta": dict(beta=0.04),
    "kl": dict(beta=0.04, kl="k2"), "kl_bound": dict(beta=0.04, kl_bound=10.0),
    "aggregation": dict(aggregation="token-mean"), "max_tokens": dict(aggregation="constant", max_tokens=7),
    "empty": dict(empty="count"), "advantage": dict(advantage="gdpo"), "whiten": dict(whiten="sequence"),
    "gamma": dict(advantage="returns", gamma=0.9), "lam": dict(advantage="gae", lam=0.8),
    "reward_clip": dict(reward_clip=5.0), "reward_beta": dict(reward_beta=0.1),
    "reward_kl": dict(reward_beta=0.1, reward_kl="k3"), "policy": dict(policy="sapo"),
    "tau_pos": dict(policy="sapo", tau_pos=2.0), "tau_neg": dict(policy="sapo", tau_neg=2.0),
    "high_entropy": dict(high_entropy=0.2), "correction": dict(correction="mask"),
    "correction_level": dict(correction="mask", correction_level="sequence"),
    "correction_low": dict(correction="mask", correction_low=0.5),
    "correction_high": dict(correction="mask", correction_high=3.0), "off_policy": dict(off_policy=0.5),
    "kl_target": dict(beta=0.1, kl_target=0.05), "kl_horizon": dict(beta=0.1, kl_target=0.05, kl_horizon=99),
    "entropy_coef": dict(entropy_coef=0.01), "entropy_target": dict(entropy_target=0.2),
    "value_coef": dict(advantage="gae", value_coef=0.5), "value_clip": dict(advantage="gae", value_clip=0.4),
}


@pytest.mark.parametrize("field", [f.name for f in fields(ObjectiveConfig)])
def test_every_choice_shows_in_the_formula(field):
    other = ObjectiveConfig(**OTHER[field])
    needed = {k: v for k, v in OTHER[field].items() if k != field or field == "max_tokens"}
    if field == "max_tokens":
        needed["max_tokens"] = 9
    assert formula(other) != formula(ObjectiveConfig(**needed))


def test_formula_of_every_recipe():
    extra = {"dr-grpo": {"max_tokens": 256}}
    texts = {name: formula(recipe(name, **extra.get(name, {}))) for name in RECIPES}
    assert len(set(texts.values())) == len(RECIPES)
    tells = {
        "ppo": ["V_t+1", "R - 0.05 (-d), d = log p_ref - log p_old (k1)", "critic: + 0.1", "sqrt(var_tokens A", "1/N_tok"], "grpo": ["0.04 KL", "e^d - d - 1 (k3)"],
        "dapo": ["clip(r, 0.8, 1.28)", "dropped (must differ: correct)", "masked out"], "dr-grpo": ["N_seq * 256", "R = 0"],
        "gspo": ["clip(r, 0.9997, 1.0004)", "^(1/|o_i|)"], "gdpo": ["Σ_k w_k", "mean_completions", "normalised advantages"],
        "rloo": ["mean_others", "r  = p(o_i) / p_old(o_i), |log r| <= 20", "R - 0.05 Σ_t (-d), d = log p_ref - log p_old (k1)"],
        "reinforce++": ["Σ_k 1^k r_t+k", "R - 0.01 (-d), d"], "reinforce++-baseline": ["0.01 KL", "d^2 / 2", "mean_tokens"],
        "cispo": ["-sg[min(r, 5)] A log p(o_it)"], "sapo": ["σ(τ (r - 1))", "1.05"], "trl-default": ["1/N_tok", "0.0001"],
        "verl-default": ["min(r, 3)", "1e-06", "|log r| <= 20"], "pellucid-grow": ["1/N_seq Σ_i 1/|o_i|"],
    }
    for name, parts in tells.items():
        for part in parts:
            assert part in texts[name], (name, part)
    assert "std" not in texts["dr-grpo"].split("A  =")[1].split("\n")[0]
    grow = recipe("pellucid-grow")
    assert (grow.clip_low, grow.clip_high, grow.beta, grow.scale) == (0.2, 0.28, 0.0, "group")


def test_traps_are_noted():
    gspo = recipe("gspo")
    assert not notes(gspo)
    assert "length" in notes(replace(gspo, aggregation="token-mean"))[0]
    assert "Dr. GRPO" in notes(ObjectiveConfig(aggregation="constant", max_tokens=9))[0]
    assert "micro-batches" in notes(config("token-mean-local"))[0]
    assert "KL(ref || p)" in notes(recipe("grpo"))[0]
    assert "mean gradient of k1" in notes(ObjectiveConfig(beta=0.1, kl="k1"))[0]


@pytest.mark.parametrize("choices, told", [
    (dict(advantage="gdpo", scale="none"), "no effect"), (dict(advantage="gae", eps=1e-6), "no effect"),
    (dict(advantage="gdpo", reward_beta=0.1), "gdpo"), (dict(advantage="pass@k", scale="batch"), "pass@k"),
    (dict(advantage="gae", whiten="sequence"), "tokens"), (dict(advantage="gae", policy="gmpo"), "gmpo"),
    (dict(gamma=0.9), "no effect"), (dict(lam=0.9), "no effect"), (dict(advantage="gae", gamma=1.1), "[0, 1]"),
    (dict(policy="sapo", clip_low=0.1), "no effect"), (dict(policy="cispo", delta=6.0), "no effect"),
    (dict(tau_pos=2.0), "no effect"), (dict(policy="gmpo", ratio="sequence"), "no effect"),
    (dict(correction_high=3.0), "no effect"), (dict(reward_kl="k2"), "no effect"), (dict(kl_target=0.1), "no effect"),
    (dict(value_clip=0.1), "no effect"), (dict(high_entropy=0.0), "high_entropy"), (dict(policy="ppo"), "clip, cispo"),
    (dict(scale="groups"), "'group'"), (dict(kl="k4", beta=0.1), "k3"), (dict(aggregation="token"), "token-sum"),
    (dict(clip_low=-0.1), "not negative"), (dict(delta=1.1), "delta"), (dict(log_ratio_bound=0.0), "positive"),
    (dict(kl="k2"), "no effect"), (dict(kl_bound=1.0), "no effect"), (dict(max_tokens=5), "no effect"),
    (dict(scale="none", eps=1e-6), "no effect"), (dict(live_on="correct"), "no effect"),
    (dict(aggregation="token-mean", empty="count"), "no effect"), (dict(aggregation="constant"), "max_tokens"),
])
def test_impossible_and_idle_choices_are_refused(choices, told):
    with pytest.raises(BadInput) as error:
        ObjectiveConfig(**choices)
    assert told in str(error.value) and error.value.exit_code == 2


def test_recipes_refuse_unknown_names():
    with pytest.raises(BadInput, match="did you mean 'dr-grpo'"):
        recipe("drgrpo")
    with pytest.raises(BadInput, match="did you mean 'clip_high'"):
        recipe("dapo", clip_hi=0.3)
    with pytest.raises(BadInput, match="max_tokens"):
        recipe("dr-grpo")


def test_objective_refuses_bad_tensors(rows):
    x, sequence = torch.zeros(3), torch.arange(3)
    with pytest.raises(BadInput, match="reference"):
        objective(x, x, None, x, sequence, ObjectiveConfig(beta=0.1), Counts(3, 3))
    with pytest.raises(BadInput, match="share one shape"):
        objective(x, x, None, x[:2], sequence, ObjectiveConfig(), Counts(3, 3))
    with pytest.raises(BadInput, match="share one shape"):
        objective(x[None], None, None, x[None], sequence[None], ObjectiveConfig(), Counts(3, 3))


def test_doctests():
    result = doctest.testmod(formulas)
    assert result.attempted > 0 and result.failed == 0
