"""The main job, at its smallest dial, as a person runs it: interrupted, resumed, finished, opened by transformers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pellucid
from pellucid.errors import BadInput
from pellucid.events import read_log
from pellucid.grow.config import GrowConfig
from pellucid.grow.job import Job
from pellucid.grow.plan import choose_size
from pellucid.grow.recipe import LADDER, STAGES

STAGE_NAMES = list(STAGES)


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "pellucid", "grow", "--minutes", "1", "--out", str(out), "--lang", "en", "--json", *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """A job that is interrupted in the middle of pretraining and then resumed: its folder, report and first stderr."""
    out = tmp_path_factory.mktemp("grow") / "run"
    first = subprocess.Popen(command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        event = json.loads(line)
        if event["kind"] == "step" and event["stage"] == "pretrain":
            break
    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=60)
    assert first.returncode == 130, told
    done = subprocess.run(command(out, "--resume"), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["kind"] == "report"
    return out, {k: v for k, v in last.items() if k not in ("kind", "time")}, told


@pytest.mark.timeout(400)
def test_interrupted_job_says_how_to_go_on_and_does(run: tuple[Path, dict, str]) -> None:
    out, report, told = run
    assert "--resume" in told
    kinds = [e for e in read_log(out / "events.jsonl") if e["kind"] == "note" and "goes on at step" in e["text"]]
    assert kinds and "pretrain" in kinds[0]["text"]  # from the checkpoint, not from the start
    assert [s["stage"] for s in report["stages"]] == STAGE_NAMES


def test_report_is_whole(run: tuple[Path, dict, str]) -> None:
    out, report, _ = run
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page and 'src="http' not in page  # self-contained, and the browser holds it to that
    stages = {s["stage"]: s for s in report["stages"]}
    assert stages["pretrain"]["after"] < stages["pretrain"]["before"]  # bits per byte; a minute is short
    assert stages["sft"]["before"] == 0.0
    assert all(Path(s["file"]).is_file() for s in report["stages"])
    assert {a["stage"] for a in report["prompts"][0]["answers"]} == {"pretrain", "sft", "grpo", "int8"}
    if sys.platform.startswith("linux"):  # where the peak of a stage can be told
        for name, s in stages.items():  # within a third on a quiet machine; on a busy one there are fewer steps than planned
            assert 0.5 < s["memory_predicted_bytes"] / s["memory_peak_bytes"] < 4, name  # a starved minute makes too few steps to need it all
    assert report["minutes_spent"] > 0.3  # no upper bound: a busy machine is late


def test_transformers_opens_the_grown_folder(run: tuple[Path, dict, str]) -> None:
    folder = run[0] / "model"
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), pellucid.load(folder)
    llm = pellucid.LLM(folder)
    messages = [{"role": "user", "content": "Sort 52,7,31,88."}]
    ids = llm.chat_ids(messages)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"] == ids
    tokens = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=2e-5, rtol=1e-5)
    mine = llm.generate([ids], pellucid.SamplingParams(max_tokens=40))[0].outputs[0].token_ids
    greedy = theirs.generate(tokens, max_new_tokens=40, do_sample=False)[0, len(ids):].tolist()
    assert greedy[: len(mine)] == mine


def test_resume_with_other_settings_is_refused(run: tuple[Path, dict, str]) -> None:
    done = subprocess.run([*command(run[0], "--resume"), "--seed", "3"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "other settings" in done.stderr + done.stdout


@pytest.mark.parametrize("wrong", [["--minutes", "0"], ["--minutes", "-3"], ["--corpus", "nowhere"], ["--data", "nowhere.jsonl"],
                                   ["--model", "nowhere/at/all"]])
def test_impossible_settings_are_refused_before_work(wrong: list[str], tmp_path: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pellucid", "grow", "--out", str(tmp_path / "x"), *wrong],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "x").exists() and time.monotonic() - begun < 120
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("given, content, told", [
    ("corpus", None, "no text found"), ("corpus", b"a few words", "only 11 characters"), ("corpus", b"\0" * 200_000, "not text"),
    ("data", b"", "is empty"), ("data", b'{"a": 1}', "line 1"), ("data", b"not json", "not JSON"), ("out", b"", "is a file")])
def test_files_that_are_of_no_use_are_told_before_work(
    given: str, content: bytes | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pellucid.grow.job.make_plan", lambda *a: pytest.fail("work has begun"))
    file = tmp_path / ("given.jsonl" if given == "data" else "given.txt")
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    settings = {"out": tmp_path / "run", given: file / "run" if given == "out" else file}
    with pytest.raises(BadInput, match=told):
        Job(GrowConfig(**settings)).run()  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_not_a_number_of_minutes_is_refused() -> None:
    with pytest.raises(BadInput):
        GrowConfig(minutes=float("nan"))


def test_size_follows_speed_and_time() -> None:
    slow, fast = choose_size(2e10, 480)[0], choose_size(5e12, 480)[0]
    assert LADDER.index(slow) < LADDER.index(choose_size(8e10, 480)[0]) < LADDER.index(fast)
    assert LADDER.index(choose_size(8e10, 60)[0]) < LADDER.index(choose_size(8e10, 3600)[0])
