"""Models and tokenizers for the server's tests: a random one, and one that says what it is told to say."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pellucid.engine import LLM
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.tokenizers import Tokenizer, train_bpe

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 20, "one two three four five six seven eight nine ten " * 20,
         "".join(map(chr, range(32, 700))), '{"name": "calculator", "arguments": {"expression": "1+2"}} ' * 10]


def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 480)


def spec(context: int = 256) -> DecoderSpec:
    return DecoderSpec(480, 32, (Layer(Attn(4, 2, 8, Rope(8), qk_norm=True), MLP(48)),) * 2, tied=True, context=context)


def random_llm(context: int = 256) -> LLM:
    return LLM(init_weights(Decoder(spec(context)), seed=5).eval(), tokenizer())


def poisoned_llm() -> tuple[LLM, int]:
    """The embedding of one token, "~", is NaN: whoever reads or draws it computes NaN from there on."""
    llm = LLM(init_weights(Decoder(replace(spec(), tied=False)), seed=5).eval(), tokenizer())
    (poison,) = set(llm.tokenizer.encode("a~b")) - set(llm.tokenizer.encode("ab"))
    with torch.no_grad():
        llm.model.embed.weight[poison] = torch.nan
    return llm, poison


class Scripted(Decoder):
    """Answers with the ids of `script`, then ends; `pause` seconds a token; none while the gate is shut."""

    script: list[int]
    at: int
    pause: float = 0.0
    end: int
    gate: threading.Event

    def logits(self, hidden: Tensor) -> Tensor:
        assert self.gate.wait(60)
        time.sleep(self.pause)
        token = self.script[self.at] if self.at < len(self.script) else self.end
        self.at += 1
        out = torch.full((*hidden.shape[:-1], self.spec.vocab), -50.0)
        out[..., token] = 50.0
        return out


class Actor:
    """An LLM that says what it is told to say."""

    def __init__(self, context: int = 512):
        self.tokenizer = tokenizer()
        self.model = Scripted(spec(context)).eval()
        init_weights(self.model)
        self.model.gate = threading.Event()
        self.model.gate.set()
        self.model.end = self.tokenizer.end_of_turn_id
        self.llm = LLM(self.model, self.tokenizer)
        self.say("")

    def say(self, text: str, pause: float = 0.0) -> Any:
        self.model.script, self.model.at, self.model.pause = self.tokenizer.encode(text), 0, pause
        return self
