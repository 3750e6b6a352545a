"""The gated delta rule: both forms against transformers' two, and against each other where transformers has no such case."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from pellucid.ops import (
    causal_conv,
    choose_gated_delta,
    gated_delta,
    gated_delta_chunked,
    gated_delta_reference,
    l2_norm,
)

FORMS = {"reference": gated_delta_reference, "chunked": gated_delta_chunked, "chosen": gated_delta}
NAMES = ("q", "k", "v", "g", "beta", "state")


def inputs(T, B=2, K=2, H=6, d=8, e=12, seed=0, dtype=torch.float32, decay=1.0):
    """q and k as the block makes them, decays from nearly none to nearly all."""
    g = torch.Generator().manual_seed(seed)
    q, k, v, state = (torch.randn(B, *shape, generator=g, dtype=dtype) for shape in ((K, T, d), (K, T, d), (H, T, e), (H, d, e)))
    rates = torch.linspace(0.01, 2, H, dtype=dtype)[:, None] * torch.rand(B, H, T, generator=g, dtype=dtype)
    beta = torch.rand(B, H, T, generator=g, dtype=dtype)
    return {"q": l2_norm(q) * d**-0.5, "k": l2_norm(k), "v": v, "g": -decay * rates, "beta": beta, "state": state}


def close(got, want, limit=2e-6):
    worst = (got - want).abs().max().item()
    assert worst <= limit * max(1.0, want.abs().max().item()), f"differs by {worst:.1e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reference", ["chunk", "recurrent"])
@pytest.mark.parametrize("T", [1, 5, 63, 64, 65, 200])
@pytest.mark.parametrize("filled", [False, True])
def test_against_transformers(form, reference, T, filled):
    x = inputs(T)
    if not filled:
        x["state"] = None
    ours, state = FORMS[form](*x.values())
    function = getattr(theirs, f"torch_{reference}_gated_delta_rule")
    want, final = function(*(x[n].transpose(1, 2) for n in NAMES[:3]), g=x["g"].mT, beta=x["beta"].mT, initial_state=x["state"],
                           output_final_state=True)
    close(ours, want.transpose(1, 2) * 8**0.5)  # theirs divides q by the root once more
    close(state, final)


@pytest.mark.parametrize("T", [7, 130])
def test_gradients_against_transformers(T):
    x = {name: t.requires_grad_() for name, t in inputs(T).items()}
    want, final = theirs.torch_recurrent_gated_delta_rule(
        *(x[n].transpose(1, 2) for n in NAMES[:3]), g=x["g"].mT, beta=x["beta"].mT, initial_state=x["state"], output_final_state=True)
    weight, of_state = torch.randn(want.shape), torch.randn(final.shape)
    wanted = torch.autograd.grad((want * weight).sum() * 8**0.5 + (final * of_state).sum(), list(x.values()))
    for form in (gated_delta_reference, gated_delta_chunked):
        ours, state = form(*x.values())
        got = torch.autograd.grad((ours.transpose(1, 2) * weight).sum() + (state * of_state).sum(), list(x.values()))
        for name, a, b in zip(NAMES, got, wanted, strict=True):
            assert b.abs().max() > 1e-3, name
            close(a, b, 1e-5)


def test_gradients_by_differences():
    x = [t.requires_grad_() for t in inputs(9, B=1, K=1, H=2, d=3, e=4, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *a: gated_delta_chunked(*a, chunk=4), x)


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_chunks_of_any_length_and_calls_in_pieces(chunk):
    x = inputs(90)
    want, final = gated_delta_reference(*x.values())
    got, state = gated_delta_chunked(*x.values(), chunk=chunk)
    close(got, want)
    close(state, final)
    state, parts = x["state"], []
    for start, stop in ((0, 33), (33, 34), (34, 90)):
        part, state = gated_delta(*(x[n][:, :, start:stop] for n in NAMES[:5]), state)
        parts.append(part)
    close(torch.cat(parts, 2), want)
    close(state, final)


@pytest.mark.parametrize("form", FORMS)
def test_documents_are_as_if_alone(form):
    """Borders within a chunk, at its edge, one token after another, and an id that comes again."""
    x, documents = inputs(150), torch.zeros(2, 150, dtype=torch.int64)
    cuts = ([0, 5, 6, 64, 70, 128, 150], [0, 10, 140, 150])
    for row, borders in enumerate(cuts):
        for i, (a, b) in enumerate(pairwise(borders)):
            documents[row, a:b] = (3, 1, 3, 7, 2, 7)[i]
    x["state"] = None
    got, state = FORMS[form](*x.values(), documents=documents)
    for row, borders in enumerate(cuts):
        for a, b in pairwise(borders):
            alone, last = gated_delta_reference(*(x[n][row : row + 1, :, a:b] for n in NAMES[:5]))
            close(got[row, :, a:b], alone[0])
        close(state[row], last[0])
    assert (got - FORMS[form](*x.values())[0]).abs().max() > 0.1


def test_strong_decay_neither_overflows_nor_makes_nan():
    x = {name: t.requires_grad_() for name, t in inputs(128, decay=60.0).items()}
    got, state = gated_delta_chunked(*x.values())
    close(got, gated_delta_reference(*x.values())[0])
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.sum() + state.sum(), list(x.values())))


def test_half_precision_keeps_a_wide_state():
    x = inputs(70)
    want, final = gated_delta_reference(*x.values())
    narrow = [x[n].bfloat16() for n in NAMES[:3]]
    for form in FORMS.values():
        got, state = form(*narrow, x["g"], x["beta"], x["state"])
        assert got.dtype == torch.bfloat16 and state.dtype == torch.float32
        assert (got.float() - want).norm() < 0.02 * want.norm() and (state - final).norm() < 0.02 * final.norm()


def test_the_choice():
    assert choose_gated_delta(1)[0] == "reference" and choose_gated_delta(2)[0] == "chunked"


def test_l2_norm():
    x = torch.linspace(-1, 1, 15).view(3, 5) * 1e-3  # small enough for the place of eps to matter
    assert torch.equal(l2_norm(x), theirs.l2norm(x))
    assert (l2_norm(x) - F.normalize(x, dim=-1)).abs().max() > 0.1


@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 2, 30])
def test_convolution(W, T):
    """Against conv1d, whole and in pieces."""
    x, weight, before = torch.randn(2, T, 6), torch.randn(6, W), torch.randn(2, W - 1, 6)
    padded = torch.cat((before, x), 1)
    want = F.conv1d(padded.mT, weight[:, None], groups=6).mT
    got, kept = causal_conv(x, weight, before)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(kept, padded[:, T:])
    torch.testing.assert_close(causal_conv(x, weight)[0], F.conv1d(F.pad(x.mT, (W - 1, 0)), weight[:, None], groups=6).mT,
                               rtol=1e-5, atol=1e-6)
    first, kept = causal_conv(x[:, : T // 2 + 1], weight, before)
    torch.testing.assert_close(torch.cat((first, causal_conv(x[:, T // 2 + 1 :], weight, kept)[0]), 1), want, rtol=1e-5, atol=1e-6)


def test_convolution_of_documents():
    x, weight = torch.randn(1, 12, 6), torch.randn(6, 4)
    documents = torch.tensor([[5] * 2 + [1] + [5] * 4 + [2] * 5])
    got, _ = causal_conv(x, weight, documents=documents)
    for a, b in ((0, 2), (2, 3), (3, 7), (7, 12)):
        torch.testing.assert_close(got[:, a:b], causal_conv(x[:, a:b], weight)[0])
