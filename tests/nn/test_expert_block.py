"""The block of experts against the blocks of transformers; drops, choices by experts, padding; the bias that follows the load."""

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen2MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from pellucid.nn import Linear, MoE, Routing
from pellucid.nn.build import build
from pellucid.nn.context import Context
from pellucid.nn.count import count
from pellucid.nn.experts import Experts, Router, balance_loss, update_biases
from pellucid.nn.site import Site
from pellucid.ops import balance

D, E, K, I = 16, 8, 3, 12
SITE = Site(D, 1e-6, "rms")
COMMON = dict(hidden_size=D, num_attention_heads=4, num_experts_per_tok=K, moe_intermediate_size=I)
DEEP = dict(COMMON, n_routed_experts=E, n_shared_experts=2)
DRAWN = MoE(E, K, I)
CASES = {
    "mixtral": (MixtralSparseMoeBlock, MixtralConfig(hidden_size=D, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K,
                                                     num_attention_heads=4), MoE(E, K, I, renormalize=True)),
    "qwen2_moe": (Qwen2MoeSparseMoeBlock, Qwen2MoeConfig(**COMMON, num_experts=E, shared_expert_intermediate_size=20),
                  MoE(E, K, I, shared=20, shared_gate=True)),
    "gpt_oss": (GptOssMLP, GptOssConfig(hidden_size=D, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K, swiglu_limit=0.5,
                                        num_attention_heads=4),
                MoE(E, K, I, score="top_k_softmax", router_bias=True, expert_bias=True, clamp=(1.702, 0.5))),
    "deepseek_v2": (DeepseekV2Moe, DeepseekV2Config(**DEEP, topk_method="group_limited_greedy", n_group=4, topk_group=2,
                                                    routed_scaling_factor=16.0),
                    MoE(E, K, I, scale=16.0, groups=4, top_groups=2, wide_router=True, shared=2 * I)),
    "deepseek_v3": (DeepseekV3MoE, DeepseekV3Config(**DEEP, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True),
                    MoE(E, K, I, score="sigmoid", renormalize=True, scale=2.5, groups=4, top_groups=2, group_score="top2",
                        select_bias=True, wide_router=True, shared=2 * I)),
}


def drawn(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every persistent tensor redrawn."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in module.state_dict().values():
            t.copy_(torch.randn(t.shape, generator=g) * 0.3)
    return module


def pairs_of(ours: Experts, theirs: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Our parameters beside what fills them, in our layout."""
    own, source = dict(ours.named_parameters()), theirs.state_dict()
    router = "router" if "router.weight" in source else "gate"
    found = [(own["router.weight"], source[f"{router}.weight"])]
    for name in ("gate_up", "down"):
        weight, bias = source[f"experts.{name}_proj"], source.get(f"experts.{name}_proj_bias")
        if isinstance(theirs, GptOssMLP):  # stored transposed; gate and up alternate
            weight = weight.mT
            if name == "gate_up":
                weight, bias = (torch.cat((t[:, ::2], t[:, 1::2]), 1) for t in (weight, bias))
        found.append((own[f"experts.{name}.weight"], weight))
        if bias is not None:
            found.append((own[f"experts.{name}.bias"], bias))
    for name, key in (("router.bias", "router.bias"), ("router.select_bias", "gate.e_score_correction_bias"),
                      ("shared_gate.weight", "shared_expert_gate.weight")):
        if name in own:
            found.append((own[name], source[key]))
    if ours.shared is not None:
        shared = "shared_expert." if "shared_expert.up_proj.weight" in source else "shared_experts."
        gate_up = torch.cat([source[f"{shared}{x}_proj.weight"] for x in ("gate", "up")])
        found += [(own["shared.gate_up.weight"], gate_up), (own["shared.down.weight"], source[f"{shared}down_proj.weight"])]
    return found


@pytest.mark.parametrize("N", [1, 30], ids=["one token", "many"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_block_of_transformers(name, N):
    kind, config, spec = CASES[name]
    config._experts_implementation = "eager"
    theirs, ours = drawn(kind(config)), build(spec, SITE)
    filled = pairs_of(ours, theirs)
    assert {id(p) for p, _ in filled} == {id(p) for p in ours.parameters()}
    with torch.no_grad():
        for mine, source in filled:
            mine.copy_(source)
    x = torch.randn(2, N, D, generator=torch.Generator().manual_seed(3))
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = ours(mine), theirs(other)
    want = want[0] if isinstance(want, tuple) else want
    torch.testing.assert_close(got, want, atol=1e-5 * want.abs().max().item(), rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), want, atol=1e-5 * want.abs().max().item(), rtol=0)
    pull = torch.linspace(-1, 1, want.numel()).view_as(want)
    for loss in ((got * pull).sum(), (want * pull).sum()):
        loss.backward()
    torch.testing.assert_close(mine.grad, other.grad, atol=1e-5 * other.grad.abs().max().item(), rtol=0)
    expected = theirs.gate.weight.grad if hasattr(theirs, "gate") else theirs.router.weight.grad
    torch.testing.assert_close(ours.router.weight.grad, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert count(spec, D).parameters == sum(p.numel() for p in ours.parameters())


def block(seed: int = 0, **fields: object) -> Experts:
    return drawn(Experts(MoE(**{"experts": E, "top_k": K, "hidden": I, **fields}), SITE), seed)


def context(**fields: object) -> Context:
    return Context(torch.arange(4)[None], torch.float32, **fields)


X = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(9))


def test_padding_changes_nothing_and_is_not_counted():
    ours, real = block(capacity=1.0, select_bias=True, score="sigmoid").train(), torch.tensor([[False, True, True, True]] * 2)
    got = ours(X, context(real=real))
    assert ours.router.load.sum() == 6 * K
    update_biases(ours, move=False)
    other = X.clone()
    other[:, 0] = 100.0
    assert torch.equal(ours(other, context(real=real))[:, 1:], got[:, 1:])
    assert got[:, 0].eq(0).all()
    packed = context(documents=torch.tensor([[-1, 0, 0, 1]] * 2))
    assert torch.equal(ours(X, packed), got)  # packed rows say the same with document -1


def test_capacity_drops_in_training_only():
    free, tight = block(), block(capacity=0.5)
    with torch.no_grad():
        assert torch.equal(tight.eval()(X), free.eval()(X))
    y = tight.train()(X)
    logits = tight.router(X.flatten(0, 1))
    pairs, _ = tight.dispatch(logits, None)
    assert max(pairs.counts) == 2 == round(0.5 * 8 * K / E + 0.49)
    assert not torch.allclose(y, free(X))
    assert torch.equal(block(capacity=8.0).train()(X), free.train()(X))  # room for all


def test_experts_that_choose_do_the_same_work():
    ours = block(expert_choice=True, top_k=2)
    pairs, _ = ours.dispatch(ours.router(X.flatten(0, 1)), None)
    assert pairs.counts == [2] * E  # 8 tokens, 2 experts for each on average
    assert block(expert_choice=True, top_k=2, capacity=2.0).dispatch(ours.router(X.flatten(0, 1)), None)[0].counts == [4] * E
    assert block(expert_choice=True, top_k=2, capacity=99.0).dispatch(ours.router(X.flatten(0, 1)), None)[0].counts == [8] * E  # all there are
    y = ours(X)
    scores = ours.router(X.flatten(0, 1)).softmax(-1)
    want = torch.zeros(8, D)
    for e in range(E):
        for t in scores[:, e].topk(2).indices.tolist():
            gate, up = (ours.experts["gate_up"].weight[e] @ X.flatten(0, 1)[t]).chunk(2)
            want[t] += scores[t, e] * (ours.experts["down"].weight[e] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(y, want.view_as(X), atol=1e-5, rtol=1e-4)
    assert ours(X, context(routing=(routing := Routing()))) is not None and balance_loss(routing) is None


def test_routing_and_the_losses_of_several_layers():
    routing = Routing()
    a, b = block(0, aux_loss=0.1, z_loss=0.01), block(1, aux_loss=0.1, z_loss=0.01)
    c = block(2, score="sigmoid", aux_loss=0.2, balance="sequence")
    real = torch.tensor([[True] * 4, [False, True, True, True]])
    for layer in (a, b, c, block(3)):
        layer(X, context(real=real, routing=routing))
    flat, rows = real.flatten(), X.flatten(0, 1)
    x = [layer.router(rows) for layer in (a, b, c)]
    chosen = [v.softmax(-1).topk(K).indices for v in x[:2]] + [x[2].topk(K).indices]
    want = 0.1 * balance.switch_loss(x[:2], chosen[:2], flat) + 0.01 * balance.z_loss(x[:2], flat) \
        + 0.2 * balance.sequence_loss(x[2], chosen[2], 2, "sigmoid", flat)
    torch.testing.assert_close(balance_loss(routing), want)
    torch.testing.assert_close([r[flat] for r in routing.logits[:3]], [v[flat] for v in x])


def test_the_bias_follows_the_load_outside_of_autograd():
    ours = block(select_bias=True, score="sigmoid", bias_speed=0.01)
    before = ours.router.select_bias.clone()
    ours.eval()(X)
    with torch.no_grad():
        ours.train()(X)
    assert ours.router.load is None  # neither evaluation nor sampling counts
    ours(X).sum().backward()
    ours(X[:1]).sum().backward()  # a second micro-batch of the step
    load = ours.router.load
    assert load.sum() == 12 * K and ours.router.select_bias.grad is None
    update_biases(ours)
    assert torch.equal(ours.router.select_bias, before + 0.01 * torch.sign(load.mean() - load)) and ours.router.load is None
    ours(X).sum().backward()
    update_biases(ours, move=False)  # a step that was skipped
    assert torch.equal(ours.router.select_bias, before + 0.01 * torch.sign(load.mean() - load)) and ours.router.load is None


def test_the_selection_bias_stays_float32():
    ours = block(select_bias=True)
    before = ours.router.select_bias.clone()
    assert torch.equal(ours.bfloat16().router.select_bias, before) and ours.router.weight.dtype == torch.bfloat16
    with torch.device("meta"):
        empty = Experts(MoE(E, K, I, select_bias=True), SITE)
    empty.to(torch.bfloat16).to_empty(device="cpu")
    assert empty.router.select_bias.dtype == torch.float32 and not empty.router.select_bias.requires_grad


def test_a_wide_router_computes_in_float32():
    x = torch.randn(64, D).bfloat16()
    wide, narrow = (drawn(Router(MoE(E, K, I, wide_router=wide), D)).bfloat16() for wide in (True, False))
    assert wide(x).dtype == torch.float32 and narrow(x).dtype == torch.bfloat16
    torch.testing.assert_close(wide(x), x.float() @ wide.weight.float().T)


def test_float32_weights_under_bfloat16_activations():
    ours = block(shared=20, shared_gate=True)
    y = ours(X.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}
    assert (y.float() - ours(X)).norm() < 0.02 * y.float().norm()


def test_initial_weights():
    from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights

    attn = Attn(4, 4, 16, Rope(16))
    moe = MoE(16, 2, 96, router_bias=True, expert_bias=True, select_bias=True, shared=32)
    model = init_weights(Decoder(DecoderSpec(64, 64, (Layer(attn, MLP(64)),) + (Layer(attn, moe),) * 7)))
    ffn = model.layers[3].ffn
    for weight, std in ((ffn.experts["gate_up"].weight, 64**-0.5), (ffn.experts["down"].weight, 96**-0.5 / 4), (ffn.router.weight, 64**-0.5)):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    for name, p in ffn.named_parameters():
        assert p.eq(0).all() == name.endswith("bias"), name
    assert not any(isinstance(m, Linear) for n, m in ffn.named_modules() if not n.startswith("shared"))  # nothing that INT8 would round
