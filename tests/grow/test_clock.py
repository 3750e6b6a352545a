"""The dial: what one evaluation really took decides what the later ones may cost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pellucid import tasks
from pellucid.grow import recipe
from pellucid.grow.config import GrowConfig
from pellucid.grow.job import Job
from pellucid.grow.plan import Plan


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Four minutes on a machine of 20,000 tokens/s, with a clock that stands still."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("pellucid.grow.job.time", SimpleNamespace(monotonic=lambda: clock.now))
    made = Job(GrowConfig(minutes=4, out=tmp_path))
    made.plan = Plan([], {}, 1.0, {}, [], tokens_per_second=20_000.0)
    made.clock = clock  # type: ignore[attr-defined]
    return made


def evaluation_of(seconds: float, job: Job, monkeypatch: pytest.MonkeyPatch, n: int | None = None) -> None:
    def measure(self: Job, model: object = None, n: int | None = None, k: int = 1, seed: int = 0) -> tasks.TaskScores:
        job.clock.now += seconds  # type: ignore[attr-defined]
        return tasks.TaskScores(0.5, 0.5, 1.0, 0.5, 0.5, 20.0, 0.0, n or 1, 1, 1, 0.0, 0.01, {}, [])

    monkeypatch.setattr(Job, "measure", measure)
    job.final_scores("sft", n=n)


def test_a_slow_evaluation_leaves_less_time_to_train_and_more_for_those_that_follow(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    promised = job.measure_seconds
    assert promised == recipe.measure_seconds(job.problems, 20_000.0) and job.problems == 500
    assert job.seconds_for("grpo") == pytest.approx(240 - recipe.tail_seconds(promised))
    evaluation_of(20.0, job, monkeypatch)
    assert job.measure_seconds == 20.0 and job.report["evaluation"]["sft"]["problems"] == 500
    del job.began["grpo"]
    assert job.seconds_for("grpo") == pytest.approx(240 - 20 - recipe.tail_seconds(20.0))


def test_seconds_of_a_part_are_those_of_all(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation_of(4.0, job, monkeypatch, n=100)
    assert job.measure_seconds == 20.0


def test_late_evaluations_take_fewer_problems_but_never_too_few(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation_of(10.0, job, monkeypatch)
    assert job.affordable(2.0, after=10.0) == 500  # 220 seconds are left
    job.clock.now = 210.0  # type: ignore[attr-defined]
    assert job.affordable(2.0, after=10.0) == 500
    job.clock.now = 220.0  # type: ignore[attr-defined]
    assert job.affordable(2.0, after=10.0) == 250
    job.clock.now = 300.0  # type: ignore[attr-defined]
    assert job.affordable(2.0, after=10.0) == 100
