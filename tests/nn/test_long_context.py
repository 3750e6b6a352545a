"""StreamingLLM and dual chunk attention against their definitions, computed the slow way: a matrix of relative positions, and a list
of tokens from which the oldest is thrown out. No library has them to compare with."""

import math
from dataclasses import replace

import pytest
import torch
from small_specs import assert_equal, spec, tokens

from pellucid.errors import BadInput
from pellucid.models.long_context import with_dual_chunk, with_rings, with_rope_scaling, with_streaming
from pellucid.nn import GDN, MLA, Attn, Decoder, KVCache, Rope, count_parameters
from pellucid.nn.build import build
from pellucid.nn.context import Context, open_context
from pellucid.nn.count import cache_shapes, count
from pellucid.nn.site import Site
from pellucid.nn.specs import DualChunk, Streaming
from pellucid.ops import attention_of_versions, attention_reference

BASE = Attn(4, 2, 12, Rope(8, 50.0), qkv_bias=True, qk_norm=True, scale=0.4, sinks=True)


def filled(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_((1 if "norm" in name else 0) + 0.4 * torch.randn(p.shape, generator=g))
    return module.eval()


def block(attn):
    return filled(build(attn, Site(24, 1e-6, "rms")))


def run(mixer, x, cache=None):
    return mixer(x, open_context(x, x.dtype, cache=cache))


def by_matrix(mixer, x, M, seen):
    """softmax(R(M[i][j]) q_i . k_j) v in float64, for every pair by itself. M, seen (T, T)."""
    T, (H, d, r) = x.shape[1], (4, 12, 8)
    q, k, v, _ = mixer.heads(x, open_context(x, x.dtype), None, None)
    q, k, v = (t[0].double() for t in (q, k, v))
    angle = M[..., None] * 50.0 ** (-torch.arange(0, r, 2).double() / r)  # (T, T, r / 2)
    cos, sin = angle.cos(), angle.sin()
    out = torch.zeros(H, T, d).double()
    for h in range(H):
        a, b, rest = q[h, :, : r // 2], q[h, :, r // 2 : r], q[h, :, r:]
        c, e, other = (t[None] for t in (k[h // 2, :, : r // 2], k[h // 2, :, r // 2 : r], k[h // 2, :, r:]))
        turned_a, turned_b = a[:, None] * cos - b[:, None] * sin, a[:, None] * sin + b[:, None] * cos
        scores = ((turned_a * c + turned_b * e).sum(-1) + (rest[:, None] * other).sum(-1)) * 0.4
        scores = torch.cat((scores.masked_fill(~seen, -torch.inf), mixer.sinks[h].double().expand(T, 1)), 1)
        out[h] = scores.softmax(-1)[:, :T] @ v[h // 2]
    return mixer.o(out.transpose(0, 1).reshape(1, T, H * d).float())


def chunk_matrix(T, size, local):
    """Section 3 of the paper, entry by entry: s chunk size, c the trained context, w = c - s the local window."""
    c, w = size, local
    s = c - w
    M = torch.zeros(T, T).double()
    for i in range(T):
        for j in range(i + 1):
            key = j % s
            if i // s == j // s:
                query = i % s
            elif i // s == j // s + 1:
                query = s + i % s if i % s < w else c - 1
            else:
                query = c - 1
            M[i, j] = query - key
    return M


@pytest.mark.parametrize(("size", "local"), [(16, 4), (16, 0), (9, 4), (12, 6), (64, 16), (100, 50)])
@torch.no_grad()
def test_dual_chunk_by_the_matrix_of_positions(size, local):
    T, mixer = 50, block(replace(BASE, reach=DualChunk(size, local)))
    x, M, seen = torch.randn(1, T, 24), chunk_matrix(T, size, local), torch.ones(T, T, dtype=torch.bool).tril()
    want = by_matrix(mixer, x, M, seen)
    assert_equal(run(mixer, x), want)
    assert M.max() < size and M.min() >= 0
    near = torch.arange(T)[:, None] - torch.arange(T)[None]
    assert (M == near)[seen & (near <= local)].all()  # what stays exact
    cache = KVCache(spec(mixer.spec), 1, T)
    parts = []
    for part in x.split([7, 1, 1, 20, 1, 1, 1, 18], 1):
        parts.append(run(mixer, part, cache))
        cache.advance(part.shape[1])
    assert_equal(torch.cat(parts, 1), want)


@torch.no_grad()
def test_dual_chunk_is_plain_attention_within_a_chunk_and_not_beyond():
    plain, chunked = block(BASE), block(replace(BASE, reach=DualChunk(30, 10)))
    x = torch.randn(2, 21, 24)
    want, got = run(plain, x), run(chunked, x)
    assert_equal(run(chunked, x[:, :20]), want[:, :20])
    assert_equal(got[:, :20], want[:, :20])
    assert_equal(got[:, 20:], want[:, 20:])  # the first token across the border: all keys within `local` or not far
    x = torch.randn(2, 60, 24)
    assert (run(chunked, x)[:, 45:] - run(plain, x)[:, 45:]).abs().max() > 1e-2


@torch.no_grad()
def test_scores_are_sharper_beyond_the_trained_length():
    """0.1 ln(L / trained) + 1, once; keys keep the factor of the length at which they were written, and rows have their own."""
    plain, sharp = replace(BASE, reach=DualChunk(16, 4), sinks=False), replace(BASE, reach=DualChunk(16, 4, 24), sinks=False)
    x = torch.randn(2, 40, 24)
    factor = 0.1 * math.log(40 / 24) + 1
    assert factor == pytest.approx(1.0511, abs=1e-4)
    want = run(block(replace(plain, scale=0.4 * factor)), x)
    assert_equal(run(block(sharp), x), want)
    assert (run(block(plain), x) - want).abs().max() > 1e-3
    assert_equal(run(block(sharp), x[:, :24]), run(block(plain), x[:, :24]))
    both = torch.stack((torch.arange(40), torch.cat((torch.zeros(20, dtype=torch.int64), torch.arange(20)))))  # a short row on the right
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1, ..., :20] = False
    seen = mask & torch.ones(40, 40, dtype=torch.bool).tril()
    padded = block(sharp)(x, Context(both, x.dtype, seen, causal=False))
    assert_equal(padded[0], want[0])
    assert_equal(padded[1, 20:], run(block(plain), x[1:, 20:])[0])
    mixer, cache = block(sharp), KVCache(spec(sharp), 1, 40)
    got = [run(mixer, x[:1, :30], cache)]
    cache.advance(30)
    assert_equal(got[0], run(mixer, x[:1, :30]))
    k_30, k_31 = (run_keys(mixer, x[:1, :n])[:, :, n - 1] for n in (30, 31))
    run(mixer, x[:1, 30:31], cache)
    assert_equal(cache.keys[0][:, :, 29], k_30)
    assert_equal(cache.keys[0][:, :, 30], k_31)


def run_keys(mixer, x):
    cache = KVCache(spec(mixer.spec), 1, x.shape[1])
    run(mixer, x, cache)
    return cache.keys[0]


def thrown_out(mixer, x, sinks, window):
    """Token by token with a list: the first `sinks` stay, the oldest of the others goes; positions are places in the list."""
    kept, out = [], []
    for t in range(x.shape[1]):
        kept.append(x[:, t])
        if len(kept) > sinks + window:
            del kept[sinks]
        now = torch.stack(kept, 1)
        T = now.shape[1]
        M = (torch.arange(T)[:, None] - torch.arange(T)[None]).double()
        out.append(by_matrix(mixer, now, M, torch.ones(T, T, dtype=torch.bool).tril())[:, -1])
    return torch.stack(out, 1)


@pytest.mark.parametrize(("sinks", "window"), [(2, 5), (0, 7), (4, 1), (1, 40)])
@torch.no_grad()
def test_streaming_by_throwing_out_the_oldest(sinks, window):
    T, mixer = 30, block(replace(BASE, reach=Streaming(sinks, window)))
    x = torch.randn(1, T, 24)
    want = thrown_out(mixer, x, sinks, window)
    assert_equal(run(mixer, x), want)
    for sizes in ([1] * T, [13, 1, 1, 15], [3, 9, 2, 16]):
        cache, parts = KVCache(spec(mixer.spec), 1, T), []
        for part in x.split(sizes, 1):
            parts.append(run(mixer, part, cache))
            cache.advance(part.shape[1])
        assert_equal(torch.cat(parts, 1), want)


@torch.no_grad()
def test_streaming_is_plain_until_the_cache_is_full():
    plain, streaming = block(BASE), block(replace(BASE, reach=Streaming(4, 12)))
    x = torch.randn(2, 40, 24)
    want, got = run(plain, x), run(streaming, x)
    assert_equal(got[:, :16], want[:, :16])
    assert ((got - want)[:, 16:].abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_far_beyond_any_context_in_constant_memory():
    """2,000 tokens through a model whose every layer is of constant size; after that, at ten million, nothing has changed."""
    model = filled(Decoder(with_streaming(spec(*(Attn(4, 2, 8, Rope(8)),) * 2, GDN(1, 2, 4, 6), context=32), 4, 28)))
    x, cache = tokens(1, 2000), KVCache(model.spec, 1, 10**12)
    held = set()
    for part in x.split([50] + [1] * 50 + [100] * 19, 1):
        last = model(part, cache=cache)
        held.add(sum(t.nbytes for state in cache.states for t in state.values()))
    assert len(held) == 1 and not any(cache.entries) and last.isfinite().all()
    assert held == {4 * sum(count(layer.mixer, 24).state for layer in model.spec.layers)}
    later = [{name: t.clone() for name, t in state.items()} for state in cache.states]
    want = model(x[:, :3], cache=cache)
    cache.states, cache.length = later, 2000 + 28 * 357_142  # the ring stands where it stood
    got = model(x[:, :3], cache=cache)
    assert_equal(got, want)


@pytest.mark.parametrize("window", [1, 5, 40])
@torch.no_grad()
def test_rings_hold_a_window_and_no_more(window):
    """The same numbers as a cache that keeps everything, in memory that does not grow."""
    plain = spec(*(replace(BASE, window=window),) * 3)
    model, ring = filled(Decoder(plain)), filled(Decoder(with_rings(plain)))
    x = tokens(2, 120)
    want, cache = model(x), KVCache(ring.spec, 2, 10**9, first=torch.tensor([0, 30]))
    got = torch.cat([ring(part, cache=cache) for part in x.split([50, 1, 1, 60, 1, 1, 6], 1)], 1)
    assert_equal(got[0], want[0])
    assert_equal(got[1, 30:], model(x[1:, 30:])[0])
    assert ring.spec.limit == 2**31 and {t.shape[2] for state in cache.states for t in state.values()} == {window}


def test_what_the_counts_say():
    plain = spec(BASE)
    long = with_streaming(plain, 4, 28)
    assert cache_shapes(long.layers[0].mixer) == [] and count(long.layers[0].mixer, 24).state == 2 * 2 * 12 * 32
    assert count_parameters(long) == count_parameters(plain) == count_parameters(with_dual_chunk(plain))
    assert cache_shapes(with_dual_chunk(plain).layers[0].mixer) == cache_shapes(plain.layers[0].mixer)
    assert with_dual_chunk(plain).layers[0].mixer.reach == DualChunk(256, 16)


def test_which_layers_change():
    hybrid = spec(GDN(1, 2, 4, 6), Attn(4, 2, 8, Rope(8), window=5), Attn(4, 2, 8, Rope(8)))
    changed = with_streaming(hybrid, 1, 9)
    assert changed.layers[0] == hybrid.layers[0] and [layer.mixer.reach for layer in changed.layers[1:]] == [Streaming(0, 5), Streaming(1, 9)]
    chunked = with_dual_chunk(hybrid, 8, 2)
    assert chunked.layers[:2] == hybrid.layers[:2] and chunked.layers[2].mixer.reach == DualChunk(8, 2)
    assert with_rings(hybrid).layers[2] == hybrid.layers[2] and changed.limit == chunked.limit == 2**31 and with_rings(hybrid).limit == 256
    for bad, said in ((spec(MLA(4, None, 9, 4, 10, Rope(6))), "MLA"), (spec(GDN(1, 2, 4, 6)), "no layer of attention"),
                      (spec(BASE, positions="learned"), "learned")):
        with pytest.raises(BadInput, match=said):
            with_streaming(bad)
    for call in (lambda: with_streaming(hybrid, -1, 5), lambda: with_streaming(hybrid, 0, 0), lambda: with_dual_chunk(hybrid, 8, 8),
                 lambda: with_rings(spec(BASE)), lambda: with_rope_scaling(hybrid, {"rope_type": "linear", "factor": 0}),
                 lambda: with_rope_scaling(hybrid, {"rope_type": "cubic", "factor": 2})):
        with pytest.raises(BadInput):
            call()


def test_position_scaling_in_the_words_of_a_config():
    """YaRN and, without its temperature, NTK by parts; with latent attention both temperatures (DeepSeek-V3's 1.3689^2 at 40)."""
    plain = spec(Attn(4, 2, 16, Rope(8, 1e5, interleaved=True)), Attn(4, 2, 16, Rope(8), window=9))
    yarn = with_rope_scaling(plain, {"rope_type": "yarn", "factor": 4.0})
    rope = yarn.layers[0].mixer.rope
    assert yarn.context == 1024 and yarn.layers[1] == plain.layers[1] and (rope.dim, rope.theta, rope.interleaved) == (8, 1e5, True)
    assert rope.scaling_dict == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert rope.attention_factor == pytest.approx(1.1386294)
    by_parts = with_rope_scaling(plain, {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}).layers[0].mixer.rope
    assert by_parts.attention_factor == 1.0
    latent = spec(MLA(4, None, 9, 10, 7, Rope(6)))
    v3 = with_rope_scaling(latent, {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}).layers[0].mixer
    assert v3.rope.attention_factor == 1.0 and v3.scale == pytest.approx(16**-0.5 * 1.8739, rel=1e-4)
    dynamic = with_rope_scaling(plain, {"rope_type": "dynamic", "factor": 2.0})
    assert dynamic.context == 256 and dynamic.layers[0].mixer.rope.by_length
    x = tokens(1, 40)
    model = filled(Decoder(plain))
    scaled = filled(Decoder(with_rope_scaling(plain, {"rope_type": "linear", "factor": 2.0})))
    with torch.no_grad():
        half = torch.arange(40)[None] / 2
        mixed = model.layers[0].mixer(model.embedded(x), open_context(x, torch.float32, positions=half))
        assert_equal(scaled.layers[0].mixer(scaled.embedded(x), open_context(x, torch.float32)), mixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_versions_of_queries(dtype):
    """With one version it is attention; with several each pair has its own; a query that sees nothing gets zeros."""
    g = torch.Generator().manual_seed(0)
    qs = [torch.randn(2, 4, 9, 8, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]
    k, v = (torch.randn(2, 2, 13, 8, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    which = torch.randint(-1, 3, (2, 9, 13), generator=g)
    which[0, 3] = -1
    narrow = [t.to(dtype) for t in (*qs, k, v)]
    got = attention_of_versions(narrow[:3], *narrow[3:], which)
    scores = torch.stack([q @ k.repeat_interleave(2, 1).mT for q in qs])
    scores = scores.gather(0, which.clamp_min(0)[None, :, None].expand(1, -1, 4, -1, -1))[0] * 8**-0.5
    weights = scores.masked_fill(which[:, None] < 0, -torch.inf).softmax(-1).nan_to_num(0)
    want = weights @ v.repeat_interleave(2, 1)
    limit = 1e-6 if dtype == torch.float32 else 0.03
    assert got.dtype == dtype and (got.double() - want).abs().max() < limit * want.abs().max()
    assert got[0, :, 3].eq(0).all()
    plain = attention_of_versions([narrow[0]], *narrow[3:], torch.where(torch.ones(9, 13).tril(4).bool(), 0, -1)[None])
    assert (plain - attention_reference(narrow[0], *narrow[3:])).abs().max() < limit
    if dtype == torch.float32:
        for a, b in zip(torch.autograd.grad(got.square().sum(), (*qs, k, v)), torch.autograd.grad(want.square().sum(), (*qs, k, v)), strict=True):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()
