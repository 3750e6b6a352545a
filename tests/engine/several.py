"""Engines of several processes in tests: layouts, requests, and the comparison of two engines' answers."""

from __future__ import annotations

import torch

from pellucid.engine import SamplingParams
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.layout import Layout
from pellucid.engine.request import Request, State

LAYOUTS = {"tensor": Layout(tp=2), "attention": Layout(dp_attention=2), "replicas": Layout(dp=2), "disaggregated": Layout(disaggregate=True)}
ROOMY, TIGHT = EngineConfig(cache_tokens=800, block=4), EngineConfig(cache_tokens=80, block=4, budget=7, running=4)


def requests(**fields) -> list[Request]:
    """Prompts of several lengths, half of them with a prefix in common."""
    generator = torch.Generator().manual_seed(1)
    common, made = torch.randint(0, 280, (24,), generator=generator).tolist(), []
    for i, length in enumerate((3, 30, 17, 1, 40, 9)):
        prompt = (common if i % 2 else []) + torch.randint(0, 280, (length,), generator=generator).tolist()
        params = {"max_tokens": 10 + i, "ignore_eos": True, "logprobs": 2, "prompt_logprobs": 1 if i == 1 else None, **fields}
        made.append(Request(prompt, SamplingParams(**params), seed=i))
    return made


def run(engine: Engine, asked: list[Request]) -> list[Request]:
    for r in asked:
        engine.add(r)
    while engine.busy:
        engine.step()
    return asked


def same(ours: list[Request], theirs: list[Request]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.output == b.output and a.finish_reason == b.finish_reason and a.state is State.FINISHED
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=5e-5)
        assert [[t for t, _ in top] for top in a.tops] == [[t for t, _ in top] for top in b.tops]
        assert torch.allclose(torch.tensor(a.prompt_logprobs), torch.tensor(b.prompt_logprobs), atol=5e-5)
        assert [[t for t, _ in top] for top in a.prompt_tops] == [[t for t, _ in top] for top in b.prompt_tops]
