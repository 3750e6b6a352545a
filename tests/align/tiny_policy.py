"""A tiny policy that has learned to answer anything with a few random digits, and tasks to improve it on."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from functools import cache

import torch

from pellucid.data.packing import pack_samples
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.optim import OptimConfig, Schedule
from pellucid.tasks import Problem
from pellucid.tokenizers import Tokenizer, patterns, train_bpe
from pellucid.train import Loop, LoopConfig

TEXTS = ["user\nassistant\nuser\nassistant\n 0 1 2 3 4 5 6 7 8 9"] * 4
SPEC = DecoderSpec(vocab=272, dim=32, layers=(Layer(Attn(4, 2, 8, Rope(8), qk_norm=True), MLP(64)),) * 2, context=64)


@cache
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, SPEC.vocab, patterns.QWEN_PATTERN)


@cache
def _trained() -> Decoder:
    rng, tok, made = random.Random(0), tokenizer(), []
    for _ in range(400):
        answer = "".join(rng.choices("0123456789", k=rng.choice((1, 1, 1, 2, 3, 4))))
        made.append(tok.encode_chat([{"role": "user", "content": str(rng.randrange(10))},
                                     {"role": "assistant", "content": answer}]))
    model = init_weights(Decoder(SPEC), 0)
    config = LoopConfig(steps=50, rows=16, optim=OptimConfig("muon", lr=0.02, adam_lr=0.01), schedule=Schedule("linear"))
    Loop(model, pack_samples(made, 48), config).run()
    return model


def policy() -> Decoder:
    return copy.deepcopy(_trained()).eval()


@dataclass(frozen=True)
class Dials:
    pass


class Echo:
    """Answer with the digit of the prompt and nothing else."""

    name, dials = "echo", Dials()

    def __init__(self, digits: str = "0123456789"):
        self.digits = digits

    def sample(self, rng: random.Random, split: str) -> Problem:
        d = rng.choice(self.digits)
        return Problem(self.name, d, d, d)

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        return problem.answer

    def grade(self, problem: Problem, completion: str) -> dict[str, float]:
        return {"format": float(len(completion) == 1), "correct": float(completion == problem.answer)}


class Noise(Echo):
    """Every text has a grade of its own, without meaning; prompts in `flat` give all texts the same."""

    name = "noise"

    def __init__(self, digits: str = "0123456789", flat: str = ""):
        super().__init__(digits)
        self.flat = flat

    def grade(self, problem: Problem, completion: str) -> dict[str, float]:
        if problem.answer in self.flat:
            return {"format": 0.0, "correct": 0.0, "progress": 0.0}
        number = sum(completion.encode()) + int(problem.answer)
        return {"format": float(number % 3 > 0), "correct": float(number % 2), "progress": number % 7 / 7}


def weights(model: Decoder) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def token_logprobs(model: Decoder, sample, temperature: float) -> torch.Tensor:
    """Log-probability of each sampled token, from the sequence alone, unpacked. (tokens,)"""
    ids = torch.tensor([sample.prompt + sample.tokens])
    logits = model(ids[:, :-1])[0, len(sample.prompt) - 1 :] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
