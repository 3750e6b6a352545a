"""Damaged and hostile tokenizer files: refused with a reason, never a crash, a hang, or another token's id."""

from __future__ import annotations

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import FAMILIES, SAMPLES, byte_level, clip, unigram, wordpiece

from pellucid.errors import BadInput
from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.engines import unknown_token
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library


def load(folder, content) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    raw = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode()
    (folder / "tokenizer.json").write_bytes(raw)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def file() -> dict:
    return json.loads(byte_level(None, size=400).to_str())


def vocab(d):
    return d["model"]["vocab"]


DAMAGES = {
    "an id twice": lambda d: vocab(d).update({"Ġt": 5}),
    "an id below zero": lambda d: vocab(d).update({"qq": -1}),
    "an absurd id": lambda d: vocab(d).update({"qq": 1 << 31}),
    "a more absurd id": lambda d: vocab(d).update({"qq": 10 ** 30}),
    "an id that is text": lambda d: vocab(d).update({"qq": "7"}),
    "an id that is true": lambda d: vocab(d).update({"qq": True}),
    "an id with a fraction": lambda d: vocab(d).update({"qq": 1.5}),
    "no id": lambda d: vocab(d).update({"qq": None}),
    "a vocabulary that is text": lambda d: d["model"].update(vocab="abc"),
    "a vocabulary of nothing": lambda d: d["model"].update(vocab=None),
    "a vocabulary without words": lambda d: d["model"].update(vocab={}),
    "a list of wrong pairs": lambda d: d["model"].update(vocab=[["a", 1, 2]]),
    "a merge of an unknown token": lambda d: d["model"]["merges"].append(["zz", "a"]),
    "a merge to an unknown token": lambda d: d["model"]["merges"].append(["Ā", "ā"]),
    "a merge of three": lambda d: d["model"]["merges"].append(["a", "b", "c"]),
    "a merge of one": lambda d: d["model"]["merges"].append("ab"),
    "a merge of numbers": lambda d: d["model"]["merges"].append([1, 2]),
    "a merge of nothing": lambda d: d["model"]["merges"].append(None),
    "merges that are text": lambda d: d["model"].update(merges="a b"),
    "an added token without text": lambda d: d["added_tokens"].append({"id": 409, "content": ""}),
    "an added token that is a number": lambda d: d["added_tokens"].append({"id": 409, "content": 7}),
    "an added token without id": lambda d: d["added_tokens"].append({"content": "<x>"}),
    "an added token that is text": lambda d: d["added_tokens"].append("<x>"),
    "added tokens that are text": lambda d: d.update(added_tokens="x"),
    "an added token twice": lambda d: d["added_tokens"].append(dict(d["added_tokens"][0], id=409)),
    "an added id twice": lambda d: d["added_tokens"].append(dict(d["added_tokens"][0], content="<x>")),
    "an added id after a gap": lambda d: d["added_tokens"].append(dict(d["added_tokens"][0], content="<x>", id=500)),
    "an added id of a word": lambda d: d["added_tokens"][0].update(id=5),
    "a word under another added id": lambda d: d["added_tokens"][0].update(content="Ġt"),
    "an absurd added id": lambda d: d["added_tokens"][0].update(id=1 << 40),
    "no model": lambda d: d.pop("model"),
    "a model that is a list": lambda d: d.update(model=[]),
    "an unknown model": lambda d: d["model"].update(type="Nonsense"),
    "an unknown decoder": lambda d: d.update(decoder={"type": "Nonsense"}),
    "a decoder that is text": lambda d: d.update(decoder="ByteLevel"),
    "an unknown cut": lambda d: d.update(pre_tokenizer={"type": "Nonsense"}),
    "a cut that is text": lambda d: d.update(pre_tokenizer="x"),
    "a cut without type": lambda d: d.update(pre_tokenizer={}),
    "a broken pattern": lambda d: d.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    "an unknown normalizer": lambda d: d.update(normalizer={"type": "Nonsense"}),
    "a normalizer that is text": lambda d: d.update(normalizer="NFC"),
    "a charsmap that is none": lambda d: d.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "!!"}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_content_is_refused(tmp_path, file, damage):
    data = json.loads(json.dumps(file))
    damage(data)
    with pytest.raises(BadInput) as error:
        load(tmp_path, data)
    assert error.value.next and len(str(error.value)) < 700


RAW = {
    "empty": b"", "half": b'{"model": {"vocab": {"a"', "no UTF-8": b'{"model": "\xff\xfe"}', "UTF-16": '{"model": 1}'.encode("utf-16"),
    "brackets": b"[" * 100_000, "objects": b'{"a":' * 100_000, "a number": b"9" * 10_000, "null": b"null", "text": b'"x"',
    "a lone surrogate": b'{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}', "NaN": b'{"model": {"vocab": {"a": NaN}}}',
    "zeros": b"\x00" * 1000,
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
def test_what_is_no_json_is_refused(tmp_path, raw):
    with pytest.raises(BadInput) as error:
        load(tmp_path, raw)
    assert error.value.next


def test_a_file_of_absurd_size_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as f:
        f.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(BadInput, match="bytes"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("files", [
    {"tokenizer_config.json": "[]"}, {"tokenizer_config.json": "{"}, {"special_tokens_map.json": "5"}, {"generation_config.json": "[]"},
    {"chat_template.json": "[]"}, {"tokenizer_config.json": '{"chat_template": 5}'}, {"tokenizer_config.json": '{"chat_template": [{"name": "a"}]}'},
    {"chat_template.jinja": b"\xff\xfe"}, {"tokenizer_config.json": '{"chat_template": {"a": 1}}'}])
def test_broken_files_beside_it_are_refused(tmp_path, file, files):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as error:
        load(tmp_path, file)
    assert error.value.next


@pytest.mark.parametrize("config", [
    {"bos_token": 5, "eos_token": ["x"], "pad_token": {"content": 7}}, {"model_max_length": "long"}, {"model_max_length": -1},
    {"tokenizer_class": 5}, {"padding_side": 9, "truncation_side": []}, {"added_tokens_decoder": 5}, {"chat_template": None}])
def test_strange_settings_do_no_harm(tmp_path, file, config):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ["x", None, -1, 10 ** 30, True]}))
    tok = load(tmp_path, file)
    assert tok.encode("a cat") and tok.encode_batch(["a"]).ids.shape == (1, 1) and tok.eos_ids == [400]
    assert tok.model_max_length is None and tok.facts()["templates"] == []


def paths(value, path=()):
    """Every place in a JSON value."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(item, (*path, key))


SMALL = [json.loads(Library.to_str(make())) for make in (
    lambda: byte_level(None, size=280, texts=["a cat sat on the mat " * 9]), wordpiece, clip, unigram, FAMILIES["llama3"], FAMILIES["sentencepiece"])]
STRANGE = [None, True, -1, 0, 1 << 40, 1.5, "", "x", "Nonsense", [], {}, [[]], {"type": "x"}, "\ud800", "a" * 5000, ["a", "b"], [1, 2]]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=250, deadline=None)
@given(which=st.integers(0, len(SMALL) - 1), seed=st.integers(0, 1 << 30))
def test_files_damaged_anywhere_work_or_are_refused(tmp_path_factory, which, seed):
    rng = random.Random(seed)
    data = json.loads(json.dumps(SMALL[which]))
    places = [path for path in paths(data) if path]
    # As often in the short parts as in the vocabulary.
    short = [path for path in places if path[:2] not in (("model", "vocab"), ("model", "merges"))]
    for _ in range(rng.randint(1, 2)):
        path = rng.choice(rng.choice([places, short]))
        parent = data
        try:
            for key in path[:-1]:
                parent = parent[key]
            if rng.random() < 0.2:
                del parent[path[-1]]
            else:
                parent[path[-1]] = rng.choice(STRANGE)
        except (KeyError, IndexError, TypeError):
            continue
    started = time.thread_time()
    folder = tmp_path_factory.mktemp("fuzz", numbered=True)
    try:
        tok = load(folder, data)
        for text in ("a cat <|endoftext|> [SEP]", "天 é\n 12"):
            ids = tok.encode(text)
            assert all(0 <= i < tok.vocab_size for i in ids) and tok.encode_each([text]) == [ids]
            assert isinstance(tok.decode(ids), str)
            tok.show(text)
        tok.encode_batch(["a cat", "b"], max_length=8)
        tok.facts()
    except BadInput as error:
        assert error.next
    assert time.thread_time() - started < 5


def test_unreachable_tokens_of_absurd_length_go_to_the_library(tmp_path, file):
    """What the proof would take hours for is not proved."""
    data = json.loads(json.dumps(file))
    data.update(added_tokens=[])
    for i in range(40):
        vocab(data)["ab" * 10_000 + "a" * i] = 400 + i
    started = time.thread_time()
    tok = load(tmp_path, data)
    assert "too long" in tok.backend and time.thread_time() - started < 10
    assert tok.encode("a cat") == Library.from_str(json.dumps(data)).encode("a cat").ids


def test_a_pattern_that_never_ends_is_given_up(tmp_path, file):
    data = json.loads(json.dumps(file))
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": False}]}
    tok = load(tmp_path, data)
    with pytest.raises(BadInput):
        tok.encode("a" * 40 + "c")


def test_words_without_end_are_refused(tmp_path):
    data = json.loads(wordpiece().to_str())
    data["model"]["max_input_chars_per_word"] = 10 ** 9
    with pytest.raises(BadInput, match="characters"):
        load(tmp_path, data)


# ---- no text of a person becomes a special token, whatever the model

def words_with_specials() -> Library:
    """Whole words split at white space only: special tokens are words like any other."""
    tok = Library(models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2, "b": 3, "<": 4, "/": 5, "s": 6, ">": 7}, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.add_special_tokens([AddedToken("</s>", special=True)])
    return tok


def pieces_with_specials() -> Library:
    tok = Library(models.WordPiece(unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.train_from_iterator(SAMPLES, trainers.WordPieceTrainer(
        vocab_size=600, show_progress=False, special_tokens=["[UNK]", "[CLS]", "[SEP]", "</s>"]))
    return tok


ATTACKS = ["</s>", "a </s> b", "x</s>", "[SEP] </s></s>", "＜/s＞", "<s>", "</s> ", "\n</s>", "<|endoftext|>", "[CLS]", "a\ufdd4</s>"]


@pytest.mark.parametrize("make", [unigram, words_with_specials, pieces_with_specials, wordpiece, clip, *FAMILIES.values()])
def test_no_text_becomes_a_special_token(tmp_path, make):
    tok = load(tmp_path, make().to_str())
    special = {number for text, number in tok.special.items() if text != unknown_token(tok.source.data["model"])}
    for text in ATTACKS:
        for ids in (tok.encode(text), *tok.encode_each([text, "a"]), tok._plain(text, True), tok._plain(text, False)):
            assert special.isdisjoint(ids), (text, ids)
        honest = tok.encode_batch([text]).ids[0].tolist()
        framed = [i for part in tok.frame.single for i in part.ids]
        assert sorted(i for i in honest if i in special) == sorted(i for i in framed if i in special)


def test_the_library_alone_would_be_forged():
    """Why the ids are looked at: with special tokens switched off, three of the models make them from plain text."""
    for make, text in ((unigram, "a </s>"), (words_with_specials, "a </s>"), (pieces_with_specials, "a </s>")):
        library = make()
        library.encode_special_tokens = True
        assert library.token_to_id("</s>") in library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("make", [unigram, pieces_with_specials, words_with_specials])
def test_what_the_vocabulary_lacks_is_the_unknown_token(tmp_path, make):
    """In honest text: characters that the training text did not hold, and nothing forged beside them."""
    library = make()
    library.encode_special_tokens = True
    tok, unknown = load(tmp_path, library.to_str()), library.token_to_id("<unk>") or library.token_to_id("[UNK]") or 0
    for text in ("a \U0001f9ff b", "\U0001f9ff", "x\U0001f9ff\U00012345y", "<unk> [UNK]"):
        ids = tok.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids and (unknown in ids or "unk" in text)
    forged = tok.encode("\U0001f9ff </s>")
    assert unknown in forged and library.token_to_id("</s>") not in forged


def test_honest_text_is_cut_as_before(tmp_path):
    library = unigram()
    library.encode_special_tokens = True
    tok = load(tmp_path, library.to_str())
    for text in SAMPLES:
        if "<s>" not in text and "</s>" not in text:
            assert tok.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_a_text_that_is_nothing_but_special_is_refused(tmp_path):
    tok = Library(models.WordLevel({"[UNK]": 0, "§": 1}, unk_token="[UNK]"))
    tok.add_special_tokens([AddedToken("§", special=True)])
    ours = load(tmp_path, tok.to_str())
    assert ours.encode("§", allow_special=True) == [1]
    with pytest.raises(BadInput, match="special token"):
        ours.encode("§")
