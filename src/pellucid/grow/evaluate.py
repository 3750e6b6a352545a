"""Stage 6: pass@k of the stages, by sampling; format, reasoning and length apart, so that none passes for another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pellucid.models import load

if TYPE_CHECKING:
    from pellucid.grow.job import Job, Result

K = 8


def run(job: Job) -> Result:
    from pellucid.grow.job import Result

    n = max(8, job.affordable(2 * K / 10, after=5.0) // 10)
    rates = {}
    for name in ("sft", "grpo"):
        model = load(job.stage_folder(name))
        sampled = job.measure(model, n, K, seed=3)
        job.report["evaluation"][name] |= {f"pass@{K}": sampled.pass_at_k, "sampled pass@1": sampled.pass_at_1}
        rates[name] = sampled.pass_at_k
    return Result(f"pass@{K} on held-out problems, sampled", "", True, rates["sft"], rates["grpo"], {"problems": n})
