"""SwiGLU and the activations against transformers' own table."""

import pytest
import torch
from transformers.activations import ACT2FN

from pellucid.ops import ACTIVATIONS, swiglu


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_their_config_names(name):
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=0, atol=1e-6)


def test_swiglu_gate_first():
    x = torch.randn(2, 3, 10, requires_grad=True)
    gate, up = x[..., :5], x[..., 5:]
    want, g = ACT2FN["silu"](gate) * up, torch.randn(2, 3, 5)
    got = swiglu(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x, g), torch.autograd.grad(want, x, g))
