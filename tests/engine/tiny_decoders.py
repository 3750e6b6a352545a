"""Tiny decoders with random weights, and one that says what it is told to say."""

from __future__ import annotations

from dataclasses import replace

import torch

from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights

SPEC = DecoderSpec(vocab=280, dim=32, layers=(Layer(Attn(4, 2, 8, Rope(8), qk_norm=True), MLP(64)),) * 2, context=96)


def decoder(spec: DecoderSpec = SPEC, seed: int = 0, sharp: float = 3.0) -> Decoder:
    """Random weights whose next-token distributions are neither flat nor certain."""
    model = init_weights(Decoder(spec), seed).eval()
    with torch.no_grad():
        model.embed.weight.normal_(0, 1, generator=torch.Generator().manual_seed(seed))
        model.head_weight.mul_(sharp if model.head is not None else sharp / 10)
    return model


class Scripted(Decoder):
    """Answers any prompt of `prompt` tokens with `script`, whatever its weights."""

    def __init__(self, script: list[int], prompt: int, vocab: int = SPEC.vocab):
        super().__init__(replace(SPEC, vocab=vocab, context=512))
        self.script, self.prompt = script, prompt
        self.eval()

    def hidden(self, tokens, positions=None, documents=None, cache=None, mask=None, routing=None):
        here = cache.positions(tokens.shape[1]).expand(tokens.shape)
        cache.advance(tokens.shape[1])
        return here[..., None].float()

    def run(self, tokens, ctx):
        return ctx.positions.expand(tokens.shape)[..., None].float()

    def logits(self, hidden):
        at = (hidden[..., 0].long() + 1 - self.prompt).clamp(0, len(self.script) - 1)
        return 30.0 * torch.nn.functional.one_hot(torch.tensor(self.script)[at], self.spec.vocab).float()
