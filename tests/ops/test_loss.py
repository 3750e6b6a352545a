"""Cross-entropy and token log-probabilities in chunks against PyTorch's own over all logits, values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from pellucid.ops import chunked_cross_entropy, cross_entropy_reference, token_logprobs

M, D, V = 23, 6, 17


def made(dtype=torch.float32, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(M, D, generator=g) * scale).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (M,), generator=g)
    labels[[0, 4, 5, M - 1]] = -100
    return hidden, weight, labels


def torchs_own(hidden, weight, labels):
    return F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")


def both(loss, parts):
    return loss, *torch.autograd.grad(3 * loss, parts)  # a factor upstream, as division by a token count is


def assert_same(got, want, atol=1e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=atol * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, M - 1, M, 100])
def test_any_chunk(chunk):
    hidden, weight, labels = made()
    want = both(torchs_own(hidden, weight, labels), (hidden, weight))
    assert_same(both(chunked_cross_entropy(hidden, weight, labels, chunk), (hidden, weight)), want)
    assert_same(both(cross_entropy_reference(hidden, weight, labels), (hidden, weight)), want)


@pytest.mark.parametrize("labelled", [[], [3], list(range(M))])
def test_none_one_and_all_labelled(labelled):
    hidden, weight, full = made()
    full = full.clamp_min(0)
    labels = torch.full_like(full, -100)
    labels[labelled] = full[labelled]
    got = both(chunked_cross_entropy(hidden, weight, labels, 4), (hidden, weight))
    if labelled:
        assert_same(got, both(torchs_own(hidden, weight, labels), (hidden, weight)))
    else:
        assert all(t.eq(0).all() for t in got)


def test_logits_so_large_that_probabilities_vanish():
    hidden, weight, labels = made(scale=300.0)
    want = both(torchs_own(hidden, weight, labels), (hidden, weight))
    assert want[0] / M > 200  # nats a token: exp(-200) is 0 in float32
    assert_same(both(chunked_cross_entropy(hidden, weight, labels, 4), (hidden, weight)), want)
    logp, _ = token_logprobs(hidden, weight, labels.clamp_min(0))
    assert logp.isfinite().all() and logp.min() < -1000


@pytest.mark.parametrize("gap", [30.0, 70.0, 87.0, 95.0, 103.0, 110.0])
def test_probabilities_at_the_edge_of_float32(gap):
    """From exp(-87) on, a probability has lost digits, and from exp(-104) on it is 0: its logarithm must not have."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[gap], [0.0]])
    assert chunked_cross_entropy(hidden, weight, torch.tensor([1])).item() == pytest.approx(gap, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_master_weights(dtype):
    """Activations in half precision, weights in float32: 1 % of the norm; the weight's gradient is float32."""
    hidden, weight, labels = made()
    half = hidden.detach().to(dtype).requires_grad_()
    got = both(chunked_cross_entropy(half, weight, labels, 5), (half, weight))
    assert (got[0].dtype, got[1].dtype, got[2].dtype) == (torch.float32, dtype, torch.float32)
    want = both(torchs_own(half, weight, labels), (half, weight))
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b.double()).norm() < 0.01 * b.norm()


def test_only_what_is_wanted():
    hidden, weight, labels = made()
    want = both(torchs_own(hidden, weight, labels), (hidden, weight))
    frozen = chunked_cross_entropy(hidden, weight.detach(), labels)
    torch.testing.assert_close(torch.autograd.grad(3 * frozen, hidden)[0], want[1])
    frozen = chunked_cross_entropy(hidden.detach(), weight, labels)
    torch.testing.assert_close(torch.autograd.grad(3 * frozen, weight)[0], want[2])
    with torch.no_grad():
        assert_same([chunked_cross_entropy(hidden, weight, labels)], want[:1])


@pytest.mark.parametrize("bad", [V, V + 100, -1, -99])
def test_a_label_outside_the_vocabulary_is_refused(bad):
    hidden, weight, labels = made()
    labels[7] = bad
    with pytest.raises(IndexError):
        chunked_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("chunk", [4, 256])
def test_token_logprobs_and_entropy(temperature, chunk, monkeypatch):
    monkeypatch.setattr("pellucid.ops.loss.rows_of_chunk", lambda vocab: chunk)
    hidden, weight, labels = made()
    tokens = labels.clamp_min(0)
    every = torch.log_softmax(hidden.double() @ weight.double().T / temperature, -1)
    want = every.gather(1, tokens[:, None]).squeeze(1)
    logp, entropy = token_logprobs(hidden, weight, tokens, temperature, entropy=True)
    torch.testing.assert_close(logp.double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), torch.distributions.Categorical(logits=every).entropy(), rtol=0, atol=1e-5)
    assert logp.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    assert token_logprobs(hidden, weight, tokens, temperature)[1] is None
    upstream = torch.randn(M)
    upstream[3:9] = 0  # tokens of the prompt
    got = torch.autograd.grad(logp, (hidden, weight), upstream)
    assert_same(got, torch.autograd.grad(want, (hidden, weight), upstream.double()))
    assert got[0][3:9].eq(0).all()


def test_no_gradient_no_work():
    hidden, weight, labels = made()
    logp, _ = token_logprobs(hidden, weight, labels.clamp_min(0))
    for grad in torch.autograd.grad(logp, (hidden, weight), torch.zeros(M)):
        assert grad.eq(0).all()


def test_certain_and_hidden_tokens():
    """A distribution with all weight on one token: probability 1, entropy 0, no NaN from 0 log 0."""
    weight = torch.tensor([[100.0], [-100.0], [-math.inf]])
    logp, entropy = token_logprobs(torch.ones(1, 1), weight, torch.tensor([0]), entropy=True)
    assert logp.item() == 0.0 and entropy.item() == 0.0


def test_both_functions_agree():
    hidden, weight, labels = made()
    kept = labels != -100
    logp, _ = token_logprobs(hidden[kept], weight, labels[kept])
    want = both(chunked_cross_entropy(hidden, weight, labels), (hidden, weight))
    assert_same(both(-logp.sum(), (hidden, weight)), want)


def test_gradients_by_finite_differences():
    hidden, weight, labels = made(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, labels, 4), (hidden, weight))
    tokens = labels.clamp_min(0)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, tokens, 0.8)[0], (hidden, weight))
