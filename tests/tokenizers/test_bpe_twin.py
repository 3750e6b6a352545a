"""The readable twin against rustbpe (training), tiktoken, `tokenizers` and transformers (ids)."""

from __future__ import annotations

import random
import unicodedata

import pytest
import rustbpe
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import SAMPLES, TEXTS, WORDS

from pellucid.errors import BadInput
from pellucid.tokenizers import PELLUCID_PATTERN, bpe, engines, patterns, train_bpe
from pellucid.tokenizers.train import DIGIT_PAIRS, cuts_digits_in_pairs

# The twin's `regex` knows letters younger than the fast libraries do (see bpe.py): leave those out.
OLD = st.characters(exclude_categories=["Cs", "Cn"])
FEW = st.sampled_from("aab 你好😀é1\n'")
TEXT = st.text(OLD, max_size=40) | st.text(FEW, max_size=80)


def learned_by_rustbpe(texts, size, pattern=PELLUCID_PATTERN):
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), size, pattern=pattern)
    return [bytes(token) for token, _ in trainer.get_mergeable_ranks()]


def twin_of(tokenizer):
    """The merges of a tokenizer of ours as the twin takes them: (id, id) -> id."""
    words = tokenizer.source.data["model"]
    return {(words["vocab"][left], words["vocab"][right]): words["vocab"][left + right]
            for left, right in words["merges"]}


@pytest.mark.parametrize("pattern", patterns.KNOWN_PATTERNS, ids=patterns.KNOWN_PATTERNS.get)
def test_training_equals_rustbpe(pattern):
    merges = bpe.train(TEXTS, 700, pattern)
    assert len(merges) == 700 - 256
    assert bpe.token_bytes(merges) == learned_by_rustbpe(TEXTS, 700, pattern)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, max_size=4))
def test_training_equals_rustbpe_on_any_text(texts):
    assert bpe.token_bytes(bpe.train(texts, 400)) == learned_by_rustbpe(texts, 400)


def test_ties_go_to_the_smallest_pair():
    assert list(bpe.train(["zy ab mn"], 260, r"\S+")) == [(97, 98), (109, 110), (122, 121)]
    assert bpe.token_bytes(bpe.train(["zy ab mn"], 260, r"\S+")) == learned_by_rustbpe(["zy ab mn"], 260, r"\S+")


def test_ids_equal_four_libraries(ours, saved):
    from transformers import AutoTokenizer

    from tokenizers import Tokenizer as Library

    library = Library.from_file(str(saved / "tokenizer.json"))
    library.encode_special_tokens = True
    transformer = AutoTokenizer.from_pretrained(saved)
    merges = twin_of(ours)
    ranks = {token: i for i, token in enumerate(bpe.token_bytes(merges))}
    tik = tiktoken.Encoding("t", pat_str=PELLUCID_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in SAMPLES:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allow_special=True) == transformer.encode(text, add_special_tokens=False)
        if not any(word in text for word in WORDS):  # the twin has no added tokens
            assert bpe.encode(text, merges) == ours.encode(text) == tik.encode_ordinary(text)


@settings(max_examples=200, deadline=None)
@given(text=TEXT.filter(lambda text: not any(word in text for word in WORDS)))
def test_ids_equal_on_any_text(ours, text):
    merges = twin_of(ours)
    ids = ours.encode(text)
    assert bpe.encode(text, merges) == ids
    assert bpe.decode(ids, merges) == ours.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(piece=st.binary(min_size=1, max_size=60) | st.text(FEW, min_size=1).map(lambda text: text.encode()[:-1] or b"\xf0"))
def test_broken_bytes(ours, piece):
    """Bytes that are no UTF-8, as one piece and decoded."""
    merges = twin_of(ours)
    ids = bpe.encode_piece(piece, merges)
    assert ids == ours._engine._encoding._encode_single_piece(piece)
    assert b"".join(map(ours.token_bytes, ids)) == piece
    assert ours.decode(ids) == bpe.decode(ids, merges) == piece.decode(errors="replace")


def test_broken_ids_decode_like_the_library(ours, saved):
    from tokenizers import Tokenizer as Library

    library, rng = Library.from_file(str(saved / "tokenizer.json")), random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(12))]
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids, skip_special=True) == library.decode(ids)


@pytest.mark.parametrize("size", [365, 366, 500, 700])
def test_exact_size_and_every_pair_of_digits(size):
    tok = train_bpe(TEXTS, size)
    assert tok.vocab_size == size == max(tok.source.data["model"]["vocab"].values()) + 1 + 9
    for n in range(100):
        assert tok.encode(f"{n:02d}") == [256 + n]
    assert tok.encode("x = 1234567") [-4:] == [256 + 12, 256 + 34, 256 + 56, ord("7")]


def test_the_forced_pairs_change_no_other_merge():
    digits = set(DIGIT_PAIRS)
    free = [token for token in bpe.token_bytes(bpe.train(TEXTS, 800))[256:] if token not in digits]
    tok = train_bpe(TEXTS, 700)
    forced = [tok.token_bytes(i) for i in range(256, 700 - 9)]
    assert forced[:100] == DIGIT_PAIRS
    assert forced[100:] == free[:700 - 9 - 356]


def test_pairs_are_forced_only_where_they_stand_alone():
    names = {name for pattern, name in patterns.KNOWN_PATTERNS.items() if cuts_digits_in_pairs(pattern)}
    assert names == {"pellucid"}
    tok = train_bpe(TEXTS, 600, patterns.QWEN_PATTERN)
    assert tok.vocab_size == 600 and tok.encode("42") == [ord("4"), ord("2")]


def test_a_stream_is_read_once_and_not_gathered():
    alive, most = 0, 0

    class Text(str):
        def __init__(self, *_):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    train_bpe((Text(f"word{i % 977} number {i:o} and {i * i} {TEXTS[0][i % 900:][:20]} 你好") for i in range(20_000)), 400)
    assert most < 1000


@pytest.mark.parametrize("texts, size, says", [
    ([], 400, "no text"), (["", ""], 400, "no text"), (["hello"], 400, "at most"), (TEXTS, 364, "365"),
    ("one string", 400, "one string"), ([b"bytes"], 400, "bytes"), (5, 400, "int")])
def test_what_cannot_be_trained_is_refused(texts, size, says):
    with pytest.raises(BadInput) as error:
        train_bpe(texts, size)
    assert says in str(error.value)


def test_the_advice_about_too_little_text_works():
    with pytest.raises(BadInput) as error:
        train_bpe(["hello hello world"], 1000)
    size = int(error.value.next.split()[-1])
    assert train_bpe(["hello hello world"], size).vocab_size == size


def test_lone_surrogates_become_replacement_characters(ours):
    assert ours.decode(ours.encode("a\ud800b")) == "a\ufffdb"
    assert ours.encode("\ud83d\ude00") == ours.encode("😀")
    assert train_bpe([*TEXTS, "x\udcff"], 400).vocab_size == 400


def test_the_engines_agree_on_every_character():
    """tiktoken's classes and the library's are the same, for all of Unicode; the twin's where Python knows it."""
    from tokenizers import Regex, pre_tokenizers

    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF)
    known = "".join(c for c in everything if unicodedata.category(c) != "Cn")
    ranks = {bytes([b]): b for b in range(256)}
    for kind in (r"\p{L}", r"\p{N}", r"\p{M}", r"\s", r"\p{Lu}", "(?i:s)"):
        tik = tiktoken.Encoding("t", pat_str=f"{kind}+", mergeable_ranks=ranks, special_tokens={})
        fast = tik.decode(tik.encode_ordinary(everything))
        split = pre_tokenizers.Split(Regex(f"{kind}+"), "removed", invert=True)
        # In slices: the library is several times faster on short texts.
        slices = [everything[i:i + 4096] for i in range(0, len(everything), 4096)]
        assert fast == "".join(piece for part in slices for piece, _ in split.pre_tokenize_str(part))
        if kind != r"\p{Lu}":
            assert "".join(bpe.regex.findall(kind, known)) == "".join(c for c in fast if unicodedata.category(c) != "Cn")


def test_white_space_at_which_tiktoken_panics(ours, monkeypatch):
    """Texts with longer runs of white space are cut by the twin's expressions: the ids stay the same."""
    huge = "a" + " " * 1_200_000 + "b"
    assert ours.decode(ours.encode(huge)) == huge
    expected = [ours.encode(text) for text in SAMPLES]
    monkeypatch.setattr(engines, "LONGEST_SPACE", 0)
    assert [ours.encode(text) for text in SAMPLES] == expected
