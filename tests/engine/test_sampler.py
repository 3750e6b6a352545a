"""The sampler: its random numbers, its distribution (chi-square), its truncation against transformers' warpers."""

from __future__ import annotations

import math

import pytest
import torch

import pellucid.engine.sampler as sampler_module
from pellucid.engine import SamplingParams
from pellucid.engine.sampler import Sampler, draw, truncate, uniform
from pellucid.errors import BadInput
from pellucid.runtime import Choice

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """First output of splitmix64 from `state`, in Python's unbounded integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def plain_uniform(seed: int, step: int) -> float:
    return (splitmix64((splitmix64(seed) + step) & MASK) >> 11) * 2.0**-53


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_our_plain_splitmix_is_the_published_one():
    golden = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [splitmix64(1234567 + i * 0x9E3779B97F4A7C15 & MASK) for i in range(5)] == golden


def test_uniform_equals_plain_splitmix64():
    seeds = [0, 1, 2, 1234567, 2**31, 2**40 + 3, 2**62, 2**63 - 1]
    steps = [0, 1, 2, 17, 100_000]
    pairs = [(s, t) for s in seeds for t in steps]
    got = uniform(torch.tensor([s for s, _ in pairs]), torch.tensor([t for _, t in pairs]))
    assert got.dtype == torch.float64
    assert got.tolist() == [plain_uniform(s, t) for s, t in pairs]  # exact, in all 53 bits


def test_neighbouring_seeds_and_steps_are_uniform_and_unrelated():
    u = uniform(torch.arange(400)[:, None], torch.arange(300)[None])  # (seed, step)
    assert 0 <= u.min() and u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    expected = u.numel() / 100
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert chi < 99 + 5 * math.sqrt(2 * 99)
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[1:, :-1], u[:-1, 1:])):  # seed + 1; step + 1; seed + 1, step - 1
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(a.numel())
    assert len(u.unique()) == u.numel()


# --- the inverse transform --------------------------------------------------------------------------------------------


def test_draw_never_returns_a_token_without_weight():
    weights = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.0, 0.0]])
    u = torch.tensor([0.0, 1e-300, 0.2, 0.4, 0.9999999999999999, 1 - 2**-53], dtype=torch.float64)
    for value in u:
        assert int(draw(weights, value[None])) in (1, 3)
    assert int(draw(weights, u[:1])) == 1 and int(draw(weights, u[-1:])) == 3


def test_draw_splits_the_unit_interval_by_weight():
    weights = torch.tensor([[1.0, 3.0, 4.0]])  # not normalised
    u = torch.tensor([0.0, 0.124, 0.126, 0.499, 0.501, 0.999], dtype=torch.float64)
    assert [int(draw(weights, x[None])) for x in u] == [0, 0, 1, 1, 2, 2]


# --- truncation against transformers ----------------------------------------------------------------------------------

SETTINGS = [
    dict(temperature=1.0),
    dict(temperature=0.7),
    dict(temperature=1.3, top_k=5),
    dict(temperature=1.0, top_p=0.8),
    dict(temperature=2.0, min_p=0.2),
    dict(temperature=0.6, top_k=7, top_p=0.75),
    dict(temperature=1.5, top_k=9, top_p=0.9, min_p=0.15),
    dict(temperature=1.0, top_p=1e-6),
    dict(temperature=1.0, top_k=10**6, min_p=1.0),
    dict(temperature=1.2, typical_p=0.7),
    dict(temperature=0.9, typical_p=0.05),
    dict(temperature=1.5, top_k=11, top_p=0.95, min_p=0.02, typical_p=0.8),
]


def warped(logits, temperature, top_k=None, top_p=None, min_p=None, typical_p=None):
    """Probabilities after transformers' warpers, in the order in which `generate` puts them, in float64."""
    from transformers.generation import logits_process as hf

    chain = [hf.TemperatureLogitsWarper(float(temperature))]
    chain += [hf.TopKLogitsWarper(top_k)] if top_k else []
    chain += [hf.TopPLogitsWarper(top_p)] if top_p is not None else []
    chain += [hf.MinPLogitsWarper(min_p)] if min_p is not None else []
    chain += [hf.TypicalLogitsWarper(typical_p)] if typical_p is not None else []
    scores = logits.double()
    for warper in chain:
        scores = warper(None, scores)
    return scores.softmax(-1)


@pytest.fixture
def kept(monkeypatch):
    """What the sampler hands to `draw`: the weights after truncation."""
    seen = []

    def spy(weights, u):
        seen.append(weights)
        return draw(weights, u)

    monkeypatch.setattr(sampler_module, "draw", spy)
    monkeypatch.setattr(sampler_module, "choose_jit", lambda: Choice(False, "the twin is what is looked at"))
    return seen


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_truncation_keeps_what_transformers_keeps(setting, kept):
    logits = 2.5 * torch.randn(60, 40, generator=torch.Generator().manual_seed(3))
    Sampler([SamplingParams(**setting)] * 60, range(60))(logits, 0)
    (ours,) = kept
    theirs = warped(logits, **setting)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close((ours / ours.sum(-1, keepdim=True)).double(), theirs, atol=1e-6, rtol=1e-5)


def test_rows_of_one_batch_are_truncated_each_by_its_own_setting(kept):
    logits = 2.5 * torch.randn(len(SETTINGS), 40, generator=torch.Generator().manual_seed(4))
    Sampler([SamplingParams(**s) for s in SETTINGS], range(len(SETTINGS)))(logits, 0)
    theirs = torch.cat([warped(row[None], **s) for row, s in zip(logits, SETTINGS)])
    (ours,) = kept
    torch.testing.assert_close((ours / ours.sum(-1, keepdim=True)).double(), theirs, atol=1e-6, rtol=1e-5)


def test_ties_at_the_border_keep_exactly_k_and_the_earlier_tokens():
    probs = torch.full((1, 8), 1 / 8)
    assert (truncate(probs, torch.tensor([3]), torch.tensor([1.0])) > 0).tolist() == [[True] * 3 + [False] * 5]
    assert (truncate(probs, torch.tensor([0]), torch.tensor([0.5])) > 0).tolist() == [[True] * 4 + [False] * 4]


# --- the distribution of what is drawn --------------------------------------------------------------------------------


def test_drawn_tokens_follow_the_softmax_chi_square():
    """All settings mixed in one batch with greedy rows, 4000 seeds each; five standard deviations of chi-square."""
    n, V = 4000, 12
    row = 1.5 * torch.randn(1, V, generator=torch.Generator().manual_seed(9))
    settings = [*SETTINGS[:7], *SETTINGS[-3:]]
    params = [SamplingParams(**s) for s in settings] + [SamplingParams(temperature=0.0)]
    mixed = params * n
    tokens, _ = Sampler(mixed, [1000 + i // len(params) for i in range(len(mixed))])(row.expand(len(mixed), V), 5)
    drawn = tokens.view(n, len(params))
    for column, setting in enumerate(settings):
        p = warped(row, **setting)[0]
        counts = torch.bincount(drawn[:, column], minlength=V).double()
        assert (counts[p == 0] == 0).all()
        used = p > 0
        chi = float(((counts[used] - n * p[used]) ** 2 / (n * p[used])).sum())
        freedom = int(used.sum()) - 1
        assert chi <= freedom + 5 * math.sqrt(2 * freedom), (setting, chi)
    assert (drawn[:, -1] == row.argmax()).all()


def test_tokens_of_one_seed_over_the_steps_follow_the_softmax_too():
    n, V = 3000, 6
    row = torch.tensor([[0.0, 1.0, -1.0, 0.5, 2.0, -3.0]])
    sampler = Sampler([SamplingParams(temperature=1.0)], [42])
    counts = torch.bincount(torch.cat([sampler(row, t)[0] for t in range(n)]), minlength=V)
    p = row.double().softmax(-1)[0]
    assert float(((counts - n * p) ** 2 / (n * p)).sum()) < V - 1 + 5 * math.sqrt(2 * (V - 1))


def test_limits_of_temperature_are_greedy_and_flat():
    logits = 3 * torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    best = logits.argmax(-1)
    for params in (dict(temperature=0.0), dict(temperature=1e-40), dict(temperature=5.0, top_k=1),
                   dict(temperature=5.0, top_p=1e-9), dict(temperature=5.0, min_p=1.0)):
        tokens, logprobs = Sampler([SamplingParams(**params, logprobs=True)] * 50, range(50))(logits, 3)
        assert torch.equal(tokens, best), params
        assert torch.isfinite(logprobs).all(), params


def test_greedy_rows_are_greedy_beside_sampled_ones():
    logits = torch.randn(40, 25, generator=torch.Generator().manual_seed(2))
    params = [SamplingParams(temperature=0.0 if i % 2 else 1.7, logprobs=True) for i in range(40)]
    tokens, logprobs = Sampler(params, range(40))(logits, 0)
    assert torch.equal(tokens[1::2], logits.argmax(-1)[1::2])
    assert not torch.equal(tokens[::2], logits.argmax(-1)[::2])
    scaled = torch.where(torch.arange(40)[:, None] % 2 == 1, logits, logits / 1.7).log_softmax(-1)
    torch.testing.assert_close(logprobs, scaled.gather(1, tokens[:, None])[:, 0])


def test_logprobs_are_those_before_truncation():
    logits = torch.randn(30, 20, generator=torch.Generator().manual_seed(6))
    params = [SamplingParams(temperature=0.8, top_k=3, top_p=0.9, min_p=0.1, logprobs=True)] * 30
    tokens, logprobs = Sampler(params, range(30))(logits, 1)
    torch.testing.assert_close(logprobs, (logits / 0.8).log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    assert Sampler([SamplingParams(temperature=1.0)] * 30, range(30))(logits, 1)[1] is None


def test_a_draw_does_not_depend_on_its_row_nor_on_rows_that_left():
    logits = torch.randn(9, 30, generator=torch.Generator().manual_seed(8))
    params = [SamplingParams(**SETTINGS[i % 7]) for i in range(8)] + [SamplingParams()]
    seeds = list(range(50, 59))
    whole = Sampler(params, seeds)(logits, 4)[0]
    alone = torch.cat([Sampler([p], [s])(row[None], 4)[0] for p, s, row in zip(params, seeds, logits)])
    assert torch.equal(whole, alone)
    for rows in ([8, 2, 5], [8], [0], [3, 3, 1]):
        sampler = Sampler(params, seeds)
        sampler.keep(torch.tensor(rows))
        assert torch.equal(sampler(logits[rows], 4)[0], whole[rows])


def test_any_python_integer_is_a_seed():
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(8))
    params = [SamplingParams(temperature=1.0)]
    for seed in (-1, 2**63, 2**70 + 5):
        Sampler(params, [seed])(logits, 0)
    assert torch.equal(Sampler(params, [2**63 + 5])(logits, 0)[0], Sampler(params, [5])(logits, 0)[0])


@pytest.mark.parametrize("wrong", [
    dict(max_tokens=0), dict(temperature=-0.1), dict(temperature=math.nan), dict(temperature=math.inf), dict(top_k=0),
    dict(top_p=0.0), dict(top_p=1.1), dict(top_p=math.nan), dict(min_p=-0.1), dict(min_p=1.1), dict(n=0), dict(n=5000),
    dict(stop=("",)), dict(stop=tuple(map(str, range(17)))), dict(typical_p=0.0), dict(repetition_penalty=0.0), dict(presence_penalty=2.5),
    dict(frequency_penalty=math.nan), dict(logit_bias={-1: 1.0}), dict(logit_bias={3: math.inf}), dict(min_tokens=300), dict(stop_token_ids=[-1]),
    dict(best_of=1, n=2), dict(logprobs=101), dict(logprobs=-1), dict(prompt_logprobs=-1)], ids=str)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_stop_may_be_one_text_or_a_list():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
