"""Stage 1: a byte-level BPE tokenizer trained on the corpus and on task texts.

Numbers: the split pattern cuts digits in pairs, and every pair 00 ... 99 is one token. A whole number below 100 is then
one symbol that the model can learn facts about; with single digits the same tasks are much harder at this size.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pellucid import tasks
from pellucid.grow import recipe
from pellucid.grow.corpus import split_corpus
from pellucid.tokenizers import train_bpe

if TYPE_CHECKING:
    from pellucid.grow.job import Job, Result


def run(job: Job) -> Result:
    from pellucid.grow.job import Result

    train, heldout = split_corpus(job.config)
    job.tokenizer = train_bpe((text for text in _texts(job, train)), recipe.VOCAB)
    job.stage_folder("tokenizer").mkdir(parents=True, exist_ok=True)
    job.tokenizer.save(job.stage_folder("tokenizer"))
    heldout_bytes = sum(len(t.encode()) for t in heldout)
    tokens = sum(map(len, job.tokenizer.encode_each(heldout)))
    details = {"corpus_bytes": sum(len(t.encode()) for t in train), "heldout_bytes": heldout_bytes,
               "vocabulary": job.tokenizer.vocab_size}
    return Result("bytes per token on held-out text", "bytes", True, 1.0, heldout_bytes / tokens, details)


def _texts(job: Job, train: list[str]) -> Iterator[str]:
    """The corpus, then a tenth as much of problems, demonstrations and facts (of the training side only)."""
    yield from train
    rng = random.Random(job.config.seed)
    enough = max(100_000, sum(map(len, train)) // 10)
    while enough > 0:
        problem = job.mix.sample(rng, "train")
        text = f"{problem.prompt}\n{job.mix.demonstrate(problem, rng)}\n{tasks.facts(rng)}"
        enough -= len(text)
        yield text
