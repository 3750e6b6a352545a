"""The readable WordPiece against `tokenizers` and transformers' BertTokenizer, on text that tokenizers get wrong."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import SAMPLES, TEXTS, older_files, wordpiece

from pellucid.tokenizers import wordpiece as twin
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, pre_tokenizers

SETTINGS = [dict(zip(("lowercase", "strip_accents", "chinese"), values))
            for values in itertools.product((True, False), (None, True, False), (True, False))]


def library_of(vocab: dict[str, int], lowercase: bool = True, strip_accents: bool | None = None, chinese: bool = True,
               longest: int = 100) -> Library:
    tok = Library(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=longest))
    tok.normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=chinese,
                                                strip_accents=strip_accents, lowercase=lowercase)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tok


@pytest.fixture(scope="module")
def trained() -> Library:
    tok = wordpiece()
    tok.no_padding()
    tok.no_truncation()
    return tok


@pytest.fixture(scope="module")
def vocab(trained) -> dict[str, int]:
    return json.loads(trained.to_str())["model"]["vocab"]


@pytest.fixture(scope="module")
def libraries(vocab):
    return [(setting, library_of(vocab, **setting)) for setting in SETTINGS]


def strange_characters() -> set[str]:
    """Characters on whose class the library and Python differ: all younger than the library's tables."""
    plain = library_of({"[UNK]": 0})
    found = set()
    for number in itertools.chain(range(0xD800), range(0xE000, 0x110000)):
        c = chr(number)
        between = f"x{c}y"
        if (plain.normalizer.normalize_str(c) != twin.normalize(c)
                or [word for word, _ in plain.pre_tokenizer.pre_tokenize_str(between)] != twin.cut(between)):
            found.add(c)
    return found


STRANGE = strange_characters()


def test_python_and_the_library_differ_on_young_characters_only():
    known = [c for c in STRANGE if unicodedata.category(c) != "Cn"]
    assert 0 < len(known) < 700 and min(known) > "\u05ff"
    # None of what people write every day: these were all assigned long before.
    for first, last in ((0, 0x5FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1E00, 0x2BFF), (0x3000, 0x9FFF), (0xAC00, 0xD7FF),
                        (0xF900, 0xFFFF), (0x1F000, 0x3FFFF)):
        assert not [hex(ord(c)) for c in STRANGE if first <= ord(c) <= last]


ANY = st.characters(exclude_categories=["Cs"], exclude_characters=sorted(STRANGE))
TRICKY = st.sampled_from([
    "中", "文", "\u3400", "\U00020000", "\U0002b820", "\U0002b920", "\uf900", "\u3007", "、", "é", "e\u0301", "ñ", "İ", "ı", "ß",
    "Σ", "ΑΣ", "ǅ", "ﬁ", "\u0300", "\u0345", "\u1100\u1161", "각", "हिन्दी", "العربية", "ไทย", "😀", "👩‍👩‍👧", "🇨🇳", "\u200b", "\u200d", "\ufeff",
    "\u00ad", "\u2028", "\u0085", "\u00a0", "\u3000", "\x00", "\x0b", "\x1c", "\x7f", "\ufffd", "\ue000", "\t", "\n", "\r\n", " ", "  ",
    "##", "#", "[UNK]", "[SEP]", "$5", "a+b=c", "~`^|<>", "don't", "naïve", "CAFÉ", "x" * 99, "x" * 100, "x" * 101, "é" * 60])
ADVERSARIAL = st.lists(st.text(ANY, max_size=8) | TRICKY, max_size=10).map("".join)


@pytest.mark.parametrize("text", SAMPLES, ids=range(len(SAMPLES)))
def test_ids_equal_the_library(text, vocab, libraries):
    for setting, library in libraries:
        assert twin.encode(text, vocab, **setting) == library.encode(text).ids, setting


@settings(max_examples=400, deadline=None)
@given(text=ADVERSARIAL)
def test_ids_equal_the_library_on_adversarial_text(vocab, libraries, text):
    for setting, library in libraries:
        assert twin.encode(text, vocab, **setting) == library.encode(text).ids, setting
        assert twin.normalize(text, **setting) == library.normalizer.normalize_str(text)


@settings(max_examples=300, deadline=None)
@given(words=st.sets(st.text("abé中#", min_size=1, max_size=4), max_size=40), text=st.text("abé中# ", max_size=30),
       longest=st.integers(1, 8))
def test_greedy_matching_equals_the_library_for_any_vocabulary(words, text, longest):
    vocab = {word: i for i, word in enumerate(["[UNK]", *sorted(words | {f"##{word}" for word in words})])}
    ids = library_of(vocab, longest=longest, strip_accents=False).encode(text).ids
    assert twin.encode(text, vocab, strip_accents=False, longest=longest) == ids


def test_ids_equal_berts_tokenizer(tmp_path, trained, vocab):
    from transformers import BertTokenizer

    for setting in SETTINGS:
        names = {"lowercase": "do_lower_case", "strip_accents": "strip_accents", "chinese": "tokenize_chinese_chars"}
        folder = older_files(trained, tmp_path / "bert", **{names[name]: value for name, value in setting.items()})
        bert = BertTokenizer.from_pretrained(folder)
        for text in TEXTS:
            expected = bert.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert twin.encode(text, vocab, **setting) == expected


def test_decoding_equals_the_library(trained, vocab):
    library, rng = trained, random.Random(0)
    tokens = sorted(vocab, key=vocab.__getitem__)
    for text in SAMPLES:
        ids = twin.encode(text, vocab)
        assert twin.decode(ids, tokens) == library.decode(ids, skip_special_tokens=False)
    for _ in range(300):
        ids = [rng.randrange(len(tokens)) for _ in range(10)]
        assert twin.decode(ids, tokens) == library.decode(ids, skip_special_tokens=False)


def test_small_cases_by_hand():
    vocab = {"[UNK]": 0, "un": 1, "##aff": 2, "##able": 3, "cafe": 4, "中": 5, "!": 6, "##e": 7}
    assert twin.encode("UNAFFABLE!", vocab) == [1, 2, 3, 6]
    assert twin.encode("Café", vocab) == [4] and twin.encode("Café", vocab, strip_accents=False) == [0]
    assert twin.encode("中中", vocab) == [5, 5] and twin.encode("中中", vocab, chinese=False) == [0]
    assert twin.encode("unx", vocab) == [0]  # one part without a token, and the whole word is unknown
    assert twin.encode("Cafe", vocab, lowercase=False) == [0]
