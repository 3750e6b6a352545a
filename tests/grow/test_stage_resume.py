"""The stages of the main job themselves, stopped and gone on with: the same weights as without the stop, bit for bit.

Only the budget differs from a real job: steps instead of seconds, so that the clock decides nothing.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pellucid import events
from pellucid.align.reward_sources import TaskGrader
from pellucid.errors import Interrupted
from pellucid.events import plain
from pellucid.grow import recipe
from pellucid.grow.config import GrowConfig
from pellucid.grow.job import FILES, Job
from pellucid.grow.plan import Plan
from pellucid.models import save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.tokenizers import train_bpe

STEPS = 4
BEFORE = {"pretrain": ("tokenizer",), "sft": ("tokenizer", "pretrain"), "grpo": ("tokenizer", "pretrain", "sft")}
CONFIGS = {"pretrain": "LoopConfig", "sft": "LoopConfig", "grpo": "OnlineConfig"}


@pytest.fixture(autouse=True)
def steps_instead_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage, name in CONFIGS.items():
        module = importlib.import_module(f"pellucid.grow.{FILES[stage]}")
        made = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, made=made, **k: made(*a, **(k | {"seconds": None, "steps": STEPS})))
    monkeypatch.setattr("pellucid.grow.pretrain._baselines", lambda train, heldout: {})  # seconds, and no part of the training
    monkeypatch.setattr(recipe, "demonstrations", lambda minutes: 60)
    monkeypatch.setattr(recipe, "problems", lambda minutes, speed: 4)
    monkeypatch.setattr(recipe, "MAX_TOKENS", 12)
    # An untrained model solves nothing, and groups without a difference teach nothing: its letters are graded instead.
    def letters(self: TaskGrader, completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[dict[str, float]]:
        return [dict.fromkeys(self.names, 0.0) | {"format": float(sum(ids) % 2), "correct": float(sum(ids) % 3 == 0)} for ids in completion_ids]

    monkeypatch.setattr(TaskGrader, "__call__", letters)


def prepared(folder: Path, stage: str, dtype: str) -> None:
    """A job that was stopped before `stage`: what the stages before it leave in the folder."""
    rng, mix = random.Random(0), recipe.task_mix()
    texts = [f"{p.prompt}\n{mix.demonstrate(p, rng)}" for p in (mix.sample(rng, "train") for _ in range(100))]
    tokenizer = train_bpe(texts, 400)
    (folder.parent / "corpus.txt").write_text(("\n\n".join(texts) * 100)[:110_000], encoding="utf-8")
    spec = DecoderSpec(400, 32, (Layer(Attn(2, 1, 16, Rope(16), qk_norm=True), MLP(48)),) * 2, tied=True, context=512, family="qwen3")
    job = Job(config_of(folder))
    job.plan = Plan([], {}, 1.0, {}, [{"stage": s, "seconds": 1.0, "memory_bytes": 0} for s in recipe.STAGES], "cpu", dtype,
                    shape=[32, 2, 2, 1, 48], tokens_per_second=100.0)
    job.report, job.done = {"prompts": [], "stages": [], "evaluation": {"sft": {"pass@1": 0.0}}}, list(BEFORE[stage])
    job.stage_folder("tokenizer").mkdir(parents=True)
    tokenizer.save(job.stage_folder("tokenizer"))
    if stage != "pretrain":
        save(init_weights(Decoder(spec), 5), job.stage_folder(job.done[-1]), tokenizer=tokenizer)
    job._save_state()


def config_of(folder: Path, resume: bool = False) -> GrowConfig:
    return GrowConfig(minutes=1, out=folder, threads=1, corpus=folder.parent / "corpus.txt", resume=resume)


def gone_on(folder: Path, stage: str, stop_at: int | None = None, seen: list[int] | None = None) -> tuple[Job, Any]:
    """The stage in a job that is opened again, stopped in a step or run to its end: the job and the stage's result."""
    job = Job(config_of(folder, resume=True))
    job._open()

    def reader(event: Any) -> None:
        if event.kind == "step" and seen is not None:
            seen.append(event.step)
        if event.kind == "step" and event.step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    with events.subscribed(reader):
        return job, importlib.import_module(f"pellucid.grow.{FILES[stage]}").run(job)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", CONFIGS)
def test_a_stage_that_stops_and_goes_on_equals_one_that_does_not_bit_for_bit(stage: str, dtype: str, tmp_path: Path) -> None:
    for name in ("straight", "broken"):
        prepared(tmp_path / name, stage, dtype)
    straight, expected = gone_on(tmp_path / "straight", stage)
    steps: list[int] = []
    for stop_at in (1, 3):
        with pytest.raises(Interrupted) as told:
            gone_on(tmp_path / "broken", stage, stop_at, steps)
        assert f"step {stop_at}" in told.value.what and told.value.next.endswith("--resume")
        torch.manual_seed(stop_at)  # a new process has generators of its own
        random.seed(stop_at)
    broken, result = gone_on(tmp_path / "broken", stage, seen=steps)
    assert steps == [1, 2, 3, 4], "no step was made twice"

    given = init_weights(Decoder(straight.model.spec), straight.config.seed if stage == "pretrain" else 5)
    moved = [not torch.equal(a, b) for a, b in zip(straight.model.parameters(), given.parameters(), strict=True)]
    assert all(moved), "a stage that changes nothing proves nothing"
    for a, b in zip(straight.model.parameters(), broken.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (result.before, result.after, result.details["steps"]) == (expected.before, expected.after, STEPS)
    assert plain(result.curves) == plain(expected.curves)
    assert plain(broken.report.get("groups")) == plain(straight.report.get("groups"))
