"""The DPO family, KTO, reward-model, ORPO, CPO and distillation losses against trl's own code: values and gradients."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("trl", reason="optional reference: pip install pellucid[parity]")

import trl_trainers

from pellucid.align.aggregation import Counts, aggregate
from pellucid.align.divergence import dft, distill_logits, jsd_rows, sparse_rows
from pellucid.align.preference import LOSSES, Terms, preference_objective
from pellucid.align.preference_config import PreferenceConfig
from pellucid.align.reward_losses import bradley_terry, pair_shares
from pellucid.align.unpaired import UnpairedConfig, kl_reference_point, unpaired_objective

P, T = 5, 8
E = dict(smoothing=0.1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    out = tmp_path_factory.mktemp("trl")
    return SimpleNamespace(dpo=trl_trainers.dpo(out), kto=trl_trainers.kto(out), reward=trl_trainers.reward(out))


@pytest.fixture
def batch():
    """Five pairs in trl's order (chosen, then rejected), lengths 1 to 7, log-probabilities far from the reference."""
    g = torch.Generator().manual_seed(4)
    first = torch.randint(1, 3, (2 * P,), generator=g)
    lengths = torch.tensor([3, 1, 5, 2, 4, 2, 6, 1, 3, 4])
    at = torch.arange(T)[None]
    completion = (at >= first[:, None]) & (at < (first + lengths)[:, None])
    mask = completion[:, 1:]  # where a completion token is predicted
    free = (-2 * torch.rand(2 * P, T - 1, generator=g)).requires_grad_()
    logp = free * mask  # trl's fused head gives 0, without gradient, where nothing is labelled
    ref = (logp.detach() + 0.7 * torch.randn(logp.shape, generator=g)) * mask
    logp.free = free
    return logp, ref, completion, mask


def flat(mask):
    """Row of trl's batch -> our sequence ids: chosen of pair p is 2p, rejected 2p + 1."""
    row = torch.arange(2 * P)
    return torch.where(row < P, 2 * row, 2 * (row - P) + 1)[:, None].expand(mask.shape)[mask]


def ours(batch, cfg, counts=None, **given):
    logp, ref, _, mask = batch
    counts = counts or Counts(int(mask[:P].sum()), P)
    sequence = flat(mask)
    order = sequence.argsort(stable=True)
    given = {k: v[mask][order] for k, v in given.items()}
    return preference_objective(logp[mask][order], ref[mask][order], sequence[order], cfg, counts, **given)


CASES = {  # trl's options -> ours
    "sigmoid": ({}, {}), "hinge": ({}, {}), "ipo": ({}, {}), "exo_pair": (dict(label_smoothing=0.1), E), "nca_pair": ({}, {}),
    "robust": (dict(label_smoothing=0.1), E), "bco_pair": ({}, {}), "sppo_hard": ({}, {}), "aot": (dict(label_smoothing=0.1), E),
    "aot_unpaired": (dict(label_smoothing=0.1), E), "apo_zero": ({}, {}), "apo_down": ({}, {}), "discopop": ({}, {}),
    "sigmoid_norm": ({}, {}), "sft": ({}, {}),
}


def theirs(trainer, batch, losses, log_square=None, **options):
    logp, ref, completion, _ = batch
    state = dict(loss_types=list(losses), loss_weights=list(losses.values()), label_smoothing=0.0, beta=0.3, ld_alpha=None,
                 use_weighting=log_square is not None, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5)
    for name, value in (state | options).items():
        setattr(trainer, name, value)
    trainer.ref_model = trl_trainers.Answers(ref)
    shape = completion.shape
    inputs = dict(input_ids=torch.zeros(shape, dtype=torch.long), attention_mask=torch.ones(shape, dtype=torch.long),
                  completion_mask=completion.long())
    trainer._metrics["train"].clear()
    return trainer._compute_loss(trl_trainers.Answers(logp, log_square=log_square), inputs, False)


def same(batch, a, b, least=1e-3, atol=2e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=2e-6)
    x, y = (torch.autograd.grad(v, batch[0].free, retain_graph=True)[0] for v in (a, b))
    torch.testing.assert_close(x, y, atol=atol, rtol=2e-6)
    assert float(y.abs().max()) > least, "vacuous: no gradient"


@pytest.mark.parametrize("name", CASES)
def test_pair_losses(trainers, batch, name):
    options, choices = CASES[name]
    cfg = PreferenceConfig(losses={name: 1.0}, **(choices | (dict() if name == "sft" else dict(beta=0.3))))
    mine, metrics = ours(batch, cfg)
    same(batch, mine, theirs(trainers.dpo, batch, {name: 1.0}, **options), atol=4e-5 if name == "sppo_hard" else 2e-6)
    if name != "sft":
        logged = {k: v[-1] for k, v in trainers.dpo._metrics["train"].items()}
        for key, of_trl in (("rewards/chosen", "rewards/chosen"), ("rewards/rejected", "rewards/rejected"),
                            ("rewards/margin", "rewards/margins"), ("rewards/accuracy", "rewards/accuracies"),
                            ("logps/chosen", "logps/chosen"), ("logps/rejected", "logps/rejected")):
            assert float(metrics[key]) == pytest.approx(logged[of_trl], abs=1e-5), key


def test_every_loss_of_trl_is_covered():
    assert set(CASES) - {"sft"} <= set(LOSSES)
    assert set(LOSSES) - set(CASES) == {"cdpo", "ipo_sum", "simpo", "cpo", "orpo"}  # compared elsewhere


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge", "exo_pair", "sigmoid_norm"])
@pytest.mark.parametrize("divergence, theirs_name", [("forward_kl", "forward_kl"), ("js", "js_divergence"),
                                                     ("alpha", "alpha_divergence")])
def test_f_divergences(trainers, batch, name, divergence, theirs_name):
    options, choices = CASES[name]
    alpha = dict(alpha=0.7) if divergence == "alpha" else {}
    cfg = PreferenceConfig(losses={name: 1.0}, beta=0.3, f_divergence=divergence, **choices, **alpha)
    other = theirs(trainers.dpo, batch, {name: 1.0}, f_divergence_type=theirs_name, f_alpha_divergence_coef=0.7, **options)
    same(batch, ours(batch, cfg)[0], other, atol=5e-6)


def test_mixture_and_length_desensitised(trainers, batch):
    mpo = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.5}
    same(batch, ours(batch, PreferenceConfig(losses=mpo, beta=0.3))[0], theirs(trainers.dpo, batch, mpo))
    for alpha in (0.0, 0.5, 1.0):
        cfg = PreferenceConfig(beta=0.3, ld_alpha=alpha)
        same(batch, ours(batch, cfg)[0], theirs(trainers.dpo, batch, {"sigmoid": 1.0}, ld_alpha=alpha))
    with_sft = PreferenceConfig(losses={"sigmoid": 1.0, "sft": 1.0}, beta=0.3, ld_alpha=0.25)
    same(batch, ours(batch, with_sft)[0], theirs(trainers.dpo, batch, {"sigmoid": 1.0, "sft": 1.0}, ld_alpha=0.25))


def test_weighted_pairs(trainers, batch):
    square = -torch.rand(batch[0].shape, generator=torch.Generator().manual_seed(2)) - 0.1
    cfg = PreferenceConfig(losses={"sigmoid": 1.0, "ipo": 0.5}, beta=0.3, weighting="wpo")
    other = theirs(trainers.dpo, batch, {"sigmoid": 1.0, "ipo": 0.5}, log_square=square)
    same(batch, ours(batch, cfg, log_square=square)[0], other)
    plain = ours(batch, PreferenceConfig(losses={"sigmoid": 1.0, "ipo": 0.5}, beta=0.3))[0]
    assert abs(float(plain.detach() - other.detach())) > 1e-3


def test_shares_of_micro_batches_add_up(batch):
    """Pairs cut into micro-batches of unequal size, in any order: loss, gradient and metrics are the step's."""
    logp, ref, _, mask = batch
    counts = Counts(int(mask[:P].sum()), P)
    for name in set(LOSSES) - {"aot", "aot_unpaired"} | {"sft"}:
        extra = E if name in ("exo_pair", "robust", "cdpo") else {}
        cfg = PreferenceConfig(losses={name: 1.0}, **extra)
        whole, metrics = ours(batch, cfg)
        parts = []
        for pairs in ([3], [0, 4], [1, 2]):
            rows = torch.tensor(pairs + [p + P for p in pairs])
            m = mask[rows]
            n, row = len(pairs), torch.arange(2 * len(pairs))
            sequence = torch.where(row < n, 2 * row, 2 * (row - n) + 1)[:, None].expand(m.shape)[m]
            parts.append(preference_objective(logp[rows][m], ref[rows][m], sequence, cfg, counts))
        torch.testing.assert_close(sum(p[0] for p in parts), whole, atol=1e-6, rtol=1e-6)
        grads = [torch.autograd.grad(x, logp.free, retain_graph=True)[0] for x in (whole, sum(p[0] for p in parts))]
        torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-6)
        for key, value in metrics.items():
            assert float(sum(p[1][key] for p in parts)) == pytest.approx(float(value), abs=1e-5)


# --- reference-free losses and other trainers -------------------------------------------------------------------------


def some_terms(seed=5):
    g = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, 9, (P,), generator=g).float() for _ in range(2)]
    logps = [(-3 * torch.rand(P, generator=g) * n).requires_grad_() for n in lengths]
    zero = torch.zeros(P)
    return Terms(zero, zero, zero, zero, *logps, *lengths), logps


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["cpo", "simpo"])
def test_cpo_and_simpo(name, smoothing):
    from trl.experimental.cpo import CPOTrainer

    t, logps = some_terms()
    shim = SimpleNamespace(alpha=0.0, beta=2.0, simpo_gamma=1.0, label_smoothing=smoothing,
                           loss_type={"cpo": "sigmoid"}.get(name, name), accelerator=SimpleNamespace(device="cpu"))
    given = [t.chosen, t.rejected] if name == "cpo" else [t.chosen / t.chosen_tokens, t.rejected / t.rejected_tokens]
    other = CPOTrainer.cpo_loss(shim, *given)[0]
    gamma = dict(gamma=1.0) if name == "simpo" else {}
    mine = LOSSES[name](t, PreferenceConfig(losses={name: 1.0}, beta=2.0, smoothing=smoothing, **gamma))
    torch.testing.assert_close(mine, other)
    for x, y in zip(*(torch.autograd.grad(v.sum(), logps, retain_graph=True) for v in (mine, other))):
        torch.testing.assert_close(x, y)


def test_orpo():
    from trl.experimental.orpo import ORPOTrainer

    t, logps = some_terms()
    shim = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    other = -ORPOTrainer.odds_ratio_loss(shim, t.chosen / t.chosen_tokens, t.rejected / t.rejected_tokens)[0]
    mine = LOSSES["orpo"](t, PreferenceConfig(losses={"orpo": 1.0}))
    torch.testing.assert_close(mine, other)
    for x, y in zip(*(torch.autograd.grad(v.sum(), logps, retain_graph=True) for v in (mine, other))):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name, weights", [("kto", (1.0, 1.0)), ("kto", (0.7, 1.3)), ("apo_zero", (1.0, 0.5))])
@pytest.mark.parametrize("shift", [0.5, -0.5])  # z positive, and held at 0
def test_unpaired(trainers, batch, name, weights, shift):
    logp, ref, completion, mask = batch
    good = torch.tensor([True, False, True, True, False, False, True, False, True, False])
    mismatched = ref + shift * mask
    trainer = trainers.kto
    trainer.loss_type = {"apo_zero": "apo_zero_unpaired"}.get(name, name)
    trainer.calculate_KL, trainer.beta = name == "kto", 0.3
    trainer.desirable_weight, trainer.undesirable_weight = weights
    trainer.ref_model = trl_trainers.Answers(ref)
    shape = completion.shape
    ids, ones = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
    inputs = dict(input_ids=ids, attention_mask=ones, completion_mask=completion.long(), label=good, KL_input_ids=ids,
                  KL_attention_mask=ones, KL_completion_mask=completion.long())
    model = trl_trainers.Answers(mismatched, logp) if name == "kto" else trl_trainers.Answers(logp)
    other = trainer._compute_loss(model, inputs, False)
    other = other[0] if isinstance(other, tuple) else other
    row = torch.arange(2 * P)[:, None].expand(mask.shape)[mask]
    z = kl_reference_point((mismatched - ref).sum(1))
    assert (float(z) > 0) is (shift > 0)
    cfg = UnpairedConfig(name, 0.3, *weights)
    mine, _ = unpaired_objective(logp[mask], ref[mask], row, good, z, cfg, Counts(int(mask.sum()), 2 * P))
    same(batch, mine, other)


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centring", [None, 0.01])
def test_reward_model(trainers, margin, centring):
    g = torch.Generator().manual_seed(0)
    scores = (2 * torch.randn(2 * P, generator=g)).requires_grad_()
    with torch.no_grad():
        scores[P] = scores[0]  # a tie
    gaps = torch.rand(P, generator=g)
    trainers.reward.args.center_rewards_coefficient = centring
    inputs = dict(input_ids=torch.zeros(2 * P, 3, dtype=torch.long), attention_mask=torch.ones(2 * P, 3, dtype=torch.long))
    inputs |= dict(margin=gaps) if margin else {}
    trainers.reward._metrics["train"].clear()
    other = trainers.reward.compute_loss(lambda **_: SimpleNamespace(logits=scores[:, None]), inputs)
    mine = bradley_terry(scores[:P], scores[P:], gaps if margin else None, centring or 0.0).sum() / P
    torch.testing.assert_close(mine, other)
    x, y = (torch.autograd.grad(v, scores, retain_graph=True)[0] for v in (mine, other))
    torch.testing.assert_close(x, y)
    logged = {k: v[-1] for k, v in trainers.reward._metrics["train"].items()}
    shares = pair_shares(scores[:P], scores[P:], P)
    for key, of_trl in (("accuracy", "accuracy"), ("margin", "margin"), ("score/mean", "mean_reward"), ("score/max", "max_reward")):
        assert float(shares[key]) == pytest.approx(logged[of_trl], abs=1e-6)


# --- distillation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_divergences(beta, temperature):
    from trl.experimental.gkd import GKDTrainer

    g = torch.Generator().manual_seed(1)
    M, V, D, E2 = 11, 23, 6, 4
    hidden, other = 2 * torch.randn(M, D, generator=g), 2 * torch.randn(M, E2, generator=g)
    w, v = torch.randn(V, D, generator=g), torch.randn(V, E2, generator=g)
    hidden.requires_grad_(), w.requires_grad_()
    labels = torch.ones(1, M, dtype=torch.long)
    reference = GKDTrainer.generalized_jsd_loss((hidden @ w.mT)[None], (other @ v.mT)[None], labels, beta, temperature)
    mine = distill_logits(hidden, other, w, v, beta=beta, temperature=temperature, chunk=4).mean()
    torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-5)
    a, b = (torch.autograd.grad(x, (hidden, w), retain_graph=True) for x in (mine, reference))
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)
    assert b[0].abs().max() > 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_sparse_divergences(beta, tail):
    from trl.experimental.server_distillation import server_distillation_trainer as theirs

    g = torch.Generator().manual_seed(1)
    s, t = (torch.randn(9, 20, generator=g).mul(2).log_softmax(-1) for _ in range(2))
    top = t.topk(4)
    values, ids = top.values.clone(), top.indices
    values[2, 3] = -torch.inf  # the teacher reported only three
    valid = values > -torch.inf
    student = torch.where(valid, s.gather(-1, ids), -torch.inf)
    if tail == "bucket":
        (a, mask), (b, _) = (theirs._add_tail_bucket(x, valid) for x in (student, values))
    else:
        a, b, mask = *(x - x.logsumexp(-1, keepdim=True) for x in (student, values)), valid
    expected = theirs._jsd_divergence(a, b, beta, mask).sum(-1)
    torch.testing.assert_close(sparse_rows(s, ids, values, beta=beta, tail=tail), expected, atol=1e-6, rtol=1e-5)
    full = jsd_rows(s, t, beta)
    if tail == "bucket":
        assert (expected <= full + 1e-6).all() and (expected >= 0).all()  # joining events loses divergence
    every = t.topk(20)
    torch.testing.assert_close(sparse_rows(s, every.indices, every.values, beta=beta, tail="drop"), full, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_supervised_losses(tmp_path, batch, loss):
    """SFTTrainer's own loss: means over the labelled tokens of the whole step, of which this is a micro-batch."""
    logp, _, _, mask = batch
    trainer, tokens = trl_trainers.sft(tmp_path, loss_type=loss), int(mask.sum()) + 11
    ids = torch.zeros(mask.shape, dtype=torch.long)
    other = trainer.compute_loss(trl_trainers.Answers(logp), dict(input_ids=ids, labels=ids, attention_mask=ids + 1),
                                 num_items_in_batch=tokens)
    flat_logp = logp[mask]
    each = dft(flat_logp) if loss == "dft" else -flat_logp
    mine = aggregate(each, torch.zeros(len(each), dtype=torch.long), "token-mean", Counts(tokens, 2 * P))
    same(batch, mine, other)
