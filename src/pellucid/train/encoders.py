"""What models that are not decoders are trained on: masked words (BERT), pairs (CLIP), translations (the original Transformer).

Legend: B batch, T tokens, N pairs, V vocabulary. Labels are -100 where nothing is to be predicted.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.data.packing import IGNORE
from pellucid.nn import DualEncoder, Encoder, EncoderDecoder
from pellucid.ops import chunked_cross_entropy, contrastive_loss

LARGEST_SCALE = math.log(100)
"""CLIP's bound on the logarithm of the scale of its similarities."""


def mask_tokens(
    tokens: Tensor, choosable: Tensor, mask_id: int, vocab: int, generator: torch.Generator, share: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """BERT's task (arXiv 1810.04805, section 3.1): tokens (B, T) -> what the model reads, and the labels, both (B, T).

    Of the choosable tokens (bool, (B, T): no padding, no [CLS], no [SEP]) a `share` is to be predicted. Of these, 80% are
    replaced by the mask token, 10% by a random one, and 10% stay as they are.
    """
    chance = torch.rand(tokens.shape, generator=generator).to(tokens.device)
    fate = torch.rand(tokens.shape, generator=generator).to(tokens.device)
    others = torch.randint(vocab, tokens.shape, generator=generator).to(tokens.device)
    chosen = choosable & (chance < share)
    read = torch.where(chosen & (fate < 0.8), mask_id, tokens)
    return torch.where(chosen & (fate >= 0.9), others, read), torch.where(chosen, tokens, IGNORE)


def masked_loss(
    model: Encoder, tokens: Tensor, labels: Tensor, mask: Tensor | None = None, types: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Sum of -log p(label) in nats, and the number of labels. Only labelled places get logits."""
    chosen = labels != IGNORE
    logits = model.logits(model(tokens, mask, types)[chosen])
    return F.cross_entropy(logits.float(), labels[chosen], reduction="sum"), int(chosen.sum())


def pair_loss(model: DualEncoder, tokens: Tensor, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
    """The contrastive loss of N captions (N, T) and their pictures (N, C, H, W): a mean, in nats. Larger batches are harder."""
    return contrastive_loss(model.encode_image(pixels), model.encode_text(tokens, mask), model.logit_scale.exp())


@torch.no_grad()
def bound_scale(model: DualEncoder) -> None:
    """To be called after every optimizer step: similarities are multiplied by 100 at most."""
    model.logit_scale.clamp_(max=LARGEST_SCALE)


def shifted(labels: Tensor, start: int) -> Tensor:
    """What the decoder reads to predict the labels (B, T): the start token, then each label but the last."""
    read = torch.cat((torch.full_like(labels[:, :1], start), labels[:, :-1]), 1)
    return read.masked_fill(read == IGNORE, start)


def translation_loss(
    model: EncoderDecoder, source: Tensor, labels: Tensor, source_mask: Tensor | None = None, smoothing: float = 0.0,
) -> tuple[Tensor, int]:
    """Sum of -log p(label) in nats over the targets (B, T) of the sources, and the number of labels.

    smoothing: the share of each target that is spread evenly over the vocabulary (arXiv 1512.00567; the paper's 0.1).
    """
    memory = model.encode(source, source_mask)
    chosen = labels != IGNORE
    hidden = model.hidden(shifted(labels, model.spec.start), memory, source_mask)[chosen]
    count = int(chosen.sum())
    if smoothing == 0 and model.logits_bias is None:
        return chunked_cross_entropy(hidden, model.head_weight, labels[chosen]), count
    logits = model.logits(hidden).float()
    return F.cross_entropy(logits, labels[chosen], reduction="sum", label_smoothing=smoothing), count
