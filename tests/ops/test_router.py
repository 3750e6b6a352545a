"""Routers: small cases by hand, and every kind against the router of transformers that it is named after."""

import pytest
import torch
from torch import tensor
from transformers import DeepseekV2Config, DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen2MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from pellucid.ops import expert_choice, route

N, D, E, K = 40, 16, 8, 3


def dense(weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """(N, E), 0 where not chosen: the order of the choices means nothing."""
    return torch.zeros(len(weights), E, dtype=weights.dtype).scatter(1, chosen, weights)


MOE = dict(hidden_size=D, num_attention_heads=4, num_experts_per_tok=K, moe_intermediate_size=4)
GROUPS = dict(groups=4, top_groups=2)
CASES = {
    "mixtral": (MixtralTopKRouter(MixtralConfig(hidden_size=D, num_attention_heads=4, num_local_experts=E, num_experts_per_tok=K)), dict(renormalize=True)),
    "qwen2_moe": (Qwen2MoeTopKRouter(Qwen2MoeConfig(**MOE, num_experts=E, norm_topk_prob=False)), {}),
    "qwen3_moe": (Qwen2MoeTopKRouter(Qwen2MoeConfig(**MOE, num_experts=E, norm_topk_prob=True)), dict(renormalize=True)),
    "gpt_oss": (GptOssTopKRouter(GptOssConfig(hidden_size=D, num_attention_heads=4, num_local_experts=E, num_experts_per_tok=K)), dict(score="top_k_softmax")),
    "v2 greedy": (DeepseekV2TopkRouter(DeepseekV2Config(**MOE, n_routed_experts=E, topk_method="greedy", routed_scaling_factor=16.0)),
                  dict(scale=16.0)),
    "v2 groups": (DeepseekV2TopkRouter(DeepseekV2Config(
        **MOE, n_routed_experts=E, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0)),
        dict(scale=16.0, **GROUPS)),
    "v3": (DeepseekV3TopkRouter(DeepseekV3Config(
        **MOE, n_routed_experts=E, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True)),
        dict(score="sigmoid", renormalize=True, scale=2.5, group_score="top2", **GROUPS)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_router_of_transformers(name):
    theirs, options = CASES[name]
    g = torch.Generator().manual_seed(1)
    for p in theirs.state_dict().values():  # biases from -0.6 to 0.6: many sums of score and bias are negative
        p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    if name == "v3":
        options = {**options, "select_bias": theirs.e_score_correction_bias - 0.5}
        theirs.e_score_correction_bias.sub_(0.5)
    x = torch.randn(N, D, generator=g)
    with torch.no_grad():
        logits, weights, chosen = theirs(x)
        got = route(logits, K, **options)
    assert got[1].shape == (N, K) and all(len(set(row)) == K for row in got[1].tolist())
    torch.testing.assert_close(dense(*got), dense(weights, chosen), atol=1e-6, rtol=1e-6)


def test_gradients_reach_the_logits_and_not_the_bias():
    logits = torch.randn(N, E, requires_grad=True)
    bias = torch.randn(E, requires_grad=True)
    weights, _ = route(logits, K, score="sigmoid", select_bias=bias, renormalize=True)
    (weights * torch.randn(N, K)).sum().backward()
    assert logits.grad.abs().max() > 0 and bias.grad is None


LOGITS = tensor([[0.0, 1.0, 2.0, 3.0]])
EXPS = LOGITS.exp()[0]


def test_softmax_over_all_by_hand():
    weights, chosen = route(LOGITS, 2)
    assert chosen.tolist() == [[3, 2]]
    torch.testing.assert_close(weights[0], EXPS[[3, 2]] / EXPS.sum())
    weights, _ = route(LOGITS, 2, renormalize=True, scale=2.0)
    torch.testing.assert_close(weights[0], 2 * EXPS[[3, 2]] / EXPS[2:].sum())


def test_softmax_over_the_chosen_is_the_same_as_renormalising():
    torch.testing.assert_close(route(LOGITS, 2, score="top_k_softmax"), route(LOGITS, 2, renormalize=True))


def test_a_bias_chooses_but_does_not_weigh():
    weights, chosen = route(LOGITS, 2, score="sigmoid", select_bias=tensor([5.0, 0.0, 0.0, -5.0]))
    assert chosen.tolist() == [[0, 2]]
    torch.testing.assert_close(weights, tensor([[0.5, 1 / (1 + EXPS[2].reciprocal())]]))


def test_groups_by_their_best_or_by_their_two_best():
    scores = tensor([[0.9, 0.1, 0.6, 0.5, 0.7, 0.0]])
    logits = torch.logit(scores.clamp(1e-3))
    choose = lambda kind: sorted(route(logits, 2, score="sigmoid", groups=3, top_groups=1, group_score=kind)[1][0].tolist())
    assert choose("max") == [0, 1] and choose("top2") == [2, 3]
    negative = route(logits, 2, score="sigmoid", select_bias=torch.full((6,), -2.0), groups=3, top_groups=1, group_score="top2")[1]
    assert sorted(negative[0].tolist()) == [2, 3]  # hidden groups are out, however low the others stand


def test_sigmoids_that_are_all_zero_do_not_divide_by_zero():
    weights, _ = route(torch.full((1, 4), -200.0), 2, score="sigmoid", renormalize=True)
    assert weights.isfinite().all()


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(N, E).bfloat16()
    assert route(logits, K)[0].dtype == torch.float32
    torch.testing.assert_close(route(logits, K), route(logits.float(), K))


def test_experts_choose_tokens():
    """Figure 1 of arXiv 2202.09368 in small: each expert takes its best two of four tokens."""
    logits = torch.stack((tensor([0.6, 0.4]), tensor([0.9, 0.1]), tensor([0.3, 0.7]), tensor([0.5, 0.5]))).log()
    weights, tokens = expert_choice(logits, 2)
    assert tokens.tolist() == [[1, 0], [2, 3]]
    torch.testing.assert_close(weights, tensor([[0.9, 0.6], [0.7, 0.5]]))
    _, tokens = expert_choice(logits, 2, real=tensor([True, False, True, True]))
    assert tokens.tolist() == [[0, 3], [2, 3]]
