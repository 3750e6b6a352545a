"""The settings of the main job as the command line that repeats it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pellucid.cli.base import parse
from pellucid.cli.grow import Grow
from pellucid.errors import BadInput
from pellucid.grow.config import GrowConfig
from pellucid.grow.job import Job
from pellucid.grow.plan import Plan


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")


def test_config_repeats_itself_as_a_command(tmp_path: Path) -> None:
    assert GrowConfig(minutes=3, seed=4).command == "pellucid grow --minutes 3 --out runs/grow --seed 4"
    (corpus := tmp_path / "my own texts; rm -rf").mkdir()
    (data := tmp_path / "it's.jsonl").write_text("{}")
    given = GrowConfig(minutes=1 + 1 / 3, out=tmp_path / "a run", model="a b/c", corpus=corpus, data=data, seed=4, threads=3,
                       device="cpu", lang="zh")
    words = shlex.split(given.command)
    assert words[:2] == ["pellucid", "grow"]
    typed = parse(Grow, words[2:], "grow")
    for name in ("minutes", "out", "model", "corpus", "data", "seed", "threads", "device", "lang"):
        assert getattr(typed, name) == getattr(given, name), name


def test_a_job_goes_on_with_other_threads_but_not_with_another_seed(tmp_path: Path) -> None:
    job = Job(GrowConfig(out=tmp_path, threads=2))
    job.plan = Plan([], {}, 1.0, {}, [])
    job._save_state()
    Job(GrowConfig(out=tmp_path, resume=True, threads=1, lang="zh"))._open()
    with pytest.raises(BadInput, match="other settings") as refused:
        Job(GrowConfig(out=tmp_path, resume=True, seed=1))._open()
    assert refused.value.next.endswith("--threads 2 --resume")


@pytest.mark.parametrize("broken", [b"", b"{", b"\xff\xfe\x00", b"[]", b"{}"])
def test_a_broken_state_is_refused_with_the_command_that_begins_anew(tmp_path: Path, broken: bytes) -> None:
    (tmp_path / "state.json").write_bytes(broken)
    with pytest.raises(BadInput) as refused:
        Job(GrowConfig(out=tmp_path, resume=True))._open()
    assert "pellucid grow" in refused.value.next
    assert (tmp_path / "state.json").read_bytes() == broken
