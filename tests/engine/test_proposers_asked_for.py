"""Speculative decoding as people ask for it: by folder, by option, on a server; and rows of the embedding that no token has."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from tiny_decoders import SPEC, decoder

import pellucid
from pellucid.__main__ import main
from pellucid.engine import LLM, SamplingParams
from pellucid.engine.config import EngineConfig, choose_room
from pellucid.engine.core import Engine
from pellucid.engine.params import StructuredOutput
from pellucid.engine.request import Request
from pellucid.errors import BadInput
from pellucid.nn import GDN, MLP, DecoderSpec, Layer
from pellucid.server import running_server
from pellucid.tokenizers import patterns, train_bpe

LAYER = SPEC.layers[0]


def other_words():
    return train_bpe(["quite another text, and other merges: " * 20] * 3, 280, patterns.QWEN_PATTERN)


def saved(folder: Path, tokenizer, spec: DecoderSpec = SPEC, seed: int = 0) -> Path:
    pellucid.save(decoder(spec, seed), folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {"model": saved(place / "model", tokenizer),
            "small": saved(place / "small", tokenizer, replace(SPEC, layers=(LAYER,)), 3),
            "wide": saved(place / "wide", tokenizer, replace(SPEC, vocab=304), 0),  # the same tokens, more rows
            "other": saved(place / "other", other_words())}


def without_weights(folder: Path) -> Path:
    """To be refused by its config alone."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder


@pytest.mark.parametrize("draft", ["model", "small", "wide"])
def test_a_folder_proposes_and_nothing_else_changes(folders, draft):
    params = [SamplingParams(max_tokens=24, temperature=t, seed=4) for t in (0.0, 1.0)]
    plain, helped = LLM(folders["model"]), LLM(folders["model"], draft=folders[draft])
    assert helped.generate(["hello worlds"] * 2, params) == plain.generate(["hello worlds"] * 2, params)
    engine = helped.engine(400)
    engine.add(Request(helped.tokenizer.encode("hello worlds"), params[0], 0))
    while engine.busy:
        engine.step()
    assert engine.totals["proposed_tokens"] > 10 and engine.totals["proposals"] > 3
    at = [engine.totals[f"accepted_at_{i}"] for i in range(4)]
    assert sum(at) == engine.totals["accepted_tokens"] and at == sorted(at, reverse=True)
    if draft == "model":
        assert engine.totals["accepted_tokens"] > 10


def test_a_draft_that_knows_fewer_tokens(tokenizer, folders):
    """The draft's table ends before the model's: prompts may hold ids beyond it."""
    wide, plain = (LLM(decoder(replace(SPEC, vocab=304), 5), tokenizer, draft=d) for d in (None, None))
    wide.draft, wide.same = decoder(), 280
    prompt = [300, 5, 290, 6]
    for t in (0.0, 1.0):
        p = SamplingParams(max_tokens=20, temperature=t, seed=1)
        assert wide.generate([prompt], p) == plain.generate([prompt], p)


def test_refused_before_anything_is_loaded(tmp_path, tokenizer, folders):
    model, other = (without_weights(saved(tmp_path / name, words)) for name, words in (("one", tokenizer), ("two", other_words())))
    with pytest.raises(BadInput, match="another vocabulary"):
        LLM(model, draft=other)
    with pytest.raises(BadInput, match="cannot be the draft"):
        LLM(model, draft=decoder(replace(SPEC, layers=(Layer(GDN(2, 2, 8, 8), MLP(48)),))))
    with pytest.raises(BadInput, match="multi-token"):
        LLM(model, config=EngineConfig(proposer="mtp"))
    with pytest.raises(BadInput, match="one of them proposes"):
        LLM(model, config=EngineConfig(proposer="lookup"), draft=model)
    with pytest.raises(BadInput, match=r"safetensors|weights"):
        LLM(model, draft=model)  # nothing else is wrong with it
    assert LLM(folders["model"], config=EngineConfig(drafts=0), draft=folders["small"]).engine(64).proposer is None


def test_the_cache_of_the_proposer_has_its_share_of_memory():
    model, small = decoder(replace(SPEC, context=10**9)), decoder(replace(SPEC, layers=(LAYER,)))
    config = EngineConfig(running=10**6)
    alone, beside = choose_room(model, config), choose_room(model, config, small)
    token = 2 * 2 * 8 * 2 * 4  # keys and values of 2 heads of 8, two layers, four bytes
    assert f"at {token} bytes" in alone.reason and f"at {token * 3 // 2} bytes" in beside.reason
    ahead = decoder(replace(SPEC, context=10**9, mtp=(LAYER,)))
    assert f"at {token * 3 // 2} bytes" in choose_room(ahead, replace(config, proposer="mtp")).reason


# --- rows that no token has ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_rows_without_a_token_are_never_drawn(tokenizer, tied):
    """Their logits are the largest by far: only an engine without a tokenizer draws them."""
    spec = replace(SPEC, vocab=320, tied=tied)
    model = decoder(spec)
    with torch.no_grad():
        rows = model.embed.weight if tied else model.head.weight
        rows[280:] = 40 * rows[:40]
    prompt = [5, 6, 7]
    plain = Engine(model, config=EngineConfig(cache_tokens=400))
    request = Request(prompt, SamplingParams(max_tokens=20, temperature=1.0), 0)
    plain.add(request)
    while plain.busy:
        plain.step()
    assert any(t >= 280 for t in request.output)
    llm = LLM(model, tokenizer)
    form = StructuredOutput(regex="[a-z ]{4,12}")
    params = [SamplingParams(max_tokens=20, temperature=t, seed=s, logprobs=5, ignore_eos=True, **more) for s in range(3) for t in (0.0, 1.0, 1e-6) for more in (
        {}, {"top_k": 50}, {"top_p": 0.9, "repetition_penalty": 1.3}, {"min_p": 0.01}, {"typical_p": 0.9}, {"structured": form})]
    for config in (EngineConfig(running=64), EngineConfig(running=64, drafts=3)):
        llm.config = config
        for output in llm.generate([prompt] * len(params), params):
            (c,) = output.outputs
            assert max(c.token_ids) < 280 and all(t < 280 for top in c.top_logprobs for t, _ in top)
            assert all(math.isfinite(p) and p <= 0 for p in c.logprobs)
    assert all(max(c.token_ids) < 280 for c in llm.beam_search([prompt], 4, 8)[0].outputs)
    first = next(iter(llm.stream(prompt, SamplingParams(max_tokens=4))))
    assert max(first.token_ids) < 280


# --- the command and the server ------------------------------------------------------------------------------------------


def test_metrics_tell_of_drafts(folders):
    llm = LLM(folders["model"], draft=folders["model"])
    with running_server(llm, "tiny") as url:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        text = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        found = dict(line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith("vllm:spec_decode"))
    assert text == LLM(folders["model"]).generate("hello", SamplingParams(max_tokens=20, ignore_eos=True))[0].outputs[0].text
    value = {name.removeprefix("vllm:spec_decode_"): float(v) for name, v in found.items()}
    label = '{model_name="tiny"}'
    assert value[f"num_draft_tokens_total{label}"] >= value[f"num_accepted_tokens_total{label}"] > 5
    assert value[f"draft_acceptance_rate{label}"] == value[f"num_accepted_tokens_total{label}"] / value[f"num_draft_tokens_total{label}"]
    places = [value[f'num_accepted_tokens_per_pos_total{{model_name="tiny",position="{i}"}}'] for i in range(4)]
    assert sum(places) == value[f"num_accepted_tokens_total{label}"] and places[0] <= value[f"num_drafts_total{label}"]


def said(*argv: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*argv])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("more", [["--draft", "small"], ["--proposer", "lookup"], ["--drafts", "3"]])
def test_generate_with_a_proposer(folders, more):
    command = ["generate", str(folders["model"]), "hello worlds", "--max-tokens", "12", "--device", "cpu", "--threads", "1", "--quiet"]
    more = [str(folders[m]) if m in folders else m for m in more]
    assert said(*command, *more)[:2] == said(*command)[:2]


def test_wrong_pairs_on_the_command_line(folders):
    for verb in (["generate", str(folders["model"]), "x"], ["serve", str(folders["model"]), "--port", "0"]):
        code, _, err = said(*verb, "--draft", str(folders["other"]), "--device", "cpu", "--threads", "1")
        assert code == 2 and "vocabulary" in err
        code, _, err = said(*verb, "--proposer", "mtp", "--device", "cpu", "--threads", "1")
        assert code == 2 and "multi-token" in err
    code, _, err = said("serve", str(folders["model"]), "--port", "0", "--draft", "nowhere/at/all")
    assert code == 2 and "nowhere" in err
