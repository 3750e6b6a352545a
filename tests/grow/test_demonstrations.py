"""What fine-tuning learns from: right answers, most at a glance, tool calls never; of a conversation the last turn only."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pellucid.grow import recipe, sft
from pellucid.grow.config import GrowConfig
from pellucid.grow.job import Job
from pellucid.tokenizers import train_bpe


def test_demonstrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "demonstrations", lambda minutes: 400)
    job, rng = Job(GrowConfig(out=tmp_path)), random.Random(0)
    problems = [job.mix.sample(rng, "train") for _ in range(60)]
    job.tokenizer = train_bpe([f"{p.prompt}\n{job.mix.demonstrate(p, rng)}" for p in problems], 400)
    whole, learned = [], []
    for ids, mask in sft.demonstrations(job):
        whole.append(job.tokenizer.decode(ids))
        learned.append(job.tokenizer.decode([i for i, trained in zip(ids, mask, strict=True) if trained]))
    calls = [text for text in learned if "<tool_call>" in text]
    after = [text for text, asked in zip(learned, whole, strict=True) if "<tool_response>" in asked]
    plain = [text for text in learned if text not in calls and text not in after]
    assert all(text.count("</think>") == 1 for text in learned)  # one turn of each
    assert not set(calls) & set(after) and len(after) > 0.3 * len(calls) > 10
    assert not any("At a glance" in text for text in calls + after)
    assert sum("At a glance" in text for text in plain) / len(plain) == pytest.approx(recipe.AT_A_GLANCE, abs=0.1)
