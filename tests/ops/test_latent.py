"""The two forms of latent attention against its equations, written head by head."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pellucid.ops import (
    attention,
    bias_of,
    choose_latent_attention,
    latent_attention,
    latent_attention_absorbed,
    latent_attention_expanded,
    latent_attention_reference,
)

FORMS = [latent_attention_expanded, latent_attention_absorbed, latent_attention]
SHAPES = [(2, 4, 7, 7), (2, 4, 1, 9), (2, 4, 3, 50), (1, 2, 70, 70), (1, 1, 1, 1)]  # B, H, T, S
n, r, c, e = 10, 8, 12, 14


def inputs(B, H, T, S, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, H, T, n), (B, H, T, r), (B, 1, S, c), (B, 1, S, r), (H, n + e, c)
    *rest, up = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    return [*rest, up / c**0.5]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.31])
def test_both_forms(form, shape, scale):
    x = inputs(*shape)
    want = latent_attention_reference(*x, scale=scale)
    assert want.shape == (*shape[:3], e) and (form(*x, scale=scale) - want).abs().max() < 1e-5


def test_the_equations_for_one_head_by_hand():
    q_nope, q_rope, latent, k_rope, up = inputs(1, 1, 2, 3, torch.float64)
    U, V = up[0, :n], up[0, n:]
    rows = []
    for t in range(2):  # the last query stands at the last key
        scores = [float((q_nope[0, 0, t] @ (U @ latent[0, 0, s]) + q_rope[0, 0, t] @ k_rope[0, 0, s]) / (n + r) ** 0.5)
                  for s in range(t + 2)]
        p = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
        rows.append(sum(p[s] * (V @ latent[0, 0, s]) for s in range(t + 2)))
    assert torch.allclose(latent_attention_reference(q_nope, q_rope, latent, k_rope, up)[0, 0], torch.stack(rows), atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks(form, shape):
    B, _, T, S = shape
    x = inputs(*shape)
    mask = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 0] = True
    want = latent_attention_reference(*x, mask=mask)
    assert (form(*x, mask=mask) - want).abs().max() < 1e-5
    assert (form(*x, mask=bias_of(mask, torch.float32)) - want).abs().max() < 1e-5
    mask[0] = False  # a bool mask may leave a query nothing
    assert form(*x, mask=mask)[0].eq(0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_gradients(form, shape):
    x = [t.requires_grad_() for t in inputs(*shape, torch.float64)]
    g = torch.randn(*shape[:3], e, dtype=torch.float64)
    got, want = (torch.autograd.grad((f(*x) * g).sum(), x) for f in (form, latent_attention_reference))
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-9


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 5])
def test_half_precision_and_a_narrower_cache(form, T):
    x = inputs(2, 4, T, 20)
    want = latent_attention_reference(*x)
    low = form(*(t.bfloat16() for t in x))
    mixed = form(x[0], x[1], x[2].bfloat16(), x[3].bfloat16(), x[4])
    assert low.dtype == torch.bfloat16 and mixed.dtype == torch.float32
    for got in (low.float(), mixed):
        assert 0 < (got - want).norm() < 0.03 * want.norm()


def test_no_heads_of_keys_are_made_when_decoding():
    """A step against a long cache makes nothing of H x S x (n + e) numbers."""
    x = inputs(1, 4, 1, 4000)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.untyped_storage().nbytes() // 4)
            return out

    with Watch():
        latent_attention(*x)
    assert 4 * 4000 <= max(largest) < 4 * 4000 * (n + e)


def test_the_choice():
    v3 = 128, 64, 512, 128
    assert choose_latent_attention(1, 4096, *v3)[0] == choose_latent_attention(16, 4096, *v3)[0] == "absorbed"
    assert choose_latent_attention(4096, 4096, *v3)[0] == choose_latent_attention(512, 4096, *v3)[0] == "expanded"
    assert choose_latent_attention(1, 1, *v3)[0] == "expanded"
    assert "1 queries, 4096 keys: absorbed multiplies 0.01 times" in choose_latent_attention(1, 4096, *v3)[1]


@pytest.mark.parametrize("T", [1, 3, 70])
def test_attention_takes_values_of_another_width(T):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, width, generator=g) for heads, length, width in ((4, T, 6), (2, 80, 6), (2, 80, 10)))
    scores = (q @ k.repeat_interleave(2, 1).mT) / 6**0.5
    scores = scores.masked_fill(torch.ones(T, 80, dtype=torch.bool).triu(80 - T + 1), -torch.inf)
    assert (attention(q, k, v) - scores.softmax(-1) @ v.repeat_interleave(2, 1)).abs().max() < 1e-5
