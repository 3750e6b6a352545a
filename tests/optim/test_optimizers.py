"""Which parameter gets which optimizer; AdamW against its formula; learning rates; state out and in."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from pellucid.errors import BadInput
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.optim import Muon, OptimConfig, build_optimizer

SPEC = DecoderSpec(vocab=50, dim=16, layers=(Layer(Attn(4, 2, 4, Rope(4), qkv_bias=True, qk_norm=True), MLP(24)),) * 2)


def model(seed=0):
    return init_weights(Decoder(SPEC), seed)


def give_gradients(m, seed):
    g = torch.Generator().manual_seed(seed)
    for p in m.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=g)


def names_in(m, optimizer):
    of = {p: n for n, p in m.named_parameters()}
    return [[of[p] for p in g["params"]] for g in optimizer.param_groups]


# --- who gets what ----------------------------------------------------------------------------------------------------


def test_muon_takes_the_matrices_inside_the_layers_with_their_parts_and_adamw_the_rest():
    m = model()
    muon, adam = build_optimizer(m, OptimConfig(weight_decay=0.1)).optimizers
    assert isinstance(muon, Muon)
    (inner,), (rest,) = names_in(m, muon), names_in(m, adam)
    each = ("mixer.qkv.weight", "mixer.o.weight", "ffn.gate_up.weight", "ffn.down.weight")
    assert sorted(inner) == sorted(f"layers.{i}.{n}" for i in range(2) for n in each)
    assert sorted(inner + rest) == sorted(n for n, _ in m.named_parameters())
    parts = dict(zip(inner, muon.param_groups[0]["parts"]))
    assert parts["layers.0.mixer.qkv.weight"] == (16, 8, 8)
    assert parts["layers.1.ffn.gate_up.weight"] == (24, 24)
    assert parts["layers.1.ffn.down.weight"] == (16,)
    assert muon.param_groups[0]["weight_decay"] == 0.1 and adam.param_groups[0]["weight_decay"] == 0.0


def test_frozen_parameters_are_left_out():
    m = model()
    m.embed.weight.requires_grad_(False)
    m.layers[0].requires_grad_(False)
    for name in ("muon", "adamw"):
        built = build_optimizer(m, OptimConfig(name))
        taken = {n for o in built.optimizers for group in names_in(m, o) for n in group}
        assert taken == {n for n, p in m.named_parameters() if p.requires_grad}


# --- AdamW ------------------------------------------------------------------------------------------------------------


def test_adamw_is_the_formula_with_decay_on_matrices_only():
    """Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2, in float64."""
    m = model()
    b1, b2, lr, decay = 0.9, 0.95, 0.01, 0.2
    built = build_optimizer(m, OptimConfig("adamw", lr=lr, betas=(b1, b2), weight_decay=decay))
    w = {n: p.detach().double().clone() for n, p in m.named_parameters()}
    first = {n: torch.zeros_like(x) for n, x in w.items()}
    second = {n: torch.zeros_like(x) for n, x in w.items()}
    for t, factor in enumerate([1.0, 0.5, 2.0, 0.1], start=1):
        give_gradients(m, t)
        built.set_factor(factor)
        for n, p in m.named_parameters():
            g = p.grad.double()
            first[n] = b1 * first[n] + (1 - b1) * g
            second[n] = b2 * second[n] + (1 - b2) * g * g
            if p.ndim >= 2:
                w[n] = w[n] * (1 - lr * factor * decay)
            corrected = (second[n] / (1 - b2**t)).sqrt() + 1e-8
            w[n] = w[n] - lr * factor * first[n] / (1 - b1**t) / corrected
        built.step()
    for n, p in m.named_parameters():
        torch.testing.assert_close(p.detach(), w[n].float(), atol=1e-6, rtol=1e-5, msg=n)


def test_adamw_is_torchs_unfused_adamw():
    ours, theirs = model(), model()
    built = build_optimizer(ours, OptimConfig("adamw", lr=0.01, weight_decay=0.1))
    groups = [dict(params=[p for p in theirs.parameters() if p.ndim >= 2], weight_decay=0.1),
              dict(params=[p for p in theirs.parameters() if p.ndim < 2], weight_decay=0.0)]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=False, foreach=False)
    for t in range(5):
        for m, o in ((ours, built), (theirs, reference)):
            give_gradients(m, t)
            o.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# --- learning rates ---------------------------------------------------------------------------------------------------


def test_the_factor_applies_to_the_base_rates_and_does_not_pile_up():
    built = build_optimizer(model(), OptimConfig(lr=0.02, adam_lr=0.003))
    for factor in (0.5, 0.25, 1.0, 0.0, 0.75):
        built.set_factor(factor)
        assert [g["lr"] for o in built.optimizers for g in o.param_groups] == [0.02 * factor, 0.003 * factor]
        assert built.lr == 0.02 * factor
    two = build_optimizer(model(), OptimConfig("adamw", lr=0.01))
    two.set_factor(0.5)
    assert [g["lr"] for g in two.optimizers[0].param_groups] == [0.005, 0.005]


def test_a_factor_of_zero_moves_nothing():
    m = model()
    before = [p.detach().clone() for p in m.parameters()]
    built = build_optimizer(m, OptimConfig(weight_decay=0.1))
    give_gradients(m, 0)
    built.set_factor(0.0)
    built.step()
    assert all(torch.equal(a, b) for a, b in zip(before, m.parameters()))


def test_zero_grad_frees_the_gradients():
    m = model()
    built = build_optimizer(m, OptimConfig())
    give_gradients(m, 0)
    built.zero_grad()
    assert all(p.grad is None for p in m.parameters())


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_goes_through_a_file_and_back_bit_for_bit(name, tmp_path):
    """Three steps, state to a file, and on with new objects: the same weights as without the interruption."""
    config = OptimConfig(name, lr=0.02, weight_decay=0.1)
    straight, broken = model(), model()
    a, b = build_optimizer(straight, config), build_optimizer(broken, config)
    for t in range(3):
        for m, o in ((straight, a), (broken, b)):
            give_gradients(m, t)
            o.step()
    tensors = b.state_tensors({p: n for n, p in broken.named_parameters()})
    keys = {"muon": len(list(broken.named_parameters())) * 3 - 2 * 8, "adamw": len(list(broken.named_parameters())) * 3}
    assert len(tensors) == keys[name]  # Muon keeps one tensor for each of its 8 matrices, AdamW three
    save_file(tensors, tmp_path / "o.safetensors")

    fresh = model(seed=9)
    fresh.load_state_dict(broken.state_dict())
    c = build_optimizer(fresh, config)
    c.load_state_tensors(dict(fresh.named_parameters()), load_file(tmp_path / "o.safetensors"))
    again = c.state_tensors({p: n for n, p in fresh.named_parameters()})
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], tensors[k]) and again[k].dtype == tensors[k].dtype for k in tensors)
    for t in range(3, 6):
        for m, o in ((straight, a), (fresh, c)):
            give_gradients(m, t)
            o.set_factor(1 / t)
            o.step()
    assert all(torch.equal(x, y) for x, y in zip(straight.parameters(), fresh.parameters()))


def test_loaded_state_is_a_copy():
    m = model()
    built = build_optimizer(m, OptimConfig())
    give_gradients(m, 0)
    built.step()
    tensors = {k: v.clone() for k, v in built.state_tensors({p: n for n, p in m.named_parameters()}).items()}
    kept = {k: v.clone() for k, v in tensors.items()}
    built.load_state_tensors(dict(m.named_parameters()), tensors)
    give_gradients(m, 1)
    built.step()
    assert all(torch.equal(tensors[k], kept[k]) for k in kept)


@pytest.mark.parametrize("wrote, reads", [("muon", "adamw"), ("adamw", "muon")])
def test_the_state_of_another_optimizer_is_refused(wrote, reads):
    m = model()
    built = build_optimizer(m, OptimConfig(wrote))
    give_gradients(m, 0)
    built.step()
    tensors = built.state_tensors({p: n for n, p in m.named_parameters()})
    with pytest.raises(BadInput, match="optimizer"):
        build_optimizer(m, OptimConfig(reads)).load_state_tensors(dict(m.named_parameters()), tensors)


def test_the_first_adamw_step_is_the_sign_of_the_gradient():
    m = model()
    before = m.norm.weight.detach().clone()
    built = build_optimizer(m, OptimConfig("adamw", lr=0.01))
    give_gradients(m, 0)
    sign = m.norm.weight.grad.sign()
    built.step()
    torch.testing.assert_close(m.norm.weight.detach(), before - 0.01 * sign, atol=1e-5, rtol=0)
    assert math.isclose(built.lr, 0.01)
