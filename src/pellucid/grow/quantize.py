"""Stage 5: INT8 weights, and what they cost in bits per byte, accuracy, size and speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pellucid import quant
from pellucid.engine.native_batch import choose_step
from pellucid.grow import recipe
from pellucid.grow.corpus import split_corpus
from pellucid.grow.pretrain import heldout_rows
from pellucid.models import save
from pellucid.train import bits_per_byte, held_out_loss, token_bytes

if TYPE_CHECKING:
    from pellucid.grow.job import Job, Result
    from pellucid.nn import Decoder

OTHERS = 11.0  # seconds of everything else from here on: speeds, tool calls, the report


def run(job: Job) -> Result:
    from pellucid.grow.job import Result

    job.model.compute_dtype = None  # float32 activations: what is served, and what INT8 is compared with
    job.model.to("cpu")
    generation = {"eos_token_id": job.tokenizer.end_of_turn_id, "pad_token_id": job.tokenizer.pad_id}
    save(job.model, job.folder / "model", tokenizer=job.tokenizer, generation=generation)
    small = quant.quantize(job.model)
    quant.compress(job.folder / "model", job.folder / "model-int8")
    bpb = {} if job.config.model else text_cost(job, {"float32": job.model, "int8": small})
    n = job.affordable(recipe.AT_THE_END, after=OTHERS)
    before, scores = job.final_scores("float32", job.model, n), job.final_scores("int8", small, n)
    job.show_samples("int8", small)
    details = {"bits_per_byte": bpb, **quant.measure(job.model, small, batches=(1, 8) if job.config.model else (1, 64), step_of=lambda m: choose_step(m).value)}
    return Result("accuracy on held-out problems, INT8 weights", "", True, before.pass_at_1, scores.pass_at_1, details)


def text_cost(job: Job, models: dict[str, Decoder]) -> dict[str, float]:
    """Bits per byte of the held-out text that pretraining was measured on. (A given checkpoint was not pretrained here.)"""
    rows, sizes = heldout_rows(job.tokenizer, split_corpus(job.config)[1]), token_bytes(job.tokenizer)
    return {name: bits_per_byte(held_out_loss(m, rows)[0], rows.labels, sizes) for name, m in models.items()}
