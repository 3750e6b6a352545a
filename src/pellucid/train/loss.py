"""The language-modelling loss on packed rows, for pretraining and fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pellucid.data.packing import IGNORE, Packed
from pellucid.nn import Decoder, Routing, prediction_loss
from pellucid.nn.experts import balance_loss, balanced
from pellucid.ops import chunked_cross_entropy
from pellucid.tokenizers import Tokenizer


def language_loss(model: Decoder, rows: Packed) -> tuple[Tensor, int]:
    """Sum of -log p(label) in nats over the labelled positions, and their number.

    Positions without a label (the prompt, padding) never reach the vocabulary: their logits are not computed.

    In training, a mixture of experts adds its balance losses (`router_aux_loss_coef`), which are means, times that number:
    divided by the labels of a step they stand beside the mean of the rest. Over micro-batches that is their mean, weighted by
    labels. It is not the balance of the whole step, since the switch loss is a product of two means: experts are kept busy
    within each micro-batch, the more strictly the smaller it is. Layers of multi-token prediction add their loss too.
    """
    routing = routing_of(model)
    hidden = model.hidden(rows.tokens, positions=rows.positions, documents=rows.documents, routing=routing)
    labels = rows.labels.flatten()
    trained = labels != IGNORE
    count = int(trained.sum())
    flat = hidden.flatten(0, 1)
    if count < len(labels):
        flat, labels = flat[trained], labels[trained]
    loss = chunked_cross_entropy(flat, model.head_weight.to(flat.dtype), labels)
    if model.training and model.mtp:
        states = model.predict_all(rows.tokens, hidden, rows.positions, rows.documents, routing=routing)
        loss = loss + prediction_loss(states, model.head_weight.to(flat.dtype), rows.labels, rows.documents, model.spec.mtp_loss)
    balance = None if routing is None else balance_loss(routing)
    return loss if balance is None else loss + count * balance, count


def routing_of(model: Decoder) -> Routing | None:
    """What a forward pass in training is to note for the balance losses of its experts; None where the model has none."""
    return Routing() if model.training and balanced(model.spec) else None


def balance_share(routing: Routing | None, part: float) -> Tensor | float:
    """The balance losses of a micro-batch that is this part of its step: they stand beside a loss of any kind (preferences,
    rewards, a teacher) with the model's own coefficients, as beside the language-modelling loss."""
    balance = None if routing is None else balance_loss(routing)
    return 0.0 if balance is None else part * balance


def share_of(model: Decoder, total: int) -> Callable[[Packed], Tensor]:
    """Micro-batch -> its share of a step whose micro-batches hold `total` labels together (see `Stepper`)."""
    return lambda rows: language_loss(model, rows)[0] / max(total, 1)


@torch.no_grad()
def held_out_loss(model: Decoder, rows: Packed, batch: int = 32) -> tuple[float, int]:
    """Total nats and labelled tokens over all rows."""
    was_training = model.training
    model.eval()
    nats, count = 0.0, 0
    for start in range(0, len(rows), batch):
        loss, n = language_loss(model, rows.rows(slice(start, start + batch)).to(model.embed.weight.device))
        nats, count = nats + float(loss), count + n
    model.train(was_training)
    return nats, count


def bits_per_byte(nats: float, labels: Sequence[int] | Tensor, token_bytes: Tensor) -> float:
    """nats / ln 2 / bytes: independent of the tokenizer. token_bytes (V,): bytes that each token stands for."""
    ids = torch.as_tensor(labels).flatten()
    size = int(token_bytes[ids[ids != IGNORE]].sum())
    return nats / math.log(2) / max(size, 1)


def token_bytes(tokenizer: Tokenizer) -> torch.Tensor:
    """(V,) how many bytes of text each token stands for; special tokens stand for none."""
    special = set(tokenizer.special.values())
    return torch.tensor([0 if i in special else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
