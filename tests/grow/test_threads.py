"""How many threads a job takes: all cores, or half of them where other work keeps the cores busy; and the same when it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pellucid.grow import memory, plan, recipe
from pellucid.grow.config import GrowConfig
from pellucid.grow.job import Job
from pellucid.runtime import Choice

SPEC = recipe.model_spec(recipe.LADDER[0])
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def beside_others(monkeypatch: pytest.MonkeyPatch, speeds: dict[int, float], cores: int = 4, device: torch.device = CPU) -> Choice:
    """The choice where training runs at these tokens/s by number of threads; the number in force when it is called decides."""
    monkeypatch.setattr(plan, "training_speed", lambda *a: speeds[torch.get_num_threads()])
    torch.set_num_threads(cores)
    return plan.threads_beside_others(Choice(cores, "usable"), SPEC, device, torch.float32)


@pytest.mark.parametrize(("half", "taken"), [(900.0, 4), (1000.0, 4), (1099.0, 4), (1101.0, 2), (5000.0, 2)])
def test_half_of_the_cores_where_training_is_clearly_faster_so(monkeypatch: pytest.MonkeyPatch, half: float, taken: int) -> None:
    choice = beside_others(monkeypatch, {2: half, 4: 1000.0})
    assert choice.value == torch.get_num_threads() == taken
    if taken == 4:
        assert choice.reason == "usable"
    else:
        assert choice.text is not None and all(f"{n:.0f}" in text for n in (half, 1000.0, 4) for text in choice.text)


@pytest.mark.parametrize(("cores", "device"), [(1, CPU), (4, torch.device("cuda"))])
def test_one_core_and_a_gpu_measure_nothing(monkeypatch: pytest.MonkeyPatch, cores: int, device: torch.device) -> None:
    choice = beside_others(monkeypatch, {}, cores, device)
    assert (choice.value, torch.get_num_threads()) == (cores, cores)


def test_the_mean_of_all_steps_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of them would be a step in which nobody disturbed."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(plan.time, "perf_counter", lambda: float(next(ticks) ** 2))  # each step is slower than the one before
    best, mean = (plan.training_speed(SPEC, CPU, torch.float32, 2000.0, sustained) for sustained in (False, True))
    assert best > 1.5 * mean
    asked: list[Any] = []
    monkeypatch.setattr(plan, "training_speed", lambda *a: asked.append(a[4]) or 1.0)
    plan.threads_beside_others(Choice(2, ""), SPEC, CPU, torch.float32)
    assert asked == [True, True]


def four_cores(asked: int | None = None) -> Choice:
    torch.set_num_threads(asked or 4)
    return Choice(asked or 4, "usable")


@pytest.mark.parametrize(("asked", "taken"), [(None, 2), (4, 4)])
def test_the_plan_tells_its_threads_and_leaves_those_that_were_given(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: int | None, taken: int) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: None)
    monkeypatch.setattr(plan, "compile_kernels", lambda spec, device: Choice("pytorch", ""))
    monkeypatch.setattr(plan, "choose_threads", four_cores)
    monkeypatch.setattr(plan, "training_speed", lambda *a: 1000.0 / torch.get_num_threads())
    made = plan.make_plan(GrowConfig(minutes=8, out=tmp_path, threads=asked))
    assert made.threads == torch.get_num_threads() == taken
    assert next(c["value"] for c in made.choices if c["name"] == "threads") == str(taken)


@pytest.mark.parametrize(("asked", "taken"), [(None, 3), (1, 1)])
def test_a_resumed_job_has_the_threads_of_its_plan_unless_others_are_given(tmp_path: Path, asked: int | None, taken: int) -> None:
    """Sums over another number of threads round differently: what goes on would not be what was interrupted."""
    job = Job(GrowConfig(out=tmp_path))
    job.plan = plan.Plan([], {}, 1.0, {}, [], threads=3)
    job._save_state()
    torch.set_num_threads(2)
    Job(GrowConfig(out=tmp_path, resume=True, threads=asked))._open()
    assert torch.get_num_threads() == taken
