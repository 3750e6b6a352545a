"""A tiny decoder and rows with unequal numbers of labels."""

from __future__ import annotations

import random

import torch

from pellucid.data.packing import Packed, pack_samples
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights

SPEC = DecoderSpec(vocab=60, dim=32, layers=(Layer(Attn(4, 2, 8, Rope(8), qk_norm=True), MLP(48)),) * 2, context=64)


def decoder(seed: int = 0) -> Decoder:
    return init_weights(Decoder(SPEC), seed)


def samples(n: int = 14, seed: int = 0) -> list[tuple[list[int], list[bool]]]:
    """Ids of 4 to 24 tokens, each counting up by its own step; the mask hides a first part of unequal length."""
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        length, start, step = rng.randrange(4, 25), rng.randrange(60), rng.randrange(1, 4)
        hidden = rng.randrange(1, length - 1)
        made.append(([(start + i * step) % 60 for i in range(length)], [False] * hidden + [True] * (length - hidden)))
    return made


def rows(n: int = 14, T: int = 32, seed: int = 0) -> Packed:
    return pack_samples(samples(n, seed), T)


def weights(model: Decoder) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
