"""CLIP's shape (arXiv 2103.00020): a text and a vision tower whose results are compared in one space.

Legend: N images, M texts, T tokens, P width of the common space.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.errors import BadInput
from pellucid.nn.encoder import Encoder
from pellucid.nn.linear import Linear
from pellucid.nn.specs import DualEncoderSpec
from pellucid.nn.vision import VisionEncoder

OLD_END = 2
"""`eos_token_id` of files from before transformers 4.31; a wrong value: the end token had the largest id instead."""

START_SCALE = math.log(1 / 0.07)
"""The logarithm of what similarities are multiplied by when training begins."""


class DualEncoder(nn.Module):
    """tokens (M, T), pixels (N, C, image, image) -> logits (N, M): exp(logit_scale) times the cosine of each pair."""

    def __init__(self, spec: DualEncoderSpec):
        super().__init__()
        self.spec = spec
        self.text = Encoder(spec.text)
        self.vision = VisionEncoder(spec.vision)
        self.text_projection = Linear(spec.text.dim, spec.dim)
        self.image_projection = Linear(spec.vision.dim, spec.dim)
        self.logit_scale = nn.Parameter(torch.tensor(START_SCALE))

    def draw_own(self, generator: torch.Generator) -> None:
        self.logit_scale.fill_(START_SCALE)

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(M, T) -> (M, P), not normalised: what the text tower holds at each text's first end token."""
        places = self.ends(tokens)
        hidden = self.text(tokens, mask)
        return self.text_projection(hidden[torch.arange(len(tokens), device=tokens.device), places])  # type: ignore[no-any-return]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(N, C, image, image) -> (N, P), not normalised."""
        return self.image_projection(self.vision.pooled(self.vision(pixels)))  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
        text, image = (F.normalize(x, dim=-1) for x in (self.encode_text(tokens, mask), self.encode_image(pixels)))
        return self.logit_scale.exp() * image @ text.mT

    def ends(self, tokens: Tensor) -> Tensor:
        """(M, T) -> (M,): where each text is read."""
        if self.spec.pool_at == OLD_END:
            return tokens.argmax(-1)
        found = tokens == self.spec.pool_at
        if not bool(found.any(-1).all()):
            raise BadInput("a text has no end token", f"CLIP reads a text at its first token {self.spec.pool_at}",
                           "put the end token behind every text; one that is too long must keep it when it is cut")
        return found.int().argmax(-1)
