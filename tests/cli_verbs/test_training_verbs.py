"""eval, train and align as a person and as a program meet them."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pellucid import events, tasks
from pellucid.__main__ import main
from pellucid.align.online import OnlineLoop
from pellucid.align.reward_model import RewardModel, save_reward_model
from pellucid.align.rollout import Group
from pellucid.cli.eval import choices
from pellucid.engine import Sample, SamplingParams
from pellucid.models import load, save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.tokenizers import Tokenizer, train_bpe

SPEC = DecoderSpec(450, 32, (Layer(Attn(4, 2, 8, Rope(8), qk_norm=True), MLP(48)),) * 2, tied=True, context=320)
TEXTS = ["one two three four five six " * 40, "".join(map(chr, range(32, 700)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    save(init_weights(Decoder(SPEC), seed=2), path, tokenizer=train_bpe(TEXTS, SPEC.vocab))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"one two three {i} four five six" for i in range(200)))
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    code = main([*map(str, argv), "--threads", "1"])
    out = capsys.readouterr()
    return code, out.out, out.err


def told(text: str, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, text.splitlines()) if e["kind"] == kind]


# ---- train --------------------------------------------------------------------------------------------------------

def test_sft_holds_all_answers_to_a_question_out_together(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pellucid.cli import train

    chats = [{"prompt": f"{k:03}?", "completion": f"answer {n}"} for n in range(3) for k in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    parts: list[list[str]] = []
    decode = Tokenizer.load(folder).decode

    def packed(samples: list[tuple[list[int], list[bool]]], *_: Any, **__: Any) -> None:
        parts.append([decode(ids) for ids, _ in samples])

    monkeypatch.setattr("pellucid.data.packing.pack_samples", packed)
    monkeypatch.setattr(train, "_train", lambda *a: None)
    train.sft(train.Sft(model=str(folder), data=tmp_path / "chats.jsonl"))
    asked, held = ({found[0] for text in part if (found := re.findall(r"[0-9]{3}(?=\?)", text))} for part in parts)
    assert [len(part) for part in parts] == [3 * len(asked), 3 * len(held)]
    assert asked and held and len(asked | held) == 40 and not asked & held


# ---- eval ---------------------------------------------------------------------------------------------------------

def test_eval_measures_an_int8_folder_with_int8_products(
        folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from pellucid.cli.eval import Eval, text_bits
    from pellucid.engine.opening import open_model
    from pellucid.quant import compress

    compress(folder, tmp_path / "int8")
    code, out, err = run(capsys, "eval", tmp_path / "int8", "--corpus", corpus, "--problems", "2", "--max-tokens", "4", "--json")
    assert code == 0, err
    (bits,) = [e["value"] for e in told(out, "evaluation") if e["name"] == "bits per byte"]
    config, tokenizer = Eval(model="", corpus=corpus), Tokenizer.load(folder)
    served, as_float = (text_bits(config, m, tokenizer)[0] for m in (open_model(tmp_path / "int8"), load(tmp_path / "int8")))
    assert bits == served != as_float


def test_eval_says_what_choosing_among_samples_would_reach(
        folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Self-consistency, best-of-k and weighted votes of the same samples."""
    save_reward_model(RewardModel.of(load(folder)), tmp_path / "rm", Tokenizer.load(folder))
    code, out, err = run(capsys, "eval", folder, "--corpus", corpus, "--problems", "2", "--max-tokens", "4", "--k", "3", "--reward-model",
                         tmp_path / "rm", "--json")
    assert code == 0, err
    (event,) = [e for e in told(out, "evaluation") if e["name"] == "choosing"]
    assert event["details"]["k"] == [1, 2, 3] and {"pass@k", "majority", "best-of-k", "weighted"} < set(event["details"])
    for argv, says in ((["--reward-model", tmp_path / "rm"], "--k"), (["--waits", "1"], "--budgets")):
        code, out, err = run(capsys, "eval", folder, *argv)
        assert code == 2 and says in err


def test_a_choice_among_samples_by_hand():
    """Three right answers of five, two wrong ones that agree: the majority is right, the best scored is wrong, weights decide."""
    task = tasks.Mixture([(tasks.make("copying"), 1.0)])
    problem = task.sample(random.Random(0), "heldout")
    right, wrong = problem.answer, problem.answer + " a"
    samples = [Sample([1], SamplingParams(), i, tokens=[2], finish_reason="stop") for i in range(5)]
    group = Group(problem, samples, [right, f"<think>\nx\n</think>\n\n{right}", wrong, wrong, right], [])
    by_hand = choices(task, [group], [1, 5], [[-2.0, -2.0, 3.0, 2.0, -2.0]])
    assert by_hand == {"pass@k": [pytest.approx(0.6), 1.0], "majority": [0.6, 1.0], "best-of-k": [0.6, 0.0], "weighted": [0.6, 0.0]}
    steps = {"min": [[0.1, 0.1, 0.8, 0.6, 0.1]], "product": [[0.6, 0.5, 0.4, 0.3, 0.4]]}
    by_steps = choices(task, [group], [5], process=steps)
    assert by_steps == {"pass@k": [1.0], "majority": [1.0], "best-of-k min": [0.0], "weighted min": [0.0], "best-of-k product": [1.0],
                        "weighted product": [1.0]}
    samples[0].finish_reason = samples[1].finish_reason = "length"
    assert choices(task, [group], [5])["majority"] == [0.0]  # what was cut off has no vote


def test_eval_draws_the_curve_of_accuracy_against_thinking(folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]):
    code, out, err = run(capsys, "eval", folder, "--corpus", corpus, "--problems", "2", "--max-tokens", "4", "--budgets", "0", "6", "--json")
    assert code == 0, err
    points = [e["details"] for e in told(out, "evaluation") if e["stage"] == "thinking"]
    assert [p["budget"] for p in points] == [0, 6] and points[0]["thinking_tokens"] == 0.0


# ---- train --------------------------------------------------------------------------------------------------------

def test_pretraining_is_measured_in_bits_per_byte(folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from pellucid.data.corpora import read
    from pellucid.data.split import divide

    code, out, err = run(capsys, "train", "pretrain", folder, corpus, "--steps", "2", "--lr", "0.01", "--rows", "2", "--length",
                         "64", "--dtype", "float32", "--out", tmp_path / "run", "--json")
    assert code == 0, err
    last, (end,) = told(out, "evaluation")[-1], told(out, "stage_end")
    texts, tokenizer = [d.text for d in divide(read(corpus))[1]], Tokenizer.load(folder)
    firsts = [tokenizer.token_bytes(tokenizer.encode(t)[0]) for t in texts]  # nothing predicts them
    size = sum(len(t.encode()) for t in texts) - sum(map(len, firsts))
    assert (last["name"], end["metric"], end["after"]) == ("bits per byte", "bits per byte", last["value"])
    by_hand = last["details"]["loss"] * last["details"]["tokens"] / math.log(2) / size
    assert last["value"] == pytest.approx(by_hand)
    numbers = [float(n) for n in re.findall(r"\d+\.\d+", err.splitlines()[-1])]  # with --json what is printed goes to stderr
    loss_before = math.log(2) * end["before"] * size / last["details"]["tokens"]
    assert numbers[:4] == pytest.approx([end["before"], end["after"], loss_before, last["details"]["loss"]], abs=1e-4)
    assert end["after"] < end["before"]


# ---- align --------------------------------------------------------------------------------------------------------

def test_a_resumed_run_is_compared_with_the_given_weights(
        folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The score is a sum over the weights here, so that it tells which weights were measured."""
    def score(task: Any, model: Decoder, *rest: Any) -> Any:
        return SimpleNamespace(pass_at_1=float(model.embed.weight.detach().double().abs().sum()), format=0.0, mean_length=0.0)

    monkeypatch.setattr(tasks, "evaluate", score)
    monkeypatch.setattr(OnlineLoop, "for_evaluation", lambda self, seed: self.rollouts.model)
    monkeypatch.setattr(tasks.Mixture, "grade", lambda self, p, text: {"correct": 0.0, "format": 0.0, "progress": sum(map(ord, text)) % 2 / 2})
    argv = ["align", "grpo", folder, "--tasks", "sorting", "--steps", "2", "--prompts", "2", "--group", "4", "--max-tokens", "4",
            "--lr", "0.01", "--out", tmp_path / "run", "--json"]

    def stop(event: Any) -> None:
        if event.kind == "step" and event.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with events.subscribed(stop):
        assert run(capsys, *argv)[0] == 130
    code, out, err = run(capsys, *argv, "--resume")
    assert code == 0, err
    (end,) = told(out, "stage_end")
    assert end["before"] == score(None, load(folder)).pass_at_1 != end["after"]
    assert end["after"] == score(None, load(tmp_path / "run" / "model")).pass_at_1
