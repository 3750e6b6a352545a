"""Beam search over the engine: tokens and scores of transformers' generate."""

from __future__ import annotations

import pytest
import torch
from tiny_generators import generated, hugging_face

import pellucid
from pellucid.engine.beam import Search, run_searches
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.errors import BadInput

PROMPTS = [[3, 4, 5, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 30, 31, 32]]


@pytest.fixture(scope="module", params=[4, 11])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    theirs = hugging_face(folder, request.param, initializer_range=0.15, tie_word_embeddings=False)
    return theirs, pellucid.load(folder)


def ends(pair, count, beams):
    """End tokens that come up: the most frequent ones in the middle of what the search finds without any."""
    found = torch.cat([generated(pair[0], p, max_new_tokens=10, do_sample=False, num_beams=beams, num_return_sequences=beams).sequences[:, len(p) + 2 :].flatten()
                       for p in PROMPTS])
    return found.bincount(minlength=280).topk(count).indices.tolist()


OPTIONS = [{"num_beams": 3}, {"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 2, "length_penalty": 0.0, "early_stopping": True},
           {"num_beams": 5, "early_stopping": True, "length_penalty": 0.5}]
CONFIGS = [{"prefix": "none"}, {"block": 4, "chunk": 1}, {"block": 4, "chunk": 7, "budget": 9}, {"prefix": "radix", "order": "longest-hit"},
           {"block": 4, "cache_tokens": 60}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_tokens_and_scores_equal_generate(pair, options, count):
    n = options["num_beams"]
    eos = ends(pair, count, n)
    theirs = [generated(pair[0], p, max_new_tokens=10, do_sample=False, output_scores=True, num_return_sequences=n, eos_token_id=eos, **options) for p in PROMPTS]
    reasons = set()
    for config in CONFIGS:
        engine = Engine(pair[1], eos, EngineConfig(**{"cache_tokens": 600, **config}))
        beside = Request(PROMPTS[0], SamplingParams(max_tokens=9, ignore_eos=True))  # an ordinary request goes on beside the searches
        engine.add(beside)
        searches = [Search(p, n, 10, eos, options.get("length_penalty", 1.0), options.get("early_stopping", False)) for p in PROMPTS]
        run_searches(engine, searches)
        while engine.busy:
            engine.step()
        engine.cache.check()
        assert len(beside.output) == 9 and engine.cache.available() == engine.cache.blocks
        for search, want in zip(searches, theirs, strict=True):
            for beam, row, score in zip(search.done, want.sequences[:, len(search.prompt) :].tolist(), want.sequences_scores.tolist(), strict=True):
                assert beam.tokens == row[: len(beam.tokens)] and set(row[len(beam.tokens) :]) <= {0, *eos}  # padding
                assert beam.score == pytest.approx(score, abs=1e-4)
                assert beam.reason == ("stop" if beam.tokens[-1] in eos else "length")
                reasons.add(beam.reason)
    assert "stop" in reasons or options.get("length_penalty") == 2.0  # which prefers what is long


def test_beams_share_what_they_have_in_common(pair):
    searches = [Search(PROMPTS[2], 4, 12)]
    engine = Engine(pair[1], config=EngineConfig(cache_tokens=600, prefix="radix"))
    run_searches(engine, searches)
    assert engine.totals["computed_tokens"] <= len(PROMPTS[2]) + 4 * 11  # each beam computes its last token, the prompt is read once


@pytest.mark.parametrize("wrong", [{"beams": 0}, {"beams": 60}, {"max_tokens": 0}])
def test_impossible_searches(wrong):
    with pytest.raises(BadInput):
        Search([1], **{"beams": 2, "max_tokens": 4, **wrong})
