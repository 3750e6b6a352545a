"""A tokenizer of a few hundred ids and a tiny decoder, made once."""

from __future__ import annotations

import pytest
from tiny_decoders import decoder

from pellucid.tokenizers import patterns, train_bpe

TEXTS = ["user assistant think\nuser\n\nassistant\n hello world, hello worlds: 12 + 30 = 42"] * 3


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe(TEXTS, 280, patterns.QWEN_PATTERN)


@pytest.fixture(scope="session")
def model():
    return decoder()
