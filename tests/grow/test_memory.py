"""Memory: each stage's own peak, a prediction that covers it, and a refusal before work where it cannot fit."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import report_fixture
import torch

from pellucid import runtime
from pellucid.errors import BadInput
from pellucid.grow import memory, plan, report
from pellucid.grow.config import GrowConfig
from pellucid.grow.job import Job
from pellucid.grow.memory import MIB, StageMemory, Work, memory_of
from pellucid.grow.recipe import LADDER, STAGES, model_spec
from pellucid.nn import count_parameters


def test_a_stage_is_not_charged_with_the_peak_of_the_one_before() -> None:
    block = bytearray(300 * MIB)
    del block
    before = StageMemory("cpu")
    if not sys.platform.startswith("linux"):
        assert before.whole and (before.peak or 0) >= 0
        return
    assert not before.whole
    start = before.peak
    block = bytearray(200 * MIB)
    del block
    assert 190 * MIB < before.peak - start < 250 * MIB
    after = StageMemory("cpu")
    assert after.peak < start + 50 * MIB


def test_where_a_peak_cannot_begin_again_it_is_told_as_the_peak_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "reset_peak_memory", lambda: False)
    assert StageMemory("cpu").whole
    told = report_fixture.report()
    assert "so far" not in report.render(told, "en")
    told["stages"][2]["memory_peak_so_far"] = True
    assert report.render(told, "en").count("so far") == 1


def test_the_machine_tells_what_is_available() -> None:
    free, total = runtime.available_memory_bytes(), runtime._kib("/proc/meminfo", "MemTotal")
    assert (free is None) == (total is None) and (free is None or 0 < free < total)


def test_predicted_memory_grows_with_the_work() -> None:
    for stage in STAGES[1:]:
        sizes = [memory_of(model_spec(rung), stage, Work()) for rung in LADDER]
        assert sizes == sorted(sizes) and sizes[0] < sizes[-1], stage
        most = memory_of(model_spec(LADDER[-1]), stage, Work())
        assert most > 4 * count_parameters(model_spec(LADDER[-1])), "the weights alone"
    spec, work = model_spec(LADDER[2]), Work()
    assert memory_of(spec, "sft", replace(work, problems=24)) < memory_of(spec, "sft", work)
    assert memory_of(spec, "grpo", replace(work, prompts=2, problems=24)) < memory_of(spec, "grpo", work)
    assert memory_of(spec, "sft", replace(work, bytes=2, steps=10)) < memory_of(spec, "sft", replace(work, bytes=2, steps=300))
    assert memory.kernels("tools", replace(work, bytes=2, steps=10**6)) == memory.KERNELS * memory.KERNEL, "its cache has an end"
    assert memory_of(spec, "pretrain", replace(work, corpus=10**8)) > memory_of(spec, "pretrain", work) + 10**8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the peak of a stage")
@pytest.mark.parametrize("rung", [2, 4])
def test_predicted_activations_are_those_of_a_step(rung: int) -> None:
    """Weights, gradients, optimizer state and activations of a training step, within a third of what the system tells."""
    spec = model_spec(LADDER[rung])
    plan.training_speed(model_spec(LADDER[0]), torch.device("cpu"), torch.float32, 0.0)  # what the first step ever loads
    peak = StageMemory("cpu")
    start = peak.peak
    plan.training_speed(spec, torch.device("cpu"), torch.float32, 0.0)
    rows, row = plan.recipe.ROWS, plan.recipe.ROW
    predicted = 4 * 4 * count_parameters(spec) + memory.activations(spec, rows * row, row, 4)
    assert 0.67 < predicted / (peak.peak - start) < 1.5


def test_a_job_that_cannot_fit_is_refused_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "training_speed", lambda *a: 5000.0)
    for given, help in ((None, "--minutes"), ("some/model", "smaller checkpoint")):
        monkeypatch.setattr(memory, "available_memory_bytes", lambda: 10 * MIB)
        with pytest.raises(BadInput, match="does not fit into memory") as refused:
            plan.make_plan(GrowConfig(minutes=8, out=tmp_path / "run", threads=1, model=given))
        assert help in refused.value.next and "GiB" in refused.value.why
    with pytest.raises(BadInput, match="memory"):
        Job(GrowConfig(out=tmp_path / "run", threads=1)).run()
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: None)  # a system that does not tell refuses nothing
    made = plan.make_plan(GrowConfig(minutes=8, out=tmp_path / "run", threads=1))
    base = runtime.resident_bytes() or 0
    assert all(s["memory_bytes"] > 0.5 * base for s in made.stages)
