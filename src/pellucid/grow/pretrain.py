"""Stage 2: language modelling on raw text, measured in bits per byte against compressors and an n-gram model."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pellucid import tasks
from pellucid.data import baselines, packing
from pellucid.grow import recipe
from pellucid.grow.corpus import split_corpus
from pellucid.nn import Decoder, init_weights
from pellucid.runtime import dtype_of
from pellucid.tokenizers import Tokenizer
from pellucid.train import Loop, LoopConfig, bits_per_byte, held_out_loss, token_bytes

if TYPE_CHECKING:
    from pellucid.grow.job import Job, Result


def run(job: Job) -> Result:
    from pellucid.grow.job import Result

    train, heldout = split_corpus(job.config)
    rows = training_rows(job, train)
    test = heldout_rows(job.tokenizer, heldout)
    job.report["baselines"] = _baselines(train, heldout)
    job.model = init_weights(Decoder(recipe.model_spec(job.plan.shape, vocab=job.tokenizer.vocab_size)), job.config.seed)
    job.model.to(job.plan.device).compute_dtype = dtype_of(job.plan.dtype)
    sizes = token_bytes(job.tokenizer)

    def evaluate() -> tuple[str, float, dict[str, Any]]:
        nats, _ = held_out_loss(job.model, test)
        return "bits per byte", bits_per_byte(nats, test.labels, sizes), {}

    before = evaluate()[1]
    config = LoopConfig("pretrain", seconds=job.loop_seconds("pretrain"), save_seconds=recipe.SAVE_SECONDS,
                        rows=recipe.ROWS, optim=replace(recipe.PRETRAIN, dtype=job.plan.dtype), schedule=recipe.PRETRAIN_SCHEDULE, seed=job.config.seed)
    loop = Loop(job.model, rows, config, evaluate=evaluate, checkpoint=job.stage_folder("pretrain-checkpoint"),
                resume_hint=job.resume_command)
    history = job.trained("pretrain", loop)
    details = {"tokens": history.tokens, "tokens_per_second": history.tokens / history.seconds,
               "epochs": history.tokens / rows.tokens.numel(), "steps": history.steps}
    return Result("bits per byte on held-out text", "bpb", False, before, history.evaluations[-1][1], details,
                  {"loss": thinned(history.losses), "held-out bits per byte": [(0.0, before), *history.evaluations]})


def training_rows(job: Job, train: list[str]) -> packing.Packed:
    """The corpus and a share of facts, in rows without padding."""
    end = [job.tokenizer.pad_id]
    texts = [ids + end for ids in job.tokenizer.encode_each(train)]
    total = sum(map(len, texts))
    rng = random.Random(job.config.seed)
    facts, have = [], 0
    while have < recipe.FACTS_SHARE / (1 - recipe.FACTS_SHARE) * total:
        batch = [ids + end for ids in job.tokenizer.encode_each([tasks.facts(rng) for _ in range(200)])]
        facts += batch
        have += sum(map(len, batch))
    mixed = texts + facts
    rng.shuffle(mixed)
    return packing.pack_stream(mixed, recipe.ROW)


def heldout_rows(tokenizer: Tokenizer, heldout: list[str]) -> packing.Packed:
    return packing.pack_stream(tokenizer.encode_each(heldout), recipe.ROW, remainder="pad", pad_id=tokenizer.pad_id)


def _baselines(train: list[str], heldout: list[str]) -> dict[str, float]:
    measured = baselines.measure("\n\n".join(train).encode(), "\n\n".join(heldout).encode())
    return {"gzip -9": measured.gzip, "xz": measured.xz, f"byte {measured.order}-gram": measured.ngram}


def thinned(points: list[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbours."""
    size = max(1, -(-len(points) // most))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(p for p, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]
