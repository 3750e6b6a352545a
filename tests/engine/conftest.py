"""A tokenizer of a few hundred ids and a tiny decoder, made once."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
from several import LAYOUTS, ROOMY
from tiny_decoders import decoder

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from tiny_splits import checkpoint
from tiny_splits import tokenizer as tiny_tokenizer

from pellucid.engine.config import EngineConfig
from pellucid.engine.fleet import Fleet
from pellucid.engine.layout import Layout
from pellucid.models.hub import read_config, spec_of
from pellucid.parallel import Processes
from pellucid.tokenizers import patterns, train_bpe

TEXTS = ["user assistant think\nuser\n\nassistant\n hello world, hello worlds: 12 + 30 = 42"] * 3


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe(TEXTS, 280, patterns.QWEN_PATTERN)


@pytest.fixture(scope="session")
def model():
    return decoder()


# --- engines of several processes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs():
    """Processes by their links, made when first asked for."""
    made = {}

    def of(layout: Layout) -> Processes:
        key = tuple(layout.links)
        if key not in made:
            made[key] = Processes("pellucid.engine.worker", layout.processes, layout.links, threads=1)
        return made[key]

    yield of
    for processes in made.values():
        processes.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return functools.cache(lambda family: checkpoint(family, tmp_path_factory.mktemp(family) / "model"))


@pytest.fixture
def fleet_of(pairs, folders):
    open_now = []

    def of(family: str | Path, kind: str, config: EngineConfig = ROOMY, **options) -> Fleet:
        """family: or a folder."""
        layout, folder = LAYOUTS[kind], folders(family) if isinstance(family, str) else family
        open_now.append(Fleet(folder, layout, spec_of(read_config(folder)), tiny_tokenizer(), config, processes=pairs(layout), **options))
        return open_now[-1]

    of.close_all = lambda: [fleet.close() for fleet in open_now]
    yield of
    of.close_all()
