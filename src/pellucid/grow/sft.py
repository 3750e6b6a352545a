"""Stage 3: fine-tuning on demonstrations that think before they answer. Loss on the assistant's tokens only.

Like what people write, the demonstrations are all right but not all careful: most give the answer "at a glance", some
show every step. Imitation learns both habits in proportion, and a glance is rarely enough for a model of this size.
Which habit pays is not in the data; that is what the next stage finds out.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pellucid import tasks
from pellucid.data import chats, packing
from pellucid.grow import recipe
from pellucid.grow.pretrain import thinned
from pellucid.runtime import dtype_of
from pellucid.train import Loop, LoopConfig

if TYPE_CHECKING:
    from pellucid.grow.job import Job, Result


def run(job: Job) -> Result:
    from pellucid.grow.job import Result

    rows = packing.pack_samples(demonstrations(job), recipe.ROW, overlong="truncate", pad_id=job.tokenizer.pad_id)
    job.model.to(job.plan.device).compute_dtype = dtype_of(job.plan.dtype)

    before = job.measure().pass_at_1
    if job.config.model:
        job.show_samples("given")
    optimizer = recipe.REAL_SFT if job.config.model else recipe.SFT
    config = LoopConfig("sft", seconds=job.loop_seconds("sft", after=job.measure_seconds), save_seconds=recipe.SAVE_SECONDS,
                        rows=recipe.ROWS, optim=replace(optimizer, dtype=job.plan.dtype), schedule=recipe.SFT_SCHEDULE, evaluations=3, seed=job.config.seed)
    loop = Loop(job.model, rows, config, evaluate=job.looked_at, checkpoint=job.stage_folder("sft-checkpoint"),
                resume_hint=job.resume_command)
    history = job.trained("sft", loop)
    scores = job.final_scores("sft")
    details = {"demonstrations": recipe.demonstrations(job.config.minutes), "tokens": history.tokens, "epochs": history.tokens / rows.tokens.numel(),
               "tokens_per_second": history.tokens / history.seconds, "steps": history.steps, "format": scores.format}
    return Result("accuracy on held-out problems", "", True, before, scores.pass_at_1, details,
                  {"loss": thinned(history.losses), "held-out accuracy": [(0.0, before), *history.evaluations]})


def demonstrations(job: Job) -> list[tuple[list[int], list[bool]]]:
    """(ids, mask) of the task demonstrations, and of one's own conversations where given."""
    rng = random.Random(job.config.seed + 1)
    samples = []
    for _ in range(recipe.demonstrations(job.config.minutes)):
        problem = job.mix.sample(rng, "train")
        shown = job.mix.demonstrate(problem, rng)
        if not problem.tools and rng.random() < recipe.AT_A_GLANCE:
            shown = at_a_glance(shown)
        ask = {"role": "user", "content": problem.prompt}
        samples.append(job.tokenizer.encode_chat([ask, {"role": "assistant", "content": shown}]))
        if problem.tools and rng.random() < 0.5:
            samples.append(last_turn_only(job, *tasks.Calculator().follow_up(problem)))
    if job.config.data is not None:
        samples += [job.tokenizer.encode_chat(chat.messages, tools=chat.tools) for chat in chats.read_chats(job.config.data)]
    return samples


def at_a_glance(shown: str) -> str:
    """The same right answer without its steps, as people often write it down."""
    parsed = tasks.parse_completion(shown)
    assert parsed is not None
    return f"<think>\nAt a glance.\n</think>\n\n{parsed.answer}"


def last_turn_only(job: Job, messages: list[dict[str, Any]], shown: str) -> tuple[list[int], list[bool]]:
    """A conversation of several turns of which only the last one is learned."""
    before = len(job.tokenizer.encode_chat(messages, add_generation_prompt=True)[0])
    ids, mask = job.tokenizer.encode_chat([*messages, {"role": "assistant", "content": shown}])
    return ids, [trained and i >= before for i, trained in enumerate(mask)]
