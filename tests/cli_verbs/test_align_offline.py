"""`pellucid align dpo | kto | rm | prm` as a person runs them: a folder, a file of pairs, a model that tells the held-out pairs apart."""

import json
import random
from pathlib import Path

import pytest

import pellucid
from pellucid.__main__ import main
from pellucid.align.preference_config import PreferenceConfig, preference_recipe
from pellucid.align.reward_scoring import StepJudge
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
    (["--loss", "simpo"], preference_recipe("simpo")),  # alone: with its own numbers, not DPO's
    (["--loss", "orpo"], preference_recipe("orpo")),
    (["--loss", "simpo", "--beta", "3"], preference_recipe("simpo", beta=3.0)),
    (["--loss", "simpo", "sft*0.5"], PreferenceConfig({"simpo": 1.0, "sft": 0.5}, beta=2.0, gamma=1.0)),
    (["--loss", "orpo*1"], PreferenceConfig({"orpo": 1.0})),  # as it is written, without sft
    (["--recipe", "dpo", "--loss", "simpo"], PreferenceConfig({"simpo": 1.0})),
    (["--loss", "nca_pair"], preference_recipe("nca")),
    (["--loss", "sigmoid"], PreferenceConfig()),
    (["--loss", "sigmoid", "sft"], preference_recipe("rpo")),
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


@pytest.mark.parametrize("argv", [["dpo"], ["kto"], ["rm"], ["prm"], ["grpo"], ["ppo", "--dry-run"], ["dpo", "--dry-run"]], ids=" ".join)
def test_two_lengths_are_refused_before_anything_is_read(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Neither the model nor the data are there: what is wrong with the length is said all the same, in one sentence."""
    for length, says in ((["--steps", "4", "--minutes", "1"], "either a number of steps or of seconds"), (["--steps", "0"], "0 steps"),
                         (["--minutes", "-1"], "-60")):
        data = ["--data", str(tmp_path / "none.jsonl")] if argv[0] not in ("grpo", "ppo") else []
        assert main(["align", argv[0], str(tmp_path / "none"), *data, *argv[1:], *length, "--lang", "en"]) == 2
        assert says in capsys.readouterr().err


@pytest.fixture(scope="module")
def stepwise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trl's stepwise format; a step is right where it says so."""
    rng, file = random.Random(0), tmp_path_factory.mktemp("data") / "stepwise.jsonl"
    rows = []
    for _ in range(80):
        labels = [rng.random() < 0.5 for _ in range(rng.randint(1, 4))]
        rows.append({"prompt": f"what is {rng.randrange(10**6)}", "completions": ["good yes" if y else "bad no" for y in labels], "labels": labels})
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_a_process_model_from_labelled_steps_to_votes(model: Path, stepwise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Trained by the command, opened by transformers and by `StepJudge`, recognised by `eval`."""
    from transformers import AutoModelForSequenceClassification

    assert main(["align", "prm", str(model), "--data", str(stepwise), "--out", str(tmp_path), "--steps", "20", "--batch", "16", "--lr", "0.01"]) == 0
    assert last(capsys.readouterr().out) > 95
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").config.process_reward["separator"] == "\n"
    (good, bad, again), (alone,) = StepJudge.load(tmp_path / "model").score_steps(
        ["what is 7", "what is 8"], [["good yes", "bad no", "good yes"], ["bad no"]])
    assert min(good, again) > 0.8 and max(bad, alone) < 0.2
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"one two {i}" for i in range(50)))
    common = ["eval", str(model), "--corpus", str(text), "--problems", "2", "--max-tokens", "4", "--k", "2"]
    assert main([*common, "--reward-model", str(tmp_path / "model")]) == 0
    rows = {line[:20].rstrip(" 0123456789.%") for line in capsys.readouterr().out.splitlines()}
    assert {f"{way} {how}" for way in ("best-of-k", "weighted") for how in ("min", "product", "last")} <= rows
    assert main([*common, "--reward-model", f"{tmp_path / 'model'}?combine=last", "--json"]) == 0
    (event,) = [e for e in map(json.loads, capsys.readouterr().out.splitlines()) if e.get("name") == "choosing"]
    assert set(event["details"]) == {"k", "pass@k", "majority", "best-of-k last", "weighted last"}


def test_a_dry_run_of_a_process_model_marks_what_carries_a_score(model: Path, stepwise: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["align", "prm", str(model), str(stepwise), "--dry-run", "--separator", "\\t"]) == 0
    out = capsys.readouterr().out
    assert "log σ(s)" in out and "trained tokens" in out and ("yes⟦" in out or "no⟦" in out)


@pytest.mark.parametrize(("argv", "says"), [(["--separator", ""], "separator"), (["--centring", "1"], "--centring")])
def test_refusals_of_process_models(model: Path, stepwise: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert main(["align", "prm", str(model), str(stepwise), *argv]) == 2
    assert says in capsys.readouterr().err


def test_pairs_have_no_steps(model: Path, pairs: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["align", "prm", str(model), str(pairs)]) == 2
    assert "completions" in capsys.readouterr().err


def test_data_that_cannot_be_pairs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "x.jsonl"
    file.write_text('{"question": "a"}\n')
    assert main(["align", "dpo", str(model), str(file)]) == 2
    assert main(["align", "dpo", str(model), str(tmp_path / "none.jsonl")]) == 2
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert main(["align", "dpo", str(model), str(file)]) == 2 and "at least two" in capsys.readouterr().err
