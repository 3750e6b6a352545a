"""Rotary embeddings against transformers: every scaling kind, both layouts, gradients."""

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from pellucid.ops import apply_rope, apply_rope_reference, rope_angles, rope_frequencies

SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
}


def theirs(scaling, d, theta, positions):
    config = LlamaConfig(hidden_size=4 * d, num_attention_heads=4, head_dim=d, max_position_embeddings=4096,
                         rope_parameters={"rope_theta": theta, **scaling})
    return LlamaRotaryEmbedding(config)(torch.zeros(1), positions)


@pytest.mark.parametrize("d", [2, 16, 64])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_angles_within_and_beyond_the_original_context(scaling, theta, d):
    positions = torch.tensor([[0, 1, 2, 63, 64, 65, 500, 4095], [7, 7, 0, 3, 1, 1, 9, 2]])
    cos, sin = rope_angles(positions, rope_frequencies(d, theta, scaling))
    their_cos, their_sin = theirs(scaling, d, theta, positions)
    torch.testing.assert_close(cos, their_cos, rtol=0, atol=5e-4)  # an angle of 4095 rad has an ulp of 2.4e-4
    torch.testing.assert_close(sin, their_sin, rtol=0, atol=5e-4)
    torch.testing.assert_close(cos[:, :3], their_cos[:, :3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_are_computed_in_float32_whatever_they_are_for(dtype):
    """Positions beyond 256 are no bfloat16 numbers."""
    positions, f = torch.tensor([[3, 257, 4095, 100_001]]), rope_frequencies(64, 1e4)
    for got, want in zip(rope_angles(positions, f, dtype, 1.25), rope_angles(positions, f, factor=1.25), strict=True):
        assert torch.equal(got, want.to(dtype))


def test_scalings_differ():
    f = {name: rope_frequencies(64, 1e4, s) for name, s in SCALINGS.items()}
    assert torch.equal(f["default"], rope_frequencies(64, 1e4))
    assert torch.equal(f["linear"] * 4, f["default"])
    assert torch.equal(f["llama3"][0], f["default"][0]) and f["llama3"][-1] * 8 == f["default"][-1]


@pytest.mark.parametrize("kind", ["proportional", "su", "Llama3"])
def test_unknown_kinds_are_refused(kind):
    with pytest.raises(ValueError, match=kind):
        rope_frequencies(8, 1e4, {"rope_type": kind})


def turned(f, x, g):
    y = f(x)
    return y, *torch.autograd.grad(y, x, g)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rotation_and_gradient(dtype, batch):
    """Against transformers' function; bfloat16 within 2^-7 of the largest entry (both round twice or more)."""
    x = torch.randn(3, 4, 5, 16).to(dtype).requires_grad_()
    g = torch.randn(3, 4, 5, 16).to(dtype)
    positions = torch.randint(0, 50, (batch, 5))
    cos, sin = rope_angles(positions, rope_frequencies(16, 1e4), dtype)
    want = turned(lambda x: apply_rotary_pos_emb(x, x, cos, sin)[0], x, g)
    atol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-7 * 4}[dtype]
    for got in (
        turned(lambda x: apply_rope(x, cos, sin), x, g),
        turned(lambda x: apply_rope_reference(x, cos, sin), x, g),
        [t.transpose(1, 2) for t in turned(lambda x: apply_rope(x.transpose(1, 2), cos, sin, heads_last=True), x, g.transpose(1, 2))[:1]],
        turned(lambda x: apply_rope(x.transpose(1, 2), cos, sin, heads_last=True).transpose(1, 2), x, g),
    ):
        for a, b in zip(got, want):
            assert a.dtype == dtype
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_interleaved_against_deepseek():
    q, k = torch.randn(2, 3, 6, 8), torch.randn(2, 1, 6, 8)
    positions = torch.arange(6)[None]
    cos, sin = rope_angles(positions, rope_frequencies(8, 1e4))
    want = apply_rotary_pos_emb_interleave(q, k, cos, sin)
    got = apply_rope(q, cos, sin, interleaved=True), apply_rope(k, cos, sin, interleaved=True)
    torch.testing.assert_close(got[0] @ got[1].mT, want[0] @ want[1].mT)
    assert DeepseekV3Config().rope_interleave  # the layout that this stands for


def test_partial_rotation_leaves_the_rest():
    x = torch.randn(2, 3, 4, 10, requires_grad=True)
    cos, sin = rope_angles(torch.arange(4)[None], rope_frequencies(6, 1e4))
    y = apply_rope(x, cos, sin)
    assert torch.equal(y[..., 6:], x[..., 6:])
    torch.testing.assert_close(y[..., :6], apply_rope_reference(x[..., :6], cos, sin))
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    assert torch.equal(dx[..., 6:], g[..., 6:])


def test_a_dot_product_depends_on_the_distance_only():
    q, k = torch.randn(1, 1, 1, 32, dtype=torch.float64), torch.randn(1, 1, 1, 32, dtype=torch.float64)
    f = rope_frequencies(32, 1e4)

    def score(at_q, at_k):
        turn = lambda x, at: apply_rope(x, *rope_angles(torch.tensor([[at]]), f, torch.float64))
        return (turn(q, at_q) * turn(k, at_k)).sum().item()

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-2)
