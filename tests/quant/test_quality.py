"""Perplexity, against transformers; rounding while loading; what both commands say of it."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny_checkpoints import written

from pellucid import events
from pellucid.__main__ import main
from pellucid.engine import LLM, SamplingParams
from pellucid.engine.opening import open_model
from pellucid.errors import BadInput
from pellucid.models import load, save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.quant import (
    Int4Linear,
    Int8Linear,
    compress,
    held_bytes,
    is_quantized,
    measure,
    quality,
    quantize,
    rows_of,
)
from pellucid.quant.measure import perplexity
from pellucid.tokenizers import patterns, train_bpe

TEXT = "one two three four five six seven eight nine ten " * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quality") / "model"
    layer = Layer(Attn(4, 2, 16, Rope(16), qk_norm=True), MLP(96))
    model = init_weights(Decoder(DecoderSpec(300, 64, (layer,) * 2, tied=True, context=64)), seed=2)
    save(model.bfloat16(), place, tokenizer=train_bpe([TEXT, "alpha beta gamma delta epsilon zeta eta theta " * 30], 300, patterns.QWEN_PATTERN))
    return place


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    """Speeds are measured for a moment only."""
    monkeypatch.setattr("pellucid.quant.measure", partial(measure, seconds=0.05, batches=(1,)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def test_perplexity_is_exp_of_transformers_loss(tmp_path: Path):
    theirs = written("qwen3", tmp_path)
    x = torch.randint(0, 96, (5, 33), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = math.exp(theirs(input_ids=x, labels=x).loss.item())
    assert perplexity(load(tmp_path), x, rows=2) == pytest.approx(want, rel=1e-5)


def test_quality_says_which_goals_are_met(folder: Path):
    model = load(folder)
    x = torch.randint(0, 300, (4, 40), generator=torch.Generator().manual_seed(3))
    found = quality(model, x)
    value = found["perplexity"]
    assert set(value) == {"float32", "bfloat16", "int8", "int4"}
    assert value["int8"] == perplexity(quantize(model), x) and value["int4"] == perplexity(quantize(model, bits=4), x)
    for name, most in (("int8", 0.005), ("int4", 0.03)):
        assert found["more"][name] == pytest.approx(value[name] / value["bfloat16"] - 1)
        assert found["met"][name] == (value[name] <= (1 + most) * value["bfloat16"])
    broken = quantize(model)
    broken.layers[0].mixer.qkv = Int8Linear(torch.zeros(128, 64, dtype=torch.int8), torch.ones(128, 1))
    assert set(quality(model, x, {"int8": broken})["more"]) == {"float32", "int8"}


def test_rows_of_texts():
    assert rows_of([[1, 2, 3], [4, 5], [6, 7]], 3).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert rows_of([[1, 2]], 8).tolist() == [[1, 2]] and rows_of([[1] * 50], 10, most=25).shape == (2, 10)
    with pytest.raises(BadInput, match="too short"):
        rows_of([[1]], 8)


@pytest.mark.parametrize(("name", "kind"), [("int8", Int8Linear), ("int4", Int4Linear)])
def test_rounded_while_loading(folder: Path, tmp_path: Path, name: str, kind: type):
    said: list[events.Event] = []
    with events.subscribed(said.append):
        llm = LLM(folder, quantize=name)
    assert isinstance(llm.model.layers[0].mixer.qkv, kind)
    compress(folder, tmp_path / name, int(name[-1]))
    x = torch.arange(20)[None]
    assert torch.equal(llm.model(x), open_model(tmp_path / name)(x)), "as the folder that `quantize` writes"
    (note,) = [e.text for e in said if e.kind == "note"]
    assert f"INT{name[-1]}" in note and f"{held_bytes(llm.model) / 1e6:,.0f} MB" in note
    assert LLM(tmp_path / name, quantize=name).generate("one", SamplingParams(max_tokens=3)) == llm.generate("one", SamplingParams(max_tokens=3))
    with pytest.raises(BadInput, match=f"holds INT{name[-1]}"):
        LLM(tmp_path / name, quantize="int4" if name == "int8" else "int8")


def test_a_draft_is_rounded_too_and_a_rounded_draft_serves(folder: Path, tmp_path: Path):
    compress(folder, tmp_path / "int8")
    for draft in (folder, tmp_path / "int8"):
        llm = LLM(folder, draft=draft, quantize="int4")
        assert is_quantized(llm.draft) and isinstance(llm.model.layers[0].mixer.qkv, Int4Linear)
        assert llm.generate("one two", SamplingParams(max_tokens=8)) == LLM(folder, quantize="int4").generate("one two", SamplingParams(max_tokens=8))


def test_what_cannot_be():
    with pytest.raises(BadInput, match="int8 or int4"):
        LLM("anywhere", quantize="int3")


def test_the_commands(folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["quantize", str(folder), "--corpus", str(corpus), "--threads", "1", "--bits"]
    for bits in ("8", "4"):
        assert main([*command, bits, "--out", str(tmp_path / bits), "--lang", "en"]) == 0
        out = capsys.readouterr().out
        assert "perplexity" in out and "above bfloat16's" in out and ("0.5 %" if bits == "8" else "3 %") in out
        options = ["--threads", "1", "--device", "cpu", "--max-tokens", "8", "--quiet"]
        assert main(["generate", str(tmp_path / bits), "one two", *options]) == 0
        text = capsys.readouterr().out
        assert main(["generate", str(folder), "one two", "--quantize", f"int{bits}", *options]) == 0
        assert capsys.readouterr().out == text
    assert main([*command, "8", "--out", str(tmp_path / "again"), "--json"]) == 0
    details = json.loads(capsys.readouterr().out.splitlines()[-1])["details"]
    assert set(details["perplexity"]) == {"float32", "bfloat16", "int8"} and details["kept"] == {} and "int8" in details["met"]


def test_gpt2_says_what_stays_float(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]):
    """Its files hold matrices transposed: 4-bit codes would have to lie across their rows."""
    from transformers import GPT2Config

    written(GPT2Config(vocab_size=300, n_embd=64, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2), tmp_path / "gpt2")
    train_bpe([TEXT, "alpha beta gamma delta epsilon zeta eta theta " * 30], 300, patterns.QWEN_PATTERN).save(tmp_path / "gpt2")
    command = ["quantize", str(tmp_path / "gpt2"), "--corpus", str(corpus), "--threads", "1", "--lang", "en", "--out"]
    assert main([*command, str(tmp_path / "four"), "--bits", "4"]) == 0
    out = capsys.readouterr().out
    assert "transformer.h.*.attn.c_attn.weight is in float in the file" in out and "transposed" in out
    assert main([*command, str(tmp_path / "eight")]) == 0
    assert "transposed" not in capsys.readouterr().out
