"""Balance: the auxiliary losses against transformers where it has them, the rest by hand and by their published properties."""

import pytest
import torch
from torch import tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from pellucid.ops import balance, route

N, E, K, LAYERS = 24, 6, 2, 3


def layers():
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(N, E, generator=g) + torch.arange(E) / 3 for _ in range(LAYERS)]
    return logits, [x.softmax(-1).topk(K).indices for x in logits]


@pytest.mark.parametrize("padded", [False, True])
def test_switch_loss_is_that_of_transformers(padded):
    logits, chosen = layers()
    mask = torch.ones(4, N // 4, dtype=torch.int64)
    if padded:
        mask[0, :5], mask[2, :1] = 0, 0
    mine, theirs = ([x.clone().requires_grad_() for x in logits] for _ in range(2))
    want = load_balancing_loss_func(tuple(theirs), E, K, mask if padded else None)
    got = balance.switch_loss(mine, chosen, mask.bool().flatten() if padded else None)
    assert abs(got.item() - want.item()) < 5e-7 and got > K
    for a, b in zip(torch.autograd.grad(got, mine), torch.autograd.grad(want, theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_switch_loss_of_even_routing_is_k():
    chosen = torch.arange(N * K).view(N, K) % E
    assert balance.switch_loss([torch.zeros(N, E)], [chosen]).item() == pytest.approx(K)
    assert balance.switch_loss([torch.zeros(N, E)], [torch.zeros(N, K, dtype=torch.int64)]).item() == pytest.approx(K)  # P is even
    peaked = torch.full((N, E), -20.0).index_fill(1, tensor([0]), 20.0)
    assert balance.switch_loss([peaked], [torch.zeros(N, 1, dtype=torch.int64)]).item() == pytest.approx(E)  # its largest value


def test_z_loss_is_that_of_transformers():
    logits, _ = layers()
    assert balance.z_loss(logits).item() == pytest.approx(router_z_loss_func(torch.stack(logits)).item(), rel=1e-6)
    real = torch.arange(N) % 3 > 0
    want = router_z_loss_func(torch.stack([x[real] for x in logits])).item()
    assert balance.z_loss(logits, real).item() == pytest.approx(want, rel=1e-6)


def test_sequence_loss_by_hand():
    """Two sequences of two tokens, three experts, one chosen. f = E / (k T) counts, P = mean of the scores' shares."""
    scores = tensor([[0.6, 0.3, 0.3], [0.2, 0.2, 0.6], [0.8, 0.1, 0.1], [0.5, 0.25, 0.25]])
    chosen = scores.argmax(-1, keepdim=True)
    first = 1.5 * (0.5 + 0.2) / 2 + 1.5 * (0.25 + 0.6) / 2  # experts 0 and 2 were chosen once each
    second = 3 * (0.8 + 0.5) / 2  # expert 0 twice
    got = balance.sequence_loss(torch.logit(scores), chosen, rows=2)
    assert got.item() == pytest.approx((first + second) / 2, rel=1e-5)
    real = tensor([True, True, False, True])
    third = 3 * 0.5
    assert balance.sequence_loss(torch.logit(scores), chosen, 2, real=real).item() == pytest.approx((first + third) / 2, rel=1e-5)
    even = balance.sequence_loss(torch.zeros(E, E), torch.arange(E)[:, None], rows=1)
    both = balance.sequence_loss(torch.zeros(E, E), torch.stack((torch.arange(E), torch.arange(E).roll(1)), 1), rows=1)
    assert even.item() == pytest.approx(1.0) == both.item()


def test_the_bias_moves_towards_those_that_lack_work():
    moved = balance.updated_bias(torch.zeros(4), tensor([10.0, 2.0, 4.0, 4.0]), 0.001)  # 5 would be even
    torch.testing.assert_close(moved, tensor([-0.001, 0.001, 0.001, 0.001]))
    assert torch.equal(balance.updated_bias(moved, tensor([3.0, 3.0, 3.0, 3.0]), 0.1), moved)


def test_load_counts_real_tokens():
    chosen = tensor([[0, 1], [1, 2], [1, 0]])
    assert balance.load(chosen, 4).tolist() == [2, 3, 1, 0]
    assert balance.load(chosen, 4, tensor([True, True, False])).tolist() == [1, 2, 1, 0]


def test_the_bias_alone_balances_a_skewed_router():
    """Loss-free balancing (arXiv 2408.15664): its MaxVio, the largest load above an even one, in shares of that, falls."""
    g = torch.Generator().manual_seed(0)
    skew, bias, violations = torch.linspace(-1.5, 1.5, 8), torch.zeros(8), []
    for _ in range(300):
        logits = torch.randn(512, 8, generator=g) + skew
        load = balance.load(route(logits, 2, score="sigmoid", select_bias=bias)[1], 8)
        violations.append((load.max() / load.mean() - 1).item())
        bias = balance.updated_bias(bias, load, 0.01)
    assert violations[0] > 1 and max(violations[-20:]) < 0.25
