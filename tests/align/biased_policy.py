"""An untrained model that ends thoughts and turns often enough to be of use in a test."""

from __future__ import annotations

from functools import cache

import torch
from tiny_policy import SPEC, tokenizer

from pellucid.engine import LLM
from pellucid.nn import Decoder, init_weights


class Biased(Decoder):
    """Random weights; `bias` is added to the logits."""

    bias: torch.Tensor

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().logits(hidden) * 3 + self.bias


@cache
def llm(end: float = 4.0, eos: float = 2.5, start: float = 0.0) -> LLM:
    """end, eos, start: what is added to the logits of `</think>`, the end of the turn and `<think>`."""
    tok = tokenizer()
    model = init_weights(Biased(SPEC), 0).eval()
    model.bias = torch.zeros(SPEC.vocab)
    for name, value in (("</think>", end), ("<think>", start)):
        model.bias[tok.id_of(name)] = value
    model.bias[tok.end_of_turn_id] = eos
    return LLM(model, tok)
