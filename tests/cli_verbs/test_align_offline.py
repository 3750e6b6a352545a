"""`pellucid align dpo | kto | rm` as a person runs them: a folder, a file of pairs, a model that tells the held-out pairs apart."""

import json
import random
from pathlib import Path

import pytest

import pellucid
from pellucid.__main__ import main
from pellucid.align.preference_config import PreferenceConfig, preference_recipe
from pellucid.cli.align_offline import Dpo, preferences
from pellucid.cli.base import parse
from pellucid.models import save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.tokenizers import train_bpe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    tokenizer = train_bpe(["yes no good bad what is it one two three four five six " * 50, "".join(map(chr, range(32, 127)))], 380)
    spec = DecoderSpec(380, 32, (Layer(Attn(4, 2, 8, Rope(8), qk_norm=True), MLP(48)),), context=128)
    save(init_weights(Decoder(spec)), folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, file = random.Random(0), tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"what is {rng.randrange(10**6)}", "chosen": " good yes", "rejected": " bad no"} for _ in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def last(out: str) -> float:
    return float(out.rsplit("-> ", 1)[1].split("%")[0])


@pytest.mark.parametrize("argv", [["dpo"], ["dpo", "--loss", "ipo", "sft", "--micro", "4"],
                                  ["dpo", "--recipe", "simpo"], ["kto"], ["kto", "--loss", "apo_zero"], ["rm", "--centring", "0.01"]], ids=" ".join)
def test_held_out_answers_are_told_apart(model: Path, pairs: Path, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code = main(["align", argv[0], str(model), str(pairs), *argv[1:], "--out", str(tmp_path), "--steps", "12", "--batch", "16", "--lr", "0.01"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert last(out) > 90
    if argv[0] == "rm":
        from transformers import AutoModelForSequenceClassification

        assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").config.num_labels == 1
    else:
        assert pellucid.load(tmp_path / "model").spec == pellucid.load(model).spec


@pytest.mark.parametrize(("argv", "objective"), [
    ([], PreferenceConfig()),
    (["--recipe", "mpo"], preference_recipe("mpo")),
    (["--recipe", "simpo", "--beta", "3", "--set", "gamma=1.5"], preference_recipe("simpo", beta=3.0, gamma=1.5)),
    (["--loss", "sigmoid*0.8", "bco_pair*0.2", "sft"], PreferenceConfig({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0})),
    (["--recipe", "wpo", "--set", "f_divergence=js"], PreferenceConfig(weighting="wpo", f_divergence="js")),
    (["--set", "ld-alpha=0.25", "weighting=none"], PreferenceConfig(ld_alpha=0.25))])
def test_every_choice_of_the_objective_can_be_made(argv: list[str], objective: PreferenceConfig):
    assert preferences(parse(Dpo, ["m", "pairs.jsonl", *argv], "align dpo")) == objective


def test_a_dry_run_says_what_would_happen_and_does_nothing(model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["align", "dpo", str(model), str(pairs), "--dry-run", "--out", str(tmp_path / "o"), "--batch", "8"]) == 0
    out = capsys.readouterr().out
    assert "-log σ" in out and "8 examples" in out and "good yes" in out and "what is" in out
    assert "⟦ good yes<" in out and "⟦ bad no<" in out and "peak" in out and "optimizer" in out
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("argv", "says"), [
    (["dpo", "--loss", "sigmoidd"], "sigmoid"), (["dpo", "--smoothing", "0.1"], "smoothing"), (["dpo", "--data-x", "1"], "--data-x"),
    (["dpo", "--recipe", "simp"], "simpo"), (["dpo", "--loss", "sigmoid*x"], "WEIGHT"), (["dpo", "--set", "gama=1"], "gamma"),
    (["dpo", "--beta", "1", "--set", "beta=2"], "twice"), (["dpo", "--set", "gamma=2"], "no effect"), (["kto", "--beta", "0"], "beta")])
def test_refusals(model: Path, pairs: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert main(["align", argv[0], str(model), str(pairs), *argv[1:]]) == 2
    assert says in capsys.readouterr().err


def test_data_that_cannot_be_pairs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "x.jsonl"
    file.write_text('{"question": "a"}\n')
    assert main(["align", "dpo", str(model), str(file)]) == 2
    assert main(["align", "dpo", str(model), str(tmp_path / "none.jsonl")]) == 2
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert main(["align", "dpo", str(model), str(file)]) == 2 and "at least two" in capsys.readouterr().err
