"""The engine against transformers, token by token, for every decoder family: mixed batches, chunks, prefix caches, preemption."""

import pytest
import torch
from tiny_checkpoints import CASES, tokens, written

import pellucid
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.drafting import is_stateful
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.errors import BadInput

LENGTHS, MOST = (9, 4, 1, 17), 14


@pytest.fixture(scope="module", params=CASES)
def opened(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = written(request.param, folder)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in LENGTHS] + [[*tokens(1, 17, seed=17)[0].tolist()[:12], 5, 6]]
    want = [theirs.generate(torch.tensor([p]), max_new_tokens=MOST, do_sample=False)[0, len(p) :].tolist() for p in prompts]
    return pellucid.load(folder), prompts, want


COMPILED = ("qwen3", "qwen2-window", "qwen3-window")

CONFIGS = {
    "plain": {"prefix": "none"}, "chain": {"block": 4}, "radix": {"prefix": "radix", "order": "longest-hit"},
    "chunks of 1": {"chunk": 1, "block": 3}, "chunks of 7": {"chunk": 7, "budget": 9},
    "pressure": {"cache_tokens": 40, "block": 4}, "swap": {"cache_tokens": 40, "block": 4, "swap": True},
    "speculation": {"drafts": 5, "block": 4}, "speculation, little budget": {"drafts": 3, "block": 2, "budget": 6, "cache_tokens": 44},
    "one at a time": {"running": 1, "block": 4},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens(opened, name, request):
    model, prompts, want = opened
    config = EngineConfig(**{"cache_tokens": 400, **CONFIGS[name]})
    if config.drafts and is_stateful(model.spec):
        with pytest.raises(BadInput, match="speculative"):
            Engine(model, config=config)
        return
    engine = Engine(model, eos=[2], config=config)
    if request.node.callspec.params["opened"] not in COMPILED:  # each head size is compiled anew: a few stand for all
        engine.runner.compiled = None
    else:
        assert engine.runner.compiled is not None
    requests = [Request(p, SamplingParams(max_tokens=MOST)) for p in prompts]
    for r in requests[:3]:
        engine.add(r)
    engine.step()
    for r in requests[3:]:  # come while others are under way
        engine.add(r)
    for _ in range(600):
        if not engine.busy:
            break
        engine.step()
    engine.cache.check()
    assert engine.cache.available() == engine.cache.blocks
    assert [r.output for r in requests] == want
    if name in ("pressure", "swap"):
        assert engine.totals["preemptions"] > 0 or any(engine.cache.windows)  # those need less room: see engine/test_window_cache.py
