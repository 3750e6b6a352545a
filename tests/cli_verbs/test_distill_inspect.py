"""`pellucid train distill` and `pellucid align inspect` as a person and as a program meet them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pellucid import events
from pellucid.__main__ import main
from pellucid.align.online import OnlineConfig, OnlineLoop
from pellucid.align.recording import recorded
from pellucid.data.chats import read_chats
from pellucid.data.packing import pack_samples
from pellucid.models import load, save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.optim import OptimConfig, Schedule
from pellucid.tasks import make
from pellucid.tokenizers import Tokenizer, patterns, train_bpe
from pellucid.train import Loop, LoopConfig

SPEC = DecoderSpec(272, 48, (Layer(Attn(4, 2, 12, Rope(12), qk_norm=True), MLP(96)),) * 2, context=128)
OWN = '''
from pellucid.tasks.own import OwnTask

class Next(OwnTask):
    """The next letter."""
    def draw(self, rng):
        letter = rng.choice("abcdefghijklmnopqrstuvwxy")
        return f"after {letter}{rng.randrange(10)}", chr(ord(letter) + 1)
    def think(self, question, answer, rng):
        return "next"
'''


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "next_letter.py"
    path.write_text(OWN)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, task_file: Path) -> dict[str, Path]:
    """A teacher that knows the task, and a student that only knows its form."""
    import random

    folder, task = tmp_path_factory.mktemp("models"), make(f"{task_file}:Next")
    tok = train_bpe(["user\nassistant\nuser\nassistant\n<think>\n</think>\n"] * 4, SPEC.vocab, patterns.QWEN_PATTERN)
    found = {}
    for name, steps in (("teacher", 200), ("student", 60)):
        rng, made = random.Random(0), []
        for _ in range(600):
            problem = task.sample(rng, "train")
            answer = task.demonstrate(problem, rng)
            if name == "student":
                answer = answer[:-1] + rng.choice("abcdefghijklmnopqrstuvwxyz")
            made.append(tok.encode_chat([{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": answer}]))
        model = init_weights(Decoder(SPEC), 0)
        Loop(model, pack_samples(made, 96), LoopConfig(steps=steps, rows=16, optim=OptimConfig("muon", lr=0.02, adam_lr=0.01),
                                                       schedule=Schedule("linear"), evaluations=0)).run()
        save(model, folder / name, tokenizer=tok)
        found[name] = folder / name
    return found


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    code = main([*map(str, argv), "--threads", "1", "--lang", "en"])
    out = capsys.readouterr()
    return code, out.out, out.err


def told(text: str, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, text.splitlines()) if e["kind"] == kind]


def distill(capsys: pytest.CaptureFixture[str], models: dict[str, Path], task: Path, out: Path, *more: str | Path) -> tuple[int, str, str]:
    return run(capsys, "train", "distill", "--teacher", models["teacher"], "--student", models["student"], "--task", f"{task}:Next", "--out", out,
               "--max-tokens", "20", "--length", "96", "--evaluate", "20", "--lr", "3e-3", *more)


def test_traces_then_training_on_held_out_problems(models, task_file, tmp_path, capsys):
    code, out, err = distill(capsys, models, task_file, tmp_path, "--problems", "80", "--steps", "60", "--json")
    assert code == 0, err
    end = told(out, "stage_end")[-1]
    assert end["before"] < 0.3 and end["after"] > end["before"] + 0.4
    traces = told(out, "traces")[-1]
    assert traces["kept"] == len(list(read_chats(tmp_path / "traces.jsonl"))) > 20
    assert (tmp_path / "report.html").stat().st_size > 5000
    assert load(tmp_path / "model").spec == load(models["student"]).spec and Tokenizer.load(tmp_path / "model").vocab_size == 272
    code, out, err = distill(capsys, models, task_file, tmp_path, "--problems", "80")
    assert code == 2 and "exists" in err  # the traces are not written over
    # the file is what `pellucid train sft` takes
    code, out, err = run(capsys, "train", "sft", models["student"], tmp_path / "traces.jsonl", "--out", tmp_path / "sft", "--steps", "2", "--length", "96")
    assert code == 0, err


def test_on_policy_and_by_logits(models, task_file, tmp_path, capsys):
    code, out, err = distill(capsys, models, task_file, tmp_path / "a", "--method", "on-policy", "--steps", "12", "--estimate", "top-k", "--json")
    assert code == 0, err
    steps = [e["metrics"] for e in told(out, "step")]
    assert len(steps) == 12 and {e["on_policy"] for e in steps} == {1.0} and (tmp_path / "a" / "model").is_dir()
    assert sum(e["divergence"] for e in steps[-4:]) < sum(e["divergence"] for e in steps[:4])  # test_distill.py has a whole run
    code, out, err = distill(capsys, models, task_file, tmp_path / "b", "--method", "logits", "--problems", "60", "--steps", "40", "--json")
    assert code == 0, err
    end = told(out, "stage_end")[-1]
    assert end["after"] > end["before"] + 0.3


def test_traces_only_and_resume(models, task_file, tmp_path, capsys):
    code, out, _ = distill(capsys, models, task_file, tmp_path, "--problems", "10", "--traces-only")
    assert code == 0 and "traces.jsonl" in out and not (tmp_path / "model").exists()
    before = (tmp_path / "traces.jsonl").read_text()
    code, out, _err = distill(capsys, models, task_file, tmp_path, "--problems", "10", "--traces-only", "--resume")
    assert code == 0 and (tmp_path / "traces.jsonl").read_text() == before


def test_refusals(models, task_file, tmp_path, capsys):
    url = ("train", "distill", "--teacher", "http://127.0.0.1:9/v1", "--student", models["student"], "--task", f"{task_file}:Next", "--out", tmp_path)
    for argv, words in (((*url,), "--teacher-model"), ((*url, "--teacher-model", "m", "--method", "on-policy"), "probabilities"),
                        ((*url, "--teacher-model", "m", "--traces", "none.jsonl"), "no file")):
        code, _, err = run(capsys, *argv)
        assert code == 2 and words in err, err
    other = tmp_path / "other"
    save(init_weights(Decoder(SPEC)), other, tokenizer=train_bpe(["quite different words"] * 4, SPEC.vocab, patterns.QWEN_PATTERN))
    code, _, err = run(capsys, "train", "distill", "--teacher", other, "--student", models["student"], "--task", f"{task_file}:Next", "--method",
                       "on-policy", "--out", tmp_path / "x")
    assert code == 2 and "differ in vocabulary" in err and "--method traces" in err and not (tmp_path / "x").exists()


def test_alarms_are_told_while_the_run_goes_on(capsys):
    """On plain lines and in the live view."""
    import io

    from rich.console import Console

    from pellucid.align.alarms import Alarms
    from pellucid.cli.display import PlainLines
    from pellucid.cli.live import LiveView

    plain, live = io.StringIO(), io.StringIO()
    view = LiveView(Console(file=live, force_terminal=True, width=200))
    with events.subscribed(PlainLines(plain)), events.subscribed(view), events.subscribed(Alarms()):
        for i in range(20):
            events.emit(events.Step("rl", i + 1, (i + 1) / 20, None, {"engine/gap_mean": 0.5, "engine/ess": 0.4}))
    view.close()
    told = [line for line in plain.getvalue().splitlines() if line.startswith("alarm")]
    assert len(told) == 1 and "step=16" in told[0] and "remedy=" in told[0]
    assert live.getvalue().count("->") == 1


# ---- inspect ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(models: dict[str, Path], task_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of 20 steps whose every answer is cut at the limit, with an alarm."""
    folder = tmp_path_factory.mktemp("run")
    loop = OnlineLoop(load(models["student"]), Tokenizer.load(models["student"]), make(f"{task_file}:Next"), OnlineConfig(
        steps=4, prompts=3, group=4, rounds=1, max_tokens=20, evaluations=0, samples_shown=0, optim=OptimConfig("adamw", lr=1e-2)))
    with recorded(folder, loop):
        loop.run()
        for i in range(5, 25):
            events.emit(events.Step(loop.config.stage, i, i / 25, None, {"engine/gap_mean": 0.5, "engine/ess": 0.4}))
    return folder


def test_inspect_for_people(finished, capsys):
    code, out, err = run(capsys, "align", "inspect", finished, "--step", "2", "--by", "entropy")
    assert code == 0, err
    for words in ("step 2", "Dr. GRPO", "GDPO", "correct", "mismatch", "tokens by entropy", "effective sample size"):
        assert words in out, words
    code, _zh, _ = run(capsys, "align", "inspect", finished)[0], *run(capsys, "align", "inspect", finished)[1:]
    assert code == 0
    assert main(["align", "inspect", str(finished), "--lang", "zh"]) == 0
    assert "不一致" in capsys.readouterr().out


def test_inspect_for_programs(finished, capsys):
    code, out, _ = run(capsys, "align", "inspect", finished, "--json")
    event = told(out, "evaluation")[-1]
    assert code == 0 and event["name"] == "alarms" and event["value"] == 1 == len(event["details"]["alarms"])
    assert event["details"]["group"]["step"] == 4
    jsonschema.validate(event["details"]["group"], events.json_schema())


def test_the_page_needs_nothing_else(finished, tmp_path, capsys):
    code, _out, _ = run(capsys, "align", "inspect", finished, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 0 and "default-src 'none'" in page
    for banned in ("http-equiv=\"refresh\"", "<link rel=\"stylesheet\"", "src=\"http", "@import", "url(http"):
        assert banned not in page
    assert (page.count("<script>") == 1 and "Sampler" in page) or "sampler" in page
    assert "采样器与训练器不一致" in page and "background:rgba(" in page


def test_what_a_model_wrote_is_escaped_everywhere(tmp_path, capsys):
    group = {"kind": "group", "time": 0.0, "stage": "s", "step": 1, "prompt": "<script>alert(1)</script>", "weights": {"<b>": 1.0},
             "kl_to": "reference", "left_out": 0, "completions": [{
                 "text": "<img src=x onerror=alert(1)>\x1b[31m", "rewards": {"<i>": 1.0}, "total": 1.0, "advantages": {"used": 1.0},
                 "finished": True, "length": 1, "tokens": ["<script>"], "logp": [-1.0], "ratio": [1.1], "clip": [1.0], "entropy": [0.5], "kl": [0.1]}]}
    step = {"kind": "step", "time": 0.0, "stage": "s", "step": 1, "progress": 1.0, "eta_seconds": None, "metrics": {"grad_norm": 1.0}}
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (step, group)))
    code, out, _ = run(capsys, "align", "inspect", tmp_path, "--html", tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert code == 0 and "\x1b" not in out and "\x1b" not in page
    assert page.count("<script>") == 1 and "<img src=x" not in page and "<i>" not in page.split("<main>")[1].replace("<i></i>", "")


def test_inspect_refuses_a_folder_without_a_log(tmp_path, capsys):
    code, _, err = run(capsys, "align", "inspect", tmp_path)
    assert code == 2 and "no log" in err
