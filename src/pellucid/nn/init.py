"""Initial weights for training from nothing."""

from __future__ import annotations

import torch
from torch import nn

from pellucid.nn.decoder import Decoder
from pellucid.nn.linear import CentredRMSNorm, LayerNorm, Linear, RMSNorm


@torch.no_grad()
def init_weights(model: Decoder, seed: int = 0) -> Decoder:
    """Normal weights of standard deviation 1/sqrt(inputs); the two matrices that write into the residual stream are
    divided by sqrt(2 * layers), so that the stream's variance does not grow with depth (GPT-2's rule). The embedding
    has deviation 0.02: tied to the head, larger values would start the loss above log(vocabulary)."""
    g = torch.Generator().manual_seed(seed)
    residual = (2 * max(len(model.layers), 1)) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            std = module.weight.shape[1] ** -0.5 * (residual if name.endswith((".o", ".down")) else 1.0)
            module.weight.normal_(0, std, generator=g)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, 0.02, generator=g)
        elif isinstance(module, RMSNorm | LayerNorm):
            module.weight.fill_(0.0 if isinstance(module, CentredRMSNorm) else 1.0)
            if isinstance(module, LayerNorm):
                module.bias.zero_()
    return model
