"""Off-policy corrections, high-entropy masks, ratios under truncated sampling, and numbers that need whole distributions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pellucid.align import EntropyController, KLController, ObjectiveConfig, importance_weights, off_policy_mask
from pellucid.align.aggregation import Counts, count
from pellucid.align.corrections import log_weights
from pellucid.align.divergence import distill_logits, distill_top_k, jsd_rows, top_k_of
from pellucid.align.head import by_rows, entropies, entropy_rows, log_square_rows
from pellucid.align.metrics import correction_table
from pellucid.align.objective import objective
from pellucid.align.policy_losses import high_entropy_tokens
from pellucid.align.support import Support, kept_tokens, support_logprobs, support_rows
from pellucid.engine.sampler import truncate
from pellucid.errors import BadInput
from pellucid.ops import token_logprobs

NAN = math.nan


# --- weights trainer / sampler ----------------------------------------------------------------------------------------


def test_levels_by_hand():
    trainer = torch.log(torch.tensor([0.5, 0.2, 0.1, 0.4]))
    sampler = torch.log(torch.tensor([0.25, 0.3, 0.1, 0.1]))
    sequence = torch.tensor([0, 0, 1, 1])
    expect = {"token": [2, 2 / 3, 1, 4], "sequence": [4 / 3, 4 / 3, 4, 4],
              "sequence-mean": [(4 / 3) ** 0.5, (4 / 3) ** 0.5, 2, 2], "sequence-max": [2, 2, 4, 4]}
    for level, w in expect.items():
        assert log_weights(trainer, sampler, sequence, level).exp().tolist() == pytest.approx(w), level
    assert log_weights(-trainer, -sampler, sequence, "sequence-max").exp().tolist() == pytest.approx([0.5, 0.5, 0.25, 0.25])
    cut = importance_weights(trainer, sampler, sequence, high=3.0, low=0.7)
    assert cut.tolist() == pytest.approx([2, 0.7, 1, 3])
    masked = importance_weights(trainer, sampler, sequence, mode="mask", high=3.0, low=0.7)
    assert masked.tolist() == pytest.approx([2, 0, 1, 0])
    with pytest.raises(BadInput, match="truncate"):
        importance_weights(trainer, sampler, sequence, mode="clip")
    with pytest.raises(BadInput, match="0 <= low"):
        importance_weights(trainer, sampler, sequence, low=3.0, high=2.0)


def test_unreported_and_runaway_tokens():
    """A token that the sampler did not report has weight 1; e^1000 is bounded; no gradient reaches the weights."""
    trainer = torch.tensor([-1.0, -2.0, 0.0], requires_grad=True)
    sampler = torch.tensor([NAN, -2.0, -1000.0])
    w = importance_weights(trainer, sampler, torch.arange(3), high=None)
    assert w[0] == 1 and w[1] == 1 and w.isfinite().all() and not w.requires_grad
    assert importance_weights(trainer, sampler, torch.zeros(3, dtype=torch.int64), level="sequence", high=2.0).tolist() == [2, 2, 2]


def test_sum_drifts_with_length():
    """Differences of 0.012 a token: the product of 100 of them is 3.3, beyond the usual cap; the mean is not (7.1)."""
    sequence = torch.zeros(100, dtype=torch.int64)
    trainer, sampler = torch.full((100,), -1.0), torch.full((100,), -1.012)
    assert float(log_weights(trainer, sampler, sequence, "sequence")[0].exp()) == pytest.approx(3.32, abs=0.01)
    assert float(log_weights(trainer, sampler, sequence, "sequence-mean")[0].exp()) == pytest.approx(1.012, abs=1e-3)
    lengths = torch.tensor([100, 40, 300])
    sequence = torch.arange(3).repeat_interleave(lengths)
    masked = importance_weights(torch.full((440,), -1.0), torch.full((440,), -1.012), sequence, level="sequence", mode="mask",
                                high=3.0)
    table = correction_table(masked, sequence)
    assert table["correction/dropped/to_64"] == 0 and table["correction/dropped/to_256"] == 1
    assert table["correction/dropped/to_1024"] == 1 and table["correction/ess/to_64"] == pytest.approx(1)
    assert table["correction/ess/to_256"] == 0


def test_off_policy_mask_by_hand():
    logp = torch.tensor([-1.0, -3.0, -1.0, -3.0, -1.0, -1.0])
    sampler = torch.tensor([-1.0, -1.0, -1.0, -1.0, NAN, -1.1])
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    sequence = torch.tensor([0, 0, 1, 1, 2, 2])
    assert off_policy_mask(logp, sampler, advantages, sequence, 0.5).tolist() == [False, False, True, True, True, True]
    assert off_policy_mask(logp, sampler, 0 * advantages, sequence, 0.5).all()


def test_corrections_act_on_the_policy_term_only():
    """Masked tokens still feel the KL term; corrections, thresholds and masks multiply."""
    g = torch.Generator().manual_seed(0)
    logp = (-torch.rand(6, generator=g, dtype=torch.float64)).requires_grad_()
    old, ref, sampler = (logp.detach() + s * torch.randn(6, generator=g, dtype=torch.float64) for s in (0.1, 0.5, 0.8))
    a, sequence, counts = torch.tensor([1.0, 1, 1, -1, -1, -1]).double(), torch.tensor([0, 0, 0, 1, 1, 1]), Counts(6, 2)
    keep = torch.tensor([True, True, False, True, True, True])
    w = importance_weights(old, sampler, sequence, high=2.5, low=0.4, mode="mask")
    stays = off_policy_mask(logp, sampler, a, sequence, 0.3)
    factor = w * stays * keep
    assert 0 < int((factor == 0).sum()) < 6
    cfg = ObjectiveConfig(aggregation="token-mean", beta=0.1, correction="mask", correction_low=0.4, correction_high=2.5,
                          off_policy=0.3, high_entropy=0.9)
    loss, metrics = objective(logp, old, ref, a, sequence, cfg, counts, sampler=sampler, keep=keep)
    policy, _ = objective(logp, old, ref, a * factor, sequence, ObjectiveConfig(aggregation="token-mean", beta=0.1), counts)
    torch.testing.assert_close(loss, policy)
    (grad,) = torch.autograd.grad(loss, logp)
    assert grad.all(), "the KL term reaches every token"
    assert float(metrics["correction/dropped"]) == pytest.approx(float((factor == 0).double().mean()))
    for name, given in (("sampler", dict(keep=keep)), ("keep", dict(sampler=sampler))):
        with pytest.raises(BadInput, match=f"pass {name}"):
            objective(logp, old, ref, a, sequence, cfg, counts, **given)


def test_high_entropy_tokens():
    h = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7])
    assert high_entropy_tokens(h, 0.2).tolist() == [False, True, False, False, False]
    assert high_entropy_tokens(h, 0.5).tolist() == [False, True, True, False, True]
    assert high_entropy_tokens(h, 1.0).all() and not high_entropy_tokens(torch.zeros(0), 0.2).numel()
    g = torch.Generator().manual_seed(0)
    for size, fraction in itertools.product((2, 7, 100), (0.1, 0.2, 0.33, 0.8)):
        h = torch.rand(size, generator=g)
        assert torch.equal(high_entropy_tokens(h, fraction), h >= h.quantile(1 - fraction))


def test_controllers():
    c = EntropyController(0.01, target=0.5)
    assert c.coefficient == 0  # nothing is known before the first step
    assert c.update(0.4) == pytest.approx(0.015) and c.update(0.6) == 0 and c.value == pytest.approx(0.01)
    assert EntropyController(**c.state()) == c
    for _ in range(99):
        c.update(0.6)
    assert c.value == 0 and c.update(0.5) == pytest.approx(0.005)
    k = KLController(0.1, 0.02, 100)
    assert k.update(0.04, 50) == pytest.approx(0.1 * 1.1) and k.update(0.02, 50) == pytest.approx(0.11)
    with pytest.raises(BadInput):
        KLController(0.1, target=0.0)


# --- ratios under truncated sampling ----------------------------------------------------------------------------------

RULES = [dict(top_p=0.8), dict(top_k=3), dict(min_p=0.2), dict(top_k=5, top_p=0.7, min_p=0.05)]


def setting(M=40, D=8, V=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(M, D, generator=g), torch.randn(V, D, generator=g)
    return hidden, weight, g


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_one_on_policy_and_right_off_policy(rule, temperature):
    """T16, by enumeration: E over what could be drawn of p_new / p_old is 1 with the support, and less without it."""
    hidden, weight, g = setting()
    logits = hidden @ weight.mT / temperature
    support = kept_tokens(logits, **rule)
    probs = logits.softmax(-1)
    kept = truncate(probs, torch.full((40,), rule.get("top_k", 0)), torch.full((40,), rule.get("top_p", 1.0)))
    kept = kept.masked_fill(probs < rule.get("min_p", 0.0) * probs.amax(-1, keepdim=True), 0)
    sampler = kept / kept.sum(-1, keepdim=True)  # what the engine draws from
    moved = hidden + 0.3 * torch.randn(hidden.shape, generator=g)
    row = torch.arange(40).repeat_interleave(support.starts.diff())
    every = support.take(row)  # every token that could be drawn, at its place

    def mean_ratio(h):
        new = support_logprobs(h[row], weight, support.ids, every, temperature)
        naive = token_logprobs(h[row], weight, support.ids, temperature)[0]
        p, old = sampler[row, support.ids], sampler[row, support.ids].log()
        return [torch.zeros(40).index_add(0, row, p * (x - old).exp()) for x in (new, naive)]

    exact, biased = mean_ratio(hidden)
    torch.testing.assert_close(exact, torch.ones(40))
    torch.testing.assert_close(biased, kept.sum(-1), atol=1e-6, rtol=1e-5)  # too small by exactly the kept mass
    assert float(biased.mean()) < 0.97
    torch.testing.assert_close(mean_ratio(moved)[0], torch.ones(40))  # a distribution over the support again


def test_support_gradient_and_slices():
    hidden, weight, _ = setting()
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.no_grad():
        support = kept_tokens(hidden @ weight.mT, top_p=0.8)
    tokens = torch.stack([support.ids[s] for s in support.starts[:-1]])
    whole = support_logprobs(hidden, weight, tokens, support)
    keep = torch.zeros(40, 12, dtype=torch.bool)
    keep[torch.arange(40).repeat_interleave(support.starts.diff()), support.ids] = True
    dense = (hidden @ weight.mT).masked_fill(~keep, -torch.inf).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(whole, dense)
    r = torch.randn(40)
    for x, y in zip(*(torch.autograd.grad((v * r).sum(), (hidden, weight), retain_graph=True) for v in (whole, dense))):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    pieces = by_rows(support_rows, hidden, weight, tokens, support, chunk=7)
    torch.testing.assert_close(pieces, whole)
    again = Support.cat([support[:11], support[11:]])
    assert torch.equal(again.ids, support.ids) and torch.equal(again.starts, support.starts)
    part = support.take(torch.tensor([5, 2]))
    assert torch.equal(part.ids, torch.cat([support[5:6].ids, support[2:3].ids])) and len(support[40:]) == 0
    outside = tokens.clone()
    outside[3] = int((~keep[3]).nonzero()[0])
    with pytest.raises(BadInput, match="first at 3"):
        support_logprobs(hidden, weight, outside, support)
    with pytest.raises(BadInput, match="39 supports"):
        support_logprobs(hidden, weight, tokens, support[1:])


# --- whole distributions in pieces ------------------------------------------------------------------------------------


def test_entropy_and_weights_of_pairs():
    hidden, weight, _ = setting()
    hidden.requires_grad_(), weight.requires_grad_()
    p = (hidden @ weight.mT / 0.7).softmax(-1)
    exact = -(p * p.log()).sum(-1)
    torch.testing.assert_close(entropies(hidden, weight, 0.7), exact)
    r = torch.randn(40)
    pieces = by_rows(entropy_rows, hidden, weight, temperature=0.7, chunk=9)
    for x, y in zip(*(torch.autograd.grad((v * r).sum(), (hidden, weight), retain_graph=True) for v in (pieces, exact))):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_rows(log_square_rows, hidden, weight, temperature=0.7), (p * p).sum(-1).log())
    assert entropies(hidden[:0], weight).shape == (0,)


def test_nothing_as_wide_as_the_vocabulary_is_kept():
    """What autograd saves for the backward pass stays far below M * V numbers."""
    g = torch.Generator().manual_seed(0)
    M, D, V = 600, 8, 500
    hidden, other = torch.randn(M, D, generator=g, requires_grad=True), torch.randn(M, D, generator=g)
    weight, teacher = torch.randn(V, D, generator=g, requires_grad=True), torch.randn(V, D, generator=g)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = distill_logits(hidden, other, weight, teacher, beta=0.5, chunk=50).sum() + entropies(hidden, weight).sum()
    assert max(saved, default=0) <= max(M * D, V * D) < M * V
    loss.backward()
    assert hidden.grad.isfinite().all() and weight.grad.abs().max() > 0


def test_top_k_of_a_local_teacher():
    hidden, weight, g = setting()
    teacher, head = torch.randn(40, 5, generator=g), torch.randn(12, 5, generator=g)
    ids, logps = top_k_of(teacher, head, 12, 0.7)
    full = distill_logits(hidden, teacher, weight, head, temperature=0.7)
    torch.testing.assert_close(distill_top_k(hidden, weight, ids, logps, tail="drop", temperature=0.7), full, atol=1e-5, rtol=1e-4)
    ids, logps = top_k_of(teacher, head, 3, 0.7)
    some = distill_top_k(hidden, weight, ids, logps, temperature=0.7)
    assert (some <= full + 1e-5).all() and (some >= 0).all() and ids.shape == (40, 3)
    with pytest.raises(BadInput, match="vocabulary"):
        distill_logits(hidden, teacher, weight, head[:-1])
    with pytest.raises(BadInput, match="bucket"):
        distill_top_k(hidden, weight, ids, logps, tail="none")
    with pytest.raises(BadInput, match="beta"):
        jsd_rows(torch.zeros(1, 2), torch.zeros(1, 2), 1.5)


def test_reverse_kl_on_own_samples_is_its_own_gradient():
    """On-policy distillation: sum_v s_v (log s_v - log t_v), by enumeration; zero at the teacher, and nowhere else."""
    g = torch.Generator().manual_seed(0)
    s = torch.randn(3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    t = torch.randn(3, 5, generator=g, dtype=torch.float64).log_softmax(-1)
    kl = jsd_rows(s.log_softmax(-1), t, 1.0)
    p = s.softmax(-1)
    torch.testing.assert_close(kl, (p * (p.log() - t)).sum(-1))
    assert kl.min() > 0 and float(jsd_rows(t, t, 1.0).abs().max()) < 1e-12
    zeros = t.clone()
    zeros[:, 0] = -torch.inf  # a teacher that excludes a token: forward KL stays finite, reverse says never
    assert jsd_rows(s.log_softmax(-1), zeros, 0.0).isfinite().all() and jsd_rows(s.log_softmax(-1), zeros, 1.0).isinf().all()


def test_counts_of_empty_steps():
    assert count(torch.zeros(0, dtype=torch.int64)).tokens == 0
