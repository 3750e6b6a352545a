"""Every compiled training kernel, forward and backward, against its readable twin in float64 (which no kernel serves)."""

import itertools
import os
import threading

import pytest
import torch

from pellucid.ops import (
    choose_jit,
    chunked_cross_entropy,
    cross_entropy_reference,
    qkv_heads,
    qkv_heads_reference,
    rms_norm,
    rms_norm_reference,
    rope_angles,
    rope_frequencies,
    swiglu,
    swiglu_reference,
    token_logprobs,
)
from pellucid.ops.compiled import jit_serves
from pellucid.ops.loss import _logprobs_and_entropies, _losses_and_gradient

pytestmark = pytest.mark.skipif(not choose_jit().value, reason=choose_jit().reason)
DTYPES = (torch.float32, torch.bfloat16)
PRECISION = {torch.float32: 2e-6, torch.bfloat16: 6e-3}  # of the norm: a few roundings of 2^-24 and 2^-9


def random(shape, dtype, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def with_gradients(f, inputs):
    """f's outputs and the gradients of its inputs, under upstream gradients that look the same in every precision."""
    out = f(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [random(o.shape, torch.bfloat16, seed=7 + i).detach().to(o.dtype) for i, o in enumerate(out)]
    return *out, *torch.autograd.grad(out, inputs, upstream)


def assert_equal_to_twin(f, twin, inputs, factor=1.0):
    """Within the dtype's precision, relative to the norm of each result; and without gradients bit for bit the same."""
    assert jit_serves(inputs[0])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got = with_gradients(f, inputs)
    for a, b in zip(got, with_gradients(twin, wide), strict=True):
        assert a.dtype in (inputs[0].dtype, torch.float32) and a.shape == b.shape and a.isfinite().all()
        assert (a.double() - b).norm() <= factor * PRECISION[inputs[0].dtype] * b.norm() + 1e-30
    again = with_gradients(f, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    with torch.no_grad():
        alone = f(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(alone if isinstance(alone, tuple) else (alone,), got, strict=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_norm(dtype, scale):
    for shape, weight in (((1, 2), (2,)), ((7, 33), (33,)), ((3, 5, 128), (128,)), ((2, 50, 3, 17), (3, 17)), ((101, 40), (40,))):
        f = lambda x, w: rms_norm(x, w, 1e-6)
        assert_equal_to_twin(f, lambda x, w: rms_norm_reference(x, w, 1e-6), [random(shape, dtype, scale), random(weight, dtype, seed=1)], 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_gate(dtype, scale):
    for shape in ((1, 2), (9, 34), (2, 3, 256), (5, 770)):
        assert_equal_to_twin(swiglu, swiglu_reference, [random(shape, dtype, scale)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False])
def test_heads(dtype, norm):
    for B, T, H, K, d, r, rows in ((1, 1, 1, 1, 2, 2, 1), (2, 37, 4, 2, 32, 32, 1), (3, 5, 3, 1, 18, 10, 3), (1, 65, 2, 2, 64, 64, 1)):
        positions = torch.arange(rows * T).view(rows, T) * 3  # other angles in every row of the batch
        cos, sin = rope_angles(positions, rope_frequencies(r, 1e4), dtype)
        weights = [random((d,), torch.float32, seed=1), random((d,), torch.float32, seed=2)] if norm else []

        def turned(f, c, s, H=H):
            return lambda qkv, *norms: f(qkv, H, c, s, norms or None, 1e-5)

        inputs = [random((B, T, H + 2 * K, d), dtype, 3.0), *weights]
        assert_equal_to_twin(turned(qkv_heads, cos, sin), turned(qkv_heads_reference, cos.double(), sin.double()), inputs, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 5, 64, 203])
def test_cross_entropy_of_logits(dtype, V):
    """An identity as head: the logits themselves, up to +-400, some of them -inf."""

    for M in (1, 2, 77):
        logits, labels = random((M, V), dtype, 100.0).detach(), torch.arange(M) % V
        if V > 3:
            logits[:, 1] = -torch.inf
            labels[labels == 1] = 0
        want = torch.log_softmax(logits.double(), -1)
        rows = torch.arange(M)
        losses, gradient = _losses_and_gradient(logits.clone(), labels)
        torch.testing.assert_close(losses.double(), -want[rows, labels], rtol=1e-6, atol=2e-6)
        P = want.exp()
        P[rows, labels] -= 1
        torch.testing.assert_close(gradient.double(), P, rtol=0, atol=2e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype):
    for M, D, V in ((1, 3, 2), (33, 16, 70), (300, 24, 129)):
        labels = torch.arange(M) * 7 % V
        labels[3::5] = -100
        inputs = [random((M, D), dtype), random((V, D), dtype, seed=1)]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        want = cross_entropy_reference(*wide, labels)
        got = chunked_cross_entropy(*inputs, labels, 64)
        assert (got.double() - want).abs() <= PRECISION[dtype] * want.abs() + 1e-6
        for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, wide), strict=True):
            assert (a.double() - b).norm() <= 2 * PRECISION[dtype] * b.norm()
    with pytest.raises(IndexError):
        chunked_cross_entropy(*inputs, torch.full((M,), V))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_log_probabilities_and_entropies(dtype, temperature):
    for (M, V), scale in itertools.product(((1, 1), (3, 2), (40, 70), (257, 1000)), (1e-3, 1.0, 30.0)):
        logits, labels = random((M, V), dtype, scale).detach(), torch.arange(M) * 7 % V
        if V > 3:
            logits[:, 1] = -torch.inf
            logits[0, 2] = 200.0
            labels[labels == 1] = 0
        want = torch.log_softmax(logits.double() / temperature, -1)
        before = logits.clone()
        logp, entropy = _logprobs_and_entropies(logits, labels, temperature)
        assert torch.equal(logits, before) and logp.dtype == entropy.dtype == torch.float32
        torch.testing.assert_close(logp.double(), want.gather(1, labels[:, None])[:, 0], rtol=1e-6, atol=3e-6)
        torch.testing.assert_close(entropy.double(), torch.special.entr(want.exp()).sum(-1), rtol=3e-6, atol=3e-6)
    logits[5, 9] = torch.nan
    logp, entropy = _logprobs_and_entropies(logits, labels, temperature)
    assert logp[5].isnan() and entropy[5].isnan() and int(logp.isnan().sum()) == int(entropy.isnan().sum()) == 1
    for bad in (-1, V):
        with pytest.raises(IndexError):
            _logprobs_and_entropies(logits, torch.full((M,), bad), temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_logprobs(dtype):
    """Gradients too, against PyTorch in float64."""
    M, D, V = 300, 24, 129
    inputs, tokens = [random((M, D), dtype), random((V, D), dtype, seed=1)], torch.arange(M) * 7 % V
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want = torch.log_softmax(wide[0] @ wide[1].T / 0.7, -1).gather(1, tokens[:, None])[:, 0]
    got, _ = token_logprobs(*inputs, tokens, 0.7, entropy=True)
    assert (got.double() - want).norm() <= PRECISION[dtype] * want.norm()
    upstream = random((M,), torch.bfloat16, seed=5).detach()
    for a, b in zip(torch.autograd.grad(got, inputs, upstream.float()), torch.autograd.grad(want, wide, upstream.double()), strict=True):
        assert (a.double() - b).norm() <= 3 * PRECISION[dtype] * b.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_inputs_and_gradients(dtype):
    """Views that are not contiguous, and gradients that are expanded or transposed."""
    x, w = random((6, 5, 24), dtype), random((12,), dtype, seed=1)
    part = lambda x: x.transpose(0, 1)[..., ::2]
    g = random((6, 5), dtype, seed=3).detach().T[..., None].expand(5, 6, 12)
    for f, twin, width in ((lambda x, w: rms_norm(x, w), lambda x, w: rms_norm_reference(x, w), 12),
                           (lambda x, w: swiglu(x), lambda x, w: swiglu_reference(x), 6)):
        (dx,) = torch.autograd.grad(f(part(x), w), x, g[..., :width])
        wide = x.detach().double().requires_grad_()
        (want,) = torch.autograd.grad(twin(part(wide), w.detach().double()), wide, g[..., :width].double())
        assert (dx.double() - want).norm() <= 2 * PRECISION[dtype] * want.norm()


def test_a_nan_is_not_hidden():
    x = torch.randn(4, 16)
    x[2, 3] = torch.nan
    assert rms_norm(x, torch.ones(16))[2].isnan().all() and not rms_norm(x, torch.ones(16))[1].isnan().any()
    assert swiglu(x)[2, 3].isnan() and swiglu(x)[1].isfinite().all()
    assert chunked_cross_entropy(x, torch.randn(9, 16), torch.tensor([1, 2, 3, 4])).isnan()


def test_what_the_kernels_leave_to_pytorch():
    x = torch.randn(3, 8)
    assert jit_serves(x)
    others = (x.double(), x.half(), x[:0], x.to("meta"))
    assert not any(jit_serves(y) for y in others) and not jit_serves(x, x.bfloat16())
    assert rms_norm(x[:0], torch.ones(8)).shape == (0, 8) and swiglu(x[:0]).shape == (0, 4)


def test_inference_mode_and_threads():
    """The same bits from any number of threads, and from several Python threads at once; PyTorch's number stays."""
    x, w = random((257, 96), torch.float32), random((96,), torch.float32, seed=1)
    run = lambda: with_gradients(lambda x, w: swiglu(rms_norm(x, w)), [x, w])
    want, before, found = run(), torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        alone = run()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    workers = [threading.Thread(target=lambda: found.append([run() for _ in range(20)])) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for got in (alone, *(got for worker in found for got in worker)):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.inference_mode():
        assert torch.equal(swiglu(rms_norm(x, w)), want[0])


def test_a_forked_process_does_without():
    """numba ends a child whose parent's OpenMP threads it would need: the child takes PyTorch's operators."""
    x = torch.randn(4, 16)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's own threads do not survive a fork either
    want = swiglu(x)
    child = os.fork()
    if not child:
        os._exit(0 if not choose_jit().value and torch.allclose(swiglu(x), want, atol=1e-6) else 1)
    torch.set_num_threads(before)
    assert os.waitpid(child, 0)[1] == 0 and choose_jit().value
