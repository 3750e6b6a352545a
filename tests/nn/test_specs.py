"""Numbers told from a spec alone against the model that is built from it."""

import pytest
import torch
from small_specs import SPECS, assert_equal, built, spec, tokens
from torch.utils.flop_counter import FlopCounterMode

from pellucid.errors import BadInput
from pellucid.nn import (
    MLP,
    Attn,
    Decoder,
    KVCache,
    Linear,
    RMSNorm,
    Rope,
    count_parameters,
    forward_flops,
    init_weights,
)


@pytest.mark.parametrize("name", SPECS)
def test_parameters(name):
    assert count_parameters(SPECS[name]) == sum(p.numel() for p in built(name).parameters())


@pytest.mark.parametrize("name", ["qwen3", "llama", "mqa", "gpt2", "yarn", "gemma3-full"])
def test_flops_of_one_token(name):
    """Against PyTorch's own counter, which sees the products that were really run."""
    model, n = built(name), 16  # the cache has room in steps of 16: none is empty here
    cache = KVCache(model.spec, 1, n)
    with torch.no_grad():
        model(tokens(1, n - 1), cache=cache)
        with FlopCounterMode(display=False) as counter:
            model(tokens(1, 1), cache=cache)
    assert forward_flops(model.spec, n) == counter.get_total_flops()


def test_cache_bytes():
    model = built("window")
    cache = KVCache(model.spec, 3, 11)
    with torch.no_grad():
        model(tokens(3, 11), cache=cache)
    assert sum(t.nbytes for t in cache.keys + cache.values) == 3 * 11 * model.spec.kv_bytes_per_token


def test_learned_positions_end_with_the_context():
    model, n = built("gpt2"), built("gpt2").spec.context
    with pytest.raises(BadInput, match=f"has {n} positions"):
        model(tokens(1, n + 1))
    mask = torch.ones(1, n + 3, dtype=torch.int64)
    mask[:, :3] = 0  # padding takes no position
    assert model(tokens(1, n + 3), mask=mask).shape[1] == n + 3


def test_specs_are_values():
    assert spec(Attn(2, 1, 8, Rope(8))) == spec(Attn(2, 1, 8, Rope(8)))
    assert len({spec(Attn(2, 1, 8, Rope(8))), spec(Attn(2, 1, 8, Rope(8))), spec(Attn(2, 1, 8, Rope(8, 1e6)))}) == 2


def test_linear_casts_its_weight_and_returns_a_wide_gradient():
    layer = Linear(5, (3, 4), bias=True)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 5)
    assert layer.parts == (3, 4) and layer(x).shape == (2, 7)
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    assert "5 -> 3 + 4, bias" in repr(layer)
    assert RMSNorm(4, 1e-6)(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16


def test_initial_weights():
    """Reproducible; deviation 1/sqrt(inputs), the two writers of the residual stream divided by sqrt(2 layers); a loss of
    log(vocabulary) at the start."""
    mixer, mlp = Attn(8, 4, 16, Rope(16), qk_norm=True, qkv_bias=True), MLP(256, bias=True)
    s = spec(*(mixer,) * 4, mlp=mlp, dim=128, vocab=512, tied=True)
    model, again = init_weights(Decoder(s), 3), init_weights(Decoder(s), 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.embed.weight, init_weights(Decoder(s), 4).embed.weight)
    layer = model.layers[0]
    for module, inputs, divide in ((layer.mixer.qkv, 128, 1), (layer.mixer.o, 128, 8**0.5), (layer.ffn.gate_up, 128, 1),
                                   (layer.ffn.down, 256, 8**0.5)):
        assert module.weight.std().item() == pytest.approx(inputs**-0.5 / divide, rel=0.03)
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert layer.mixer.qkv.bias.eq(0).all() and layer.norm1.weight.eq(1).all()
    x = torch.randint(0, 512, (4, 32))
    loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), torch.randint(0, 512, (128,)))
    assert loss.item() == pytest.approx(torch.log(torch.tensor(512.0)).item(), abs=0.1)


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_initial_norms_change_nothing(name):
    """A scale of 1, stored as such or less 1, and no shift."""
    model = init_weights(built(name))
    x = torch.randn(3, model.spec.dim)
    unit = (x - x.mean(-1, keepdim=True) if name == "gpt2" else x)
    assert_equal(model.layers[0].norm1(x), unit / unit.square().mean(-1, keepdim=True).sqrt())


def test_positions_can_be_given():
    model, x = built("llama"), tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(model(x), model(x, positions=torch.arange(9)[None]))
        assert_equal(model(x, positions=torch.arange(9)[None] + 40), model(x))  # only distances matter
        assert (model(x, positions=2 * torch.arange(9)[None]) - model(x)).abs().max() > 1e-2
