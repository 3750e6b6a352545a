"""Stage 4: GRPO on problems that can be checked. No demonstrations any more: the model's own answers are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pellucid import events
from pellucid.align import formula
from pellucid.align.online import OnlineConfig, OnlineLoop
from pellucid.grow import recipe
from pellucid.grow.pretrain import thinned
from pellucid.runtime import dtype_of

if TYPE_CHECKING:
    from pellucid.grow.job import Job, Result


def run(job: Job) -> Result:
    from pellucid.grow.job import Result

    job.model.to(job.plan.device).compute_dtype = dtype_of(job.plan.dtype)
    before = job.report["evaluation"]["sft"]["pass@1"]

    events.note(formula(recipe.OBJECTIVE))
    seconds = job.loop_seconds("grpo", after=job.measure_seconds + 1.0)
    config = OnlineConfig(
        seconds=seconds, save_seconds=recipe.SAVE_SECONDS, prompts=recipe.prompts(seconds, job.plan.tokens_per_second), group=recipe.GROUP,
        max_tokens=recipe.MAX_TOKENS, objective=recipe.OBJECTIVE, weights=recipe.REWARDS,
        optim=recipe.REAL_GRPO if job.config.model else recipe.GRPO, schedule=recipe.GRPO_SCHEDULE, seed=job.config.seed)
    loop = OnlineLoop(job.model, job.tokenizer, recipe.training_mix(), config, evaluate=job.looked_at,
                      checkpoint=job.stage_folder("grpo-checkpoint"), resume_hint=job.resume_command)
    history = job.trained("grpo", loop)
    scores = job.final_scores("grpo")
    job.report["groups"] = loop.shown_groups
    details = {"steps": history.steps, "sampled_tokens": history.sampled,
               "sampling_tokens_per_second": history.sampled / max(history.sampling_seconds, 1e-9),
               "sampling_share": history.sampling_seconds / max(history.seconds, 1e-9), "format": scores.format,
               "objective": formula(recipe.OBJECTIVE)}
    curves = {"held-out accuracy": [(0.0, before), *history.evaluations]}
    for name in ("accuracy", "format", "length/mean", "entropy/mean", "groups/live"):
        curves[name] = thinned([(p, m[name]) for p, m in history.metrics if m.get(name) == m.get(name) and name in m])
    return Result("accuracy on held-out problems", "", True, before, scores.pass_at_1, details, curves)
