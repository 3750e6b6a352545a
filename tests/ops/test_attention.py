"""Attention: the formula against plain loops, and every fast twin against the formula, forward and backward."""

import itertools
import math
import sys

import pytest
import torch

from pellucid import ops
from pellucid.ops import (
    attention,
    attention_one_query,
    attention_reference,
    attention_sdpa,
    attention_tiled,
    choose_attention,
    tiles,
    visible,
)

TWINS = {"sdpa": attention_sdpa, "tiled": attention_tiled, "chosen": attention}
SHAPES = {  # B, H, K, T, S, d
    "gqa": (2, 4, 2, 7, 7, 8),
    "mqa, longer keys": (1, 6, 1, 5, 9, 4),
    "mha, two tiles": (1, 2, 2, 70, 70, 8),
    "odd tiles, longer keys": (2, 4, 2, 131, 150, 4),
    "one query": (3, 4, 2, 1, 13, 8),
    "one of everything": (1, 1, 1, 1, 1, 2),
}


def made(B, H, K, T, S, d, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T, d), (B, K, S, d), (B, K, S, d))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def masks(B, T, S):
    """Name -> mask: bool ones (one with blind queries), and float biases in which every query sees something."""
    g = torch.Generator().manual_seed(1)
    documents = torch.randint(0, 3, (B, S), generator=g).sort(-1).values
    same = documents[:, None, S - T :, None] == documents[:, None, None, :] if S >= T else None
    keys = torch.ones(B, 1, 1, S, dtype=torch.bool)
    keys[0, ..., : S // 2] = False
    slopes = -0.3 * (torch.arange(S - T, S)[:, None] - torch.arange(S)).abs().float()[None, None]
    yield "none", None
    yield "left padding", keys  # with causality the first queries of row 0 see nothing
    yield "nothing at all", torch.zeros(B, 1, T, S, dtype=torch.bool)
    yield "bias", slopes
    if same is not None:
        yield "documents", same
        yield "documents as bias", ops.bias_of(same, torch.float32)


def both(f, qkv, **keywords):
    """Output and gradients of f under a fixed random upstream gradient."""
    out = f(*qkv, **keywords)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad(out, qkv, upstream)


def assert_same(got, want, atol=1e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=atol * max(1.0, b.abs().max().item()))


def by_loops(q, k, v, mask, window, causal, scale):
    """One query, one key, one number at a time."""
    (B, H, T, d), (K, S) = q.shape, k.shape[1:3]
    out = torch.zeros(B, H, T, d, dtype=q.dtype)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        at = S - T + t
        seen = [j for j in range(S) if not (causal and j > at) and not (window and j <= at - window)
                and (mask is None or mask.expand(B, 1, T, S)[b, 0, t, j])]
        scores = [sum(float(q[b, h, t, i] * k[b, h // (H // K), j, i]) for i in range(d)) * scale for j in seen]
        if seen:
            m = max(scores)
            weights = [math.exp(s - m) for s in scores]
            for w, j in zip(weights, seen, strict=True):
                out[b, h, t] += w / sum(weights) * v[b, h // (H // K), j]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2])
def test_reference_against_plain_loops(causal, window):
    for T, S in ((4, 4), (3, 6), (5, 3)):
        q, k, v = (x.detach() for x in made(2, 4, 2, T, S, 3, torch.float64))
        for name, mask in masks(2, T, S):
            if mask is None or mask.dtype == torch.bool:
                want = by_loops(q, k, v, mask, window, causal, 0.7)
                got = attention_reference(q, k, v, causal=causal, mask=mask, window=window, scale=0.7)
                torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)
def test_twins_equal_the_reference(twin, shape):
    qkv = made(*shape)
    for (_, mask), causal, window in itertools.product(masks(shape[0], *shape[3:5]), (True, False), (None, 3)):
        if mask is not None and mask.dtype != torch.bool and "documents" in _ and (window or not causal):
            continue  # a float bias has to leave every query something
        keywords = {"causal": causal, "mask": mask, "window": window}
        assert_same(both(twin, qkv, **keywords), both(attention_reference, qkv, **keywords))


@pytest.mark.parametrize("twin", [attention_sdpa, attention_tiled], ids=["sdpa", "tiled"])
def test_more_queries_than_keys(twin):
    """Bottom-right causality leaves the first T - S queries nothing to see."""
    qkv = made(1, 2, 1, 70, 66, 4)
    want = both(attention_reference, qkv)
    assert want[0][:, :, :4].eq(0).all()
    assert_same(both(twin, qkv), want)
    assert_same(both(twin, qkv, window=5), both(attention_reference, qkv, window=5))


def test_one_query():
    for B, H, K, S, d in ((3, 4, 2, 13, 8), (1, 3, 1, 1, 4)):
        qkv = made(B, H, K, 1, S, d)
        for (_, mask), window in itertools.product(masks(B, 1, S), (None, 1, 4)):
            if mask is not None and mask.dtype != torch.bool and window:
                continue
            keywords = {"mask": mask, "window": window, "scale": 0.4}
            assert_same(both(attention_one_query, qkv, **keywords), both(attention_reference, qkv, **keywords))


@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)
def test_every_keyword_changes_the_result(twin):
    """An argument that a fast path ignores would pass a test in which it makes no difference."""
    qkv = made(2, 4, 2, 70, 70, 8)
    plain = twin(*qkv)
    mask = torch.ones(2, 1, 70, 70, dtype=torch.bool)
    mask[1, :, 50:, 20] = False
    for keywords in ({"causal": False}, {"window": 60}, {"scale": 0.5}, {"mask": mask}, {"mask": mask.float() * 3}):
        changed = twin(*qkv, **keywords)
        assert (changed - plain).abs().max() > 1e-3, keywords
        assert_same([changed], [attention_reference(*qkv, **keywords)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """float64 to 1e-12; half precisions within 3 % of the norm (their scores and probabilities are rounded)."""
    qkv = made(2, 4, 2, 70, 70, 16, dtype)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    mask = ops.bias_of(torch.ones(70, 70).tril(-3).bool()[None, None], dtype)
    want = both(attention_reference, wide, mask=mask.double())
    for twin in (attention_tiled, attention):
        for a, b in zip(both(twin, qkv, mask=mask), want, strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).norm() < (1e-12 if dtype == torch.float64 else 0.03) * b.norm()


def test_tiled_gradients_by_finite_differences():
    q, k, v = made(1, 2, 1, 66, 67, 2, torch.float64)
    k, v = (x.detach()[..., :1].repeat(1, 1, 1, 2).requires_grad_() for x in (k, v))
    assert torch.autograd.gradcheck(lambda *x: attention_tiled(*x, scale=0.9), (q, k, v), fast_mode=True)


def test_views_of_a_longer_cache():
    """Keys and values as the cache hands them out: slices whose storage goes on behind them, full of NaN."""
    q, k, v = (x.detach() for x in made(2, 4, 2, 5, 9, 8))
    room = torch.full((2, 2, 2, 20, 8), math.nan)
    room[0, :, :, :9], room[1, :, :, :9] = k, v
    for queries in (q, q[:, :, -1:]):
        want = attention_reference(queries, k, v)
        assert_same([attention(queries, room[0, :, :, :9], room[1, :, :, :9])], [want])


def test_a_nan_is_not_hidden():
    q, k, v = (x.detach() for x in made(1, 2, 1, 6, 6, 4))
    q[0, 0, 3] = math.nan
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    for twin in TWINS.values():
        out = twin(q, k, v, mask=mask)
        assert out[0, 0, 3].isnan().all() and not out[0, 1].isnan().any()


def test_the_choice_and_its_reason(monkeypatch):
    q, k, _ = made(1, 2, 1, 70, 70, 4)
    assert choose_attention(q, k)[0] == "tiled"
    assert choose_attention(q[:, :, :1], k)[0] == "one_query"
    monkeypatch.setattr(sys.modules[choose_attention.__module__], "SAVED_LIMIT", 1000)
    name, why = choose_attention(q, k)
    assert name == "sdpa" and "MiB" in why
    assert_same(both(attention, made(1, 2, 1, 70, 70, 4)), both(attention_reference, made(1, 2, 1, 70, 70, 4)))
    assert choose_attention(q.to("meta"), k.to("meta"))[0] == "sdpa"


def test_visible_by_hand():
    assert visible(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible(2, 4, window=2).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert visible(3, 2).int().tolist() == [[0, 0], [1, 0], [1, 1]]
    assert visible(2, 3, causal=False, window=1).int().tolist() == [[0, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_sinks(shape, window, causal):
    """A logit of each head in the softmax: its gradient too, in every group of heads, for one query and for many."""
    B, H, K, T, S, d = SHAPES[shape]
    qkv = made(B, H, K, T, S, d)
    sinks = torch.linspace(-1, 2, H).requires_grad_()
    for name, mask in masks(B, T, S):
        if name == "bias" and window is not None:
            continue  # a query may see nothing then
        want = both(lambda q, k, v, sinks, mask=mask: attention_reference(q, k, v, sinks=sinks, mask=mask, window=window, causal=causal), [*qkv, sinks])
        got = both(lambda q, k, v, sinks, mask=mask: attention(q, k, v, sinks=sinks, mask=mask, window=window, causal=causal), [*qkv, sinks])
        for what, a, b in zip(("out", "q", "k", "v", "sinks"), got, want, strict=True):
            assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item()), (name, what)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_keys_that_a_tile_does_not_see_are_not_read(B, causal, monkeypatch):
    """A text with continuations behind it, of which none sees another: some tiles see few keys."""
    T = 330
    q, k, v = made(B, 4, 2, T, T, 8)
    bounds = torch.tensor([[50, 120, 200, 320], [40, 170, 230, 300], [70, 110, 220, 329]])[:B]
    piece = (torch.arange(T) >= bounds[..., None]).sum(1)  # 0: the text
    seen = ((piece[:, :, None] == piece[:, None, :]) | (piece[:, None, :] == 0)) & torch.ones(T, T).tril().bool()
    bias = ops.bias_of(seen[:, None], q.dtype)
    reads, read = [], tiles._read
    monkeypatch.setattr(tiles, "_read", lambda x, low, high, seen: reads.append((high - low, seen)) or read(x, low, high, seen))
    got = both(attention_tiled, (q, k, v), mask=bias, causal=causal)
    for a, b in zip(got, both(attention_reference, (q, k, v), mask=bias), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    few = [len(seen) / width for width, seen in reads if seen is not None]
    assert len(few) >= 8 and max(few) <= tiles.WORTH if causal else not few  # k and v, each way, of two tiles or more
