"""A tokenizer of ours, and one of each family as the Hub has them."""

from __future__ import annotations

import pytest
from tokenizer_samples import FAMILIES, TEXTS

from pellucid.tokenizers import train_bpe


@pytest.fixture(scope="session")
def ours():
    """A tokenizer of ours, of 700 ids."""
    return train_bpe(TEXTS, 700)


@pytest.fixture(scope="session")
def saved(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    ours.save(folder)
    return folder


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, the library's tokenizer, the folder of its file)."""
    tok = FAMILIES[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    tok.save(str(folder / "tokenizer.json"))
    tok.no_padding()
    tok.no_truncation()
    return request.param, tok, folder
