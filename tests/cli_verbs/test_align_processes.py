"""`--processes 2`: one run, one output, one folder; a single Ctrl-C stops all of them, and another number goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_align_online import at, both  # noqa: F401  the fixture

import pellucid
from pellucid.__main__ import main
from pellucid.cli import processes
from pellucid.cli.base import Common
from pellucid.errors import BadInput


def words(at: Path, out: str, *more: str) -> list[str]:  # noqa: F811
    return ["align", "grpo", str(at / "model"), "--data", str(at / "prompts.jsonl"), *both(at), "--prompts", "4", "--group", "4", "--max-tokens", "10",
            "--lr", "0.003", "--problems", "3", "--threads", "1", "--out", str(at / out), *more]


def steps(folder: Path) -> list[int]:
    file = folder / "events.jsonl"
    log = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [e["step"] for e in log if e["kind"] == "step"]


def test_two_processes_do_what_one_does_and_speak_once(at, capfd):  # noqa: F811
    assert main(words(at, "one", "--steps", "3")) == 0
    capfd.readouterr()
    assert main(words(at, "two", "--steps", "3", "--processes", "2")) == 0
    told = capfd.readouterr()
    assert told.out.count("held-out reward") == 1 and told.err.count("threads 1") == 1
    assert steps(at / "two") == [1, 2, 3] and (at / "two" / "report.html").exists()
    one, two, before = (dict(pellucid.load(at / name).named_parameters()) for name in ("one/model", "two/model", "model"))
    assert all(torch.allclose(p, two[n], atol=2e-5, rtol=1e-3) for n, p in one.items())
    assert max(float((p - before[n]).abs().max()) for n, p in two.items()) > 1e-3


def test_one_ctrl_c_stops_all_and_one_process_goes_on(at):  # noqa: F811
    running = subprocess.Popen([sys.executable, "-m", "pellucid", *words(at, "stopped", "--steps", "400", "--processes", "2")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while len(steps(at / "stopped")) < 2 and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and err.decode().count("everything is saved") == 1, err.decode()
    done = steps(at / "stopped")
    assert 2 <= done[-1] < 400
    assert main(words(at, "stopped", "--steps", str(done[-1] + 2), "--resume")) == 0
    assert steps(at / "stopped") == list(range(1, done[-1] + 3))


def test_the_first_failure_is_the_runs(monkeypatch):
    assert processes.start(["--version"], 2) == 0
    assert processes.start(["align", "grpo", "nowhere"], 2) == 2
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="runs in one process"):
        processes.check(Common())
