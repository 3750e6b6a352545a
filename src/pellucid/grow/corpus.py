"""The text of the language-modelling stage: one's own folder, or what every machine has, split by content hash."""

from __future__ import annotations

from functools import lru_cache

from pellucid.data import corpora
from pellucid.data.split import divide
from pellucid.errors import BadInput
from pellucid.grow.config import GrowConfig
from pellucid.messages import three_parts

LONG_RUN = 20.0  # minutes from which on the sources are read too: the docstrings alone would be seen many times
MOST_BYTES = 200_000_000
HELDOUT_BYTES = 120_000  # about 40,000 tokens: two stable digits for a second of work


@lru_cache(maxsize=2)
def split_corpus(config: GrowConfig) -> tuple[list[str], list[str]]:
    """Training texts and held-out texts; a text is held out by its content, never by its place."""
    if config.corpus is not None:
        source = corpora.read(config.corpus)
    else:
        source = corpora.standard_library("both" if config.minutes >= LONG_RUN else "docs")
    documents, size = [], 0
    for document in source:
        documents.append(document)
        size += len(document.text)
        if size > MOST_BYTES:
            break
    if size < 100_000:
        raise BadInput(*three_parts("error.corpus", size=f"{size:,}"))
    train, heldout = divide(documents)
    return [d.text for d in train], enough([d.text for d in heldout])


def enough(texts: list[str]) -> list[str]:
    """The first texts up to `HELDOUT_BYTES`: model and baselines are measured on the very same ones."""
    kept, size = [], 0
    for text in texts:
        kept.append(text[: HELDOUT_BYTES - size])
        size += len(kept[-1])
        if size >= HELDOUT_BYTES:
            break
    return kept
