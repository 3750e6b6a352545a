"""RMSNorm against transformers' LlamaRMSNorm, forward and backward, including where it rounds."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pellucid.ops import rms_norm, rms_norm_reference


def inputs(shape, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=g) * 3).to(dtype).requires_grad_()
    weight = (torch.randn(shape[-1], generator=g) + 1).to(dtype).requires_grad_()
    return x, weight, torch.randn(shape, generator=g).to(dtype)


def llama(x, weight, eps):
    norm = LlamaRMSNorm(x.shape[-1], eps).to(x.dtype)
    norm.weight = torch.nn.Parameter(weight.detach().clone())
    return norm(x), norm.weight


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 33), (1, 1), (2, 3, 4, 16), (7, 128)])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_float32_forward_and_backward(shape, eps):
    x, weight, g = inputs(shape, torch.float32)
    for f in (rms_norm, rms_norm_reference):
        theirs, their_weight = llama(x, weight, eps)
        dx, dw = torch.autograd.grad(theirs, (x, their_weight), g)
        y = f(x, weight, eps)
        got = y, *torch.autograd.grad(y, (x, weight), g)
        for a, b in zip(got, (theirs, dx, dw), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(f(x, weight, eps), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_where_llama_rounds(dtype):
    """Cast first, weight second. Statistics may differ in their last bit, so a few results may round the other way;
    with the weight applied before the cast, about a third would differ."""
    x, weight, g = inputs((64, 96), dtype)
    theirs, their_weight = llama(x, weight, 1e-6)
    y = rms_norm(x, weight)
    assert y.dtype == dtype
    assert (y == theirs).float().mean() > 0.99
    h = x.detach().float()
    weight_first = (weight.float() * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
    assert (weight_first == theirs).float().mean() < 0.9
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight), y)
        assert (rms_norm_reference(x, weight) == theirs).float().mean() > 0.99
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = torch.autograd.grad(rms_norm_reference(*wide), wide, g.double())
    ours = torch.autograd.grad(y, (x, weight), g)
    llamas = torch.autograd.grad(theirs, (x, their_weight), g)
    for a, b, t in zip(ours, llamas, truth, strict=True):  # no worse than autograd through the reference
        assert (a.double() - t).norm() < 1.1 * (b.double() - t).norm() + 1e-3 * t.norm()


def test_a_weight_for_each_head():
    x, _, g = inputs((2, 5, 3, 8), torch.float32)
    weight = torch.randn(3, 8, requires_grad=True)
    for f in (rms_norm, rms_norm_reference):
        heads = [f(x[:, :, h], weight[h]) for h in range(3)]
        want = torch.stack(heads, 2)
        dx, dw = torch.autograd.grad(want, (x, weight), g)
        y = f(x, weight)
        for a, b in zip((y, *torch.autograd.grad(y, (x, weight), g)), (want, dx, dw), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(f(x, weight), want, rtol=1e-5, atol=1e-5)


def test_gradients_by_finite_differences():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))
    heads = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (heads, torch.randn(3, 4).double().requires_grad_()))


def test_gradient_is_not_written_over():
    """The backward pass works in place; it must not do so in the gradient that others still read."""
    x, weight, g = inputs((4, 6), torch.float32)
    kept = g.clone()
    torch.autograd.grad(rms_norm(x, weight), (x, weight), g)
    assert torch.equal(g, kept)


def test_zero_rows_and_views():
    x, weight, g = inputs((4, 2, 12), torch.float32)
    with torch.no_grad():
        x[1] = 0
    part = x[:, :, 3:9]
    for a, b in zip(*(torch.autograd.grad(f(part, weight[:6]), (x, weight), g[..., :6]) for f in (rms_norm, rms_norm_reference))):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
