"""Initial weights for training from nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from pellucid.nn.experts import ExpertLinear
from pellucid.nn.linear import CentredRMSNorm, LayerNorm, Linear, RMSNorm

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def init_weights(model: M, seed: int = 0) -> M:
    """Normal weights of standard deviation 1/sqrt(inputs); the two matrices that write into the residual stream are
    divided by sqrt(2 * layers), so that the stream's variance does not grow with depth (GPT-2's rule). The embedding
    has deviation 0.02: tied to the head, larger values would start the loss above log(vocabulary). A module with parameters of
    another kind draws them itself, in `draw_own`."""
    g = torch.Generator().manual_seed(seed)
    depths = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and name.endswith("layers")}
    for name, module in model.named_modules():
        if isinstance(module, Linear | ExpertLinear):
            depth = next((n for stack, n in depths.items() if name.startswith(stack)), 1) if name.endswith((".o", ".out", ".down")) else 0
            std = module.weight.shape[-1] ** -0.5 * (max(2 * depth, 1) ** -0.5)
            module.weight.normal_(0, std, generator=g)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, 0.02, generator=g)
        elif isinstance(module, RMSNorm | LayerNorm):
            module.weight.fill_(0.0 if isinstance(module, CentredRMSNorm) else 1.0)
            if isinstance(module, LayerNorm):
                module.bias.zero_()
    for module in model.modules():
        draw: Callable[[torch.Generator], None] | None = getattr(module, "draw_own", None)
        if draw is not None:
            draw(g)
    return model
