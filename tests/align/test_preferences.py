"""Preference, unpaired, reward-model and process losses on their own: formulas by hand, presets, refusals, extremes."""

from __future__ import annotations

import doctest
import math
from dataclasses import fields

import pytest
import torch

from pellucid.align import preference_config, unpaired
from pellucid.align.aggregation import Counts
from pellucid.align.divergence import dft
from pellucid.align.preference import LOSSES, Terms, f_scores, log1mexp, preference_objective
from pellucid.align.preference_config import (
    FORMULAS,
    PREFERENCE_RECIPES,
    PreferenceConfig,
    preference_formula,
    preference_notes,
    preference_recipe,
)
from pellucid.align.reward_losses import bradley_terry, process_loss, solution_score
from pellucid.align.unpaired import UnpairedConfig, kl_reference_point, unpaired_formula, unpaired_losses
from pellucid.errors import BadInput

DOUBLE = torch.float64


def one(c=1.2, r=-0.7, Lc=3.0, Lr=5.0, chosen=-4.0, rejected=-9.0):
    return Terms(*[torch.tensor([x], dtype=DOUBLE) for x in (c, r, c, r, chosen, rejected, Lc, Lr)])


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_losses_by_hand():
    """Those that no reference implementation here has: cDPO and IPO on sums; and DPO itself."""
    b, e, delta = 0.3, 0.1, 1.9
    cfg = PreferenceConfig(losses={"cdpo": 1.0}, beta=b, smoothing=e)
    assert float(LOSSES["cdpo"](one(), cfg)) == pytest.approx(-0.9 * log_sigmoid(b * delta) - 0.1 * log_sigmoid(-b * delta))
    assert float(LOSSES["sigmoid"](one(), PreferenceConfig(beta=b))) == pytest.approx(-log_sigmoid(b * delta))
    assert float(LOSSES["ipo_sum"](one(), PreferenceConfig(losses={"ipo_sum": 1.0}, beta=b))) == pytest.approx((delta - 1 / 0.6) ** 2)
    ipo = PreferenceConfig(losses={"ipo": 1.0}, beta=b)
    assert float(LOSSES["ipo"](one(), ipo)) == pytest.approx((1.2 / 3 + 0.7 / 5 - 1 / 0.6) ** 2)  # T13: two names


def test_more_losses_by_hand():
    """Those of the family that are easily mixed up: which side, which sign, where beta, gamma and tau stand."""
    b, c, r = 0.3, 1.2, -0.7
    cfg = PreferenceConfig(losses={"nca_pair": 1.0}, beta=b)
    assert float(LOSSES["nca_pair"](one(), cfg)) == pytest.approx(-log_sigmoid(b * c) - log_sigmoid(-b * c) / 2 - log_sigmoid(-b * r) / 2)
    x, tau = b * (c - r), 0.2
    s = 1 / (1 + math.exp(-x / tau))
    cfg = PreferenceConfig(losses={"discopop": 1.0}, beta=b, tau=tau)
    assert float(LOSSES["discopop"](one(), cfg)) == pytest.approx((1 - s) * -log_sigmoid(x) + s * math.exp(-x))
    cfg = PreferenceConfig(losses={"simpo": 1.0}, beta=b, gamma=0.4)
    assert float(LOSSES["simpo"](one(), cfg)) == pytest.approx(-log_sigmoid(b * (-4 / 3 + 9 / 5) - 0.4))


def test_optimal_transport_sorts_both_sides():
    """Three pairs whose policy and reference differences do not stand in the same order."""
    c, r = torch.tensor([0.5, -1.0, 2.0], dtype=DOUBLE), torch.tensor([0.1, 0.4, -0.3], dtype=DOUBLE)
    chosen, rejected = torch.tensor([-3.0, -8.0, -5.0], dtype=DOUBLE), torch.tensor([-9.0, -2.0, -6.0], dtype=DOUBLE)
    t = Terms(c, r, c, r, chosen, rejected, torch.ones(3), torch.ones(3))
    e, b = 0.1, 0.3
    policy = sorted((chosen - rejected).tolist())
    reference = sorted(((chosen - c) - (rejected - r)).tolist())

    def smoothed(x):
        return -(1 - e) * log_sigmoid(b * x) - e * log_sigmoid(-b * x)

    cfg = PreferenceConfig(losses={"aot": 1.0}, beta=b, smoothing=e)
    assert LOSSES["aot"](t, cfg).tolist() == pytest.approx([smoothed(x - y) for x, y in zip(policy, reference)])
    cfg = PreferenceConfig(losses={"aot_unpaired": 1.0}, beta=b, smoothing=e)
    assert LOSSES["aot_unpaired"](t, cfg).tolist() == pytest.approx([smoothed(x - y) for x, y in zip(sorted(c.tolist()), sorted(r.tolist()))])


def test_divergences_of_the_ratio_by_hand():
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=DOUBLE)
    for name, f in {"reverse_kl": lambda v: v, "forward_kl": lambda v: 1 - math.exp(-v), "js": lambda v: math.log(2) + log_sigmoid(v),
                    "alpha": lambda v: (math.exp((0.3 - 1) * v) - 1) / (0.3 - 1)}.items():
        cfg = PreferenceConfig(f_divergence=name, **({"alpha": 0.3} if name == "alpha" else {}))
        assert f_scores(x, cfg).tolist() == pytest.approx([f(v) for v in x.tolist()]), name


@pytest.mark.parametrize("choices", [dict(f_divergence="forward_kl"), dict(f_divergence="alpha", alpha=0.0), dict(losses={"discopop": 1.0}),
                                     dict(losses={"discopop": 1.0}, f_divergence="forward_kl")], ids=str)
def test_exponents_of_unlikely_answers_do_not_overflow(choices):
    """In float32: both answers far below the reference (inf - inf otherwise), and the chosen one alone (0 * inf)."""
    cfg = PreferenceConfig(**choices)
    for chosen, rejected in ((-3000.0, -4000.0), (-4000.0, 0.0), (0.0, -4000.0), (-4000.0, -4000.0)):
        logp = torch.tensor([chosen, rejected], requires_grad=True)
        loss, _ = preference_objective(logp, torch.zeros(2), torch.tensor([0, 1]), cfg, Counts(1, 1))
        (grad,) = torch.autograd.grad(loss, logp)
        assert bool(loss.isfinite()) and bool(grad.isfinite().all()), (chosen, rejected, loss, grad)


def test_robust_is_unbiased_under_flips():
    """E over labels flipped with probability e of the robust loss is the DPO loss of the true label."""
    cfg = PreferenceConfig(losses={"robust": 1.0}, smoothing=0.2, beta=0.3)
    right, wrong = LOSSES["robust"](one(), cfg), LOSSES["robust"](one(c=-0.7, r=1.2), cfg)
    assert float(0.8 * right + 0.2 * wrong) == pytest.approx(float(LOSSES["sigmoid"](one(), PreferenceConfig(beta=0.3))))


@pytest.mark.parametrize("x", [100.0, -100.0, 0.0])
@pytest.mark.parametrize("name", LOSSES)
def test_extremes_stay_finite(name, x):
    """H5: log-ratios of +-100 give finite losses (exp(-x) of discopop and forward KL aside) and finite gradients."""
    leaves = [torch.tensor([v], dtype=DOUBLE, requires_grad=True) for v in (x, -x, -abs(x) - 1e-8, -1e-8)]
    t = Terms(leaves[0], leaves[1], leaves[0], leaves[1], leaves[2], leaves[3], torch.ones(1), torch.ones(1))
    extra = dict(smoothing=0.1) if name in preference_config.SMOOTHED else {}
    loss = LOSSES[name](t, PreferenceConfig(losses={name: 1.0}, beta=0.5, **extra))
    assert loss.isfinite().all()
    for grad in torch.autograd.grad(loss.sum(), leaves, allow_unused=True):
        assert grad is None or grad.isfinite().all()


def test_log1mexp():
    for x in (-1e-8, -1e-3, -0.69, -0.7, -5.0, -100.0):
        assert float(log1mexp(torch.tensor(x, dtype=DOUBLE))) == pytest.approx(math.log(-math.expm1(x)), rel=1e-12)


def test_chosen_can_fall_while_the_loss_does():
    cfg = PreferenceConfig()
    sequence, counts, ref = torch.tensor([0, 0, 1]), Counts(2, 1), torch.tensor([-1.0, -1.0, -1.0])
    before = preference_objective(torch.tensor([-1.0, -1.0, -1.0]), ref, sequence, cfg, counts)
    after = preference_objective(torch.tensor([-2.0, -2.0, -9.0]), ref, sequence, cfg, counts)
    assert after[0] < before[0] and after[1]["logps/chosen"] < before[1]["logps/chosen"]
    assert "can fall" in preference_notes(cfg)[0] and not preference_notes(preference_recipe("rpo"))


def test_kto_by_hand():
    cfg = UnpairedConfig(beta=0.5, good_weight=1.0, bad_weight=1.3)
    c, good = torch.tensor([1.0, -0.5], dtype=DOUBLE), torch.tensor([True, False])
    z = kl_reference_point(torch.tensor([0.6, -0.2], dtype=DOUBLE))
    assert float(z) == pytest.approx(0.2) and float(kl_reference_point(torch.tensor([-3.0, 1.0]))) == 0

    def s(x):
        return 1 / (1 + math.exp(-x))

    assert unpaired_losses(c, good, z, cfg).tolist() == pytest.approx([1 - s(0.4), 1.3 * (1 - s(0.35))])
    with pytest.raises(BadInput, match="two examples"):
        kl_reference_point(torch.ones(1))
    assert "z = max" in unpaired_formula(cfg) and "z" not in unpaired_formula(UnpairedConfig("apo_zero")).split("\n")[0]


def test_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([2.0, -1.0], dtype=DOUBLE), torch.tensor([0.5, -1.0], dtype=DOUBLE)
    assert bradley_terry(chosen, rejected).tolist() == pytest.approx([-log_sigmoid(1.5), math.log(2)])
    margin = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    assert bradley_terry(chosen, rejected, margin, 0.01).tolist() == pytest.approx(
        [-log_sigmoid(0.5) + 0.01 * 6.25, math.log(2) + 0.01 * 4])
    assert bradley_terry(torch.tensor([100.0]), torch.tensor([-100.0])).isfinite().all()
    with pytest.raises(BadInput, match="centring"):
        bradley_terry(chosen, rejected, centring=-1.0)


def test_process_rewards():
    """Against the two-class cross-entropy of a token classifier (trl's PRM until 1.13), and soft labels."""
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 2, generator=g), torch.randint(0, 2, (9,), generator=g)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(process_loss(logits[:, 1] - logits[:, 0], labels.bool()), expected)
    soft = process_loss(torch.tensor([0.3]), torch.tensor([0.25]))
    assert float(soft) == pytest.approx(-0.25 * log_sigmoid(0.3) - 0.75 * log_sigmoid(-0.3))
    steps = torch.tensor([2.0, -1.0, 0.5])
    p = steps.sigmoid()
    for how, value in (("min", p.min()), ("product", p.prod()), ("last", p[-1])):
        assert float(solution_score(steps, how)) == pytest.approx(float(value))
    with pytest.raises(BadInput, match="product"):
        solution_score(steps, "mean")


def test_dft_gradient_is_bounded():
    logp = torch.tensor([-0.1, -5.0, -50.0], requires_grad=True)
    (grad,) = torch.autograd.grad(dft(logp).sum(), logp)
    torch.testing.assert_close(grad, -logp.detach().exp())


# --- configuration ----------------------------------------------------------------------------------------------------


def test_every_loss_has_a_formula():
    assert set(FORMULAS) == set(LOSSES) | {"sft"}
    texts = {name: preference_formula(preference_recipe(name)) for name in PREFERENCE_RECIPES}
    assert len(set(texts.values())) == len(texts)
    assert "0.8 * [-log σ" in texts["mpo"] and "w_c w_r" in texts["wpo"] and "0.5 times (LD-DPO)" in texts["ld-dpo"]
    assert "γ = 1" in texts["simpo"] and "f(c)/Lc" in texts["ipo"] and "f(c)/Lc" not in texts["ipo-sum"]


OTHER = {"losses": dict(losses={"hinge": 1.0}), "beta": dict(beta=0.3), "smoothing": dict(losses={"cdpo": 1.0}, smoothing=0.2),
         "f_divergence": dict(f_divergence="js"), "alpha": dict(f_divergence="alpha", alpha=0.7),
         "gamma": dict(losses={"simpo": 1.0}, gamma=1.5), "tau": dict(losses={"discopop": 1.0}, tau=0.1),
         "weighting": dict(weighting="wpo"), "ld_alpha": dict(ld_alpha=0.2)}


@pytest.mark.parametrize("name", [f.name for f in fields(PreferenceConfig)])
def test_every_choice_shows_in_the_formula(name):
    without = {k: v for k, v in OTHER[name].items() if k != name}
    assert preference_formula(PreferenceConfig(**OTHER[name])) != preference_formula(PreferenceConfig(**without))


@pytest.mark.parametrize("choices, told", [
    (dict(smoothing=0.1), "cdpo"), (dict(losses={"hinge": 1.0}, smoothing=0.1), "no effect"), (dict(losses={"dpo": 1.0}), "unknown"),
    (dict(losses={}), "at least one"), (dict(beta=0.0), "positive"), (dict(losses={"exo_pair": 1.0}), "above 0"),
    (dict(losses={"robust": 1.0}, smoothing=0.5), "[0, 0.5)"), (dict(gamma=1.0), "no effect"), (dict(tau=0.1), "no effect"),
    (dict(losses={"nca_pair": 1.0}, f_divergence="js"), "no effect"), (dict(alpha=0.3), "no effect"),
    (dict(losses={"aot": 1.0}, weighting="wpo"), "wpo"), (dict(ld_alpha=1.5), "[0, 1]"), (dict(f_divergence="kl"), "reverse_kl"),
    (dict(losses={"sft": 1.0}, beta=0.3), "no effect"),
])
def test_impossible_and_idle_choices_are_refused(choices, told):
    with pytest.raises(BadInput) as error:
        PreferenceConfig(**choices)
    assert told in str(error.value)


def test_refusals_of_tensors_and_names():
    x, sequence = torch.zeros(3), torch.tensor([0, 0, 1])
    with pytest.raises(BadInput, match="ref"):
        preference_objective(x, None, sequence, PreferenceConfig(), Counts(2, 1))
    with pytest.raises(BadInput, match="empty"):
        preference_objective(x, x, torch.tensor([0, 0, 2]), PreferenceConfig(), Counts(2, 1))
    with pytest.raises(BadInput, match="log_square"):
        preference_objective(x, x, sequence, PreferenceConfig(weighting="wpo"), Counts(2, 1))
    with pytest.raises(BadInput, match="did you mean 'simpo'"):
        preference_recipe("simp")
    with pytest.raises(BadInput, match="did you mean 'smoothing'"):
        preference_recipe("cdpo", smothing=0.2)
    with pytest.raises(BadInput, match="kto"):
        UnpairedConfig("kot")
    assert not preference_recipe("simpo").needs_reference and not preference_recipe("orpo").needs_reference
    assert preference_recipe("rpo").needs_reference and preference_recipe("aot").whole_batch


def test_doctests():
    for module in (preference_config, unpaired):
        result = doctest.testmod(module)
        assert result.attempted > 0 and result.failed == 0
