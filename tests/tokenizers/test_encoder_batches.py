"""What encoders read: ids, mask and types with special tokens, cut and padded, equal to transformers' fast tokenizers."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import CHINESE, MIXED, SAMPLES, byte_level, clip, older_files, wordpiece

from pellucid.errors import BadInput
from pellucid.tokenizers import Tokenizer, patterns
from pellucid.tokenizers.framing import shorten
from tokenizers import processors

A = ["a cat", "", "中文 naïve [SEP] <|endoftext|> text that goes on, and on", MIXED[:200], "x"]
SHORT = [text[:200] for text in SAMPLES]  # the library keeps all that it cuts off, which is slow for long ones
B = ["", "another cat, a longer one!", "b", CHINESE[:90], "the same length or not"]


def bert(folder, **config):
    return older_files(wordpiece(), folder, tokenizer_class="BertTokenizer", **config)


def clip_files(folder, **config):
    return older_files(clip(), folder, tokenizer_class="CLIPTokenizer", model_max_length=77, **config)


def byte_level_file(folder, post=None, baked=False, **config):
    """A tokenizer.json with a post-processor; baked: with the padding and truncation of another day."""
    tok = byte_level(patterns.LLAMA3_PATTERN)
    if post is not None:
        tok.post_processor = post(lambda name: (name, tok.token_to_id(name)))
    if baked:
        tok.enable_truncation(5)
        tok.enable_padding(length=7, direction="left", pad_id=3, pad_token="<|im_end|>")
    folder.mkdir(exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>",
         "eos_token": "<|endoftext|>", **config}))
    return folder


def template(single, pair, *names):
    return lambda token: processors.TemplateProcessing(single=single, pair=pair, special_tokens=[token(name) for name in names])


LLAMA3 = template("<|im_start|> $A", "<|im_start|> $A <|im_start|>:1 $B:1", "<|im_start|>")
FOLDERS = {
    "bert": bert,
    "bert, left": lambda f: bert(f, padding_side="left", truncation_side="left"),
    "clip": clip_files,
    "no post-processor": byte_level_file,
    "llama 3": lambda f: byte_level_file(f, lambda token: processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), LLAMA3(token)])),
    "bytes": lambda f: byte_level_file(f, lambda token: processors.ByteLevel(trim_offsets=False)),
    "bert's own": lambda f: byte_level_file(f, lambda t: processors.BertProcessing(t("<|endoftext|>"), t("<|im_start|>"))),
    "flags beside tokenizer.json": lambda f: byte_level_file(f, LLAMA3, add_bos_token=False, add_eos_token=True),
    "flags": lambda f: older_files(byte_level(None, words=[], special=["<|endoftext|>"]), f, tokenizer_class="GPT2Tokenizer",
                                   add_bos_token=True, add_eos_token=True, pad_token="<|endoftext|>"),
    "baked": lambda f: byte_level_file(f, LLAMA3, baked=True),
    "types": lambda f: byte_level_file(f, template("$A:1 <|im_end|>:1", "$B:1 <|im_end|>:0 $A:0", "<|im_end|>")),
}


@pytest.fixture(scope="module", params=FOLDERS)
def both(request, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = FOLDERS[request.param](tmp_path_factory.mktemp("batch"))
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


def expect(theirs, first, second, length, padding):
    cut = {} if length is None else {"truncation": "longest_first", "max_length": length}
    out = theirs(first, second, padding=padding, return_tensors="pt", split_special_tokens=True, return_token_type_ids=True, **cut)
    return out["input_ids"], out["attention_mask"], out["token_type_ids"]


def same(batch, expected) -> bool:
    return all(torch.equal(a, b) and a.dtype == torch.int64 for a, b in zip(batch, expected))


@pytest.mark.parametrize("length", [None, 4, 7, 20])
def test_equal_to_transformers(both, length):
    ours, theirs = both
    for first, second in itertools.product([A, SHORT, ["one"], list(reversed(A))], [None, B]):
        second = None if second is None else (second * len(first))[:len(first)]
        assert same(ours.encode_batch(first, second, length), expect(theirs, first, second, length, True))
        if length is not None:
            batch = ours.encode_batch(first, second, length, padding="max_length")
            assert batch.ids.shape == (len(first), length)
            assert same(batch, expect(theirs, first, second, length, "max_length"))


@settings(max_examples=60, deadline=None)
@given(first=st.text("ab 中1", max_size=24), second=st.none() | st.text("ab 中1", max_size=24), length=st.integers(4, 16))
def test_equal_to_transformers_on_any_pair(both, first, second, length):
    ours, theirs = both
    second = None if second is None else [second]
    assert same(ours.encode_batch([first], second, length), expect(theirs, [first], second, length, True))


def test_special_text_is_text_unless_allowed(both):
    ours, theirs = both
    marked = ["a <|im_end|> [SEP] <|endoftext|><|startoftext|> b", "[CLS]"]
    assert same(ours.encode_batch(marked), expect(theirs, marked, None, None, True))
    allowed = theirs(marked, padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(ours.encode_batch(marked, allow_special=True).ids, allowed)


def test_single_and_batch_agree(both):
    """A row is what its text gives alone; inside its frame stands what `encode` gives."""
    ours, _ = both
    for texts, pairs in ((SHORT, None), (A, B)):
        batch = ours.encode_batch(texts, pairs)
        for row, text in enumerate(texts):
            alone = ours.encode_batch([text], None if pairs is None else [pairs[row]])
            real = batch.mask[row].bool()
            assert torch.equal(batch.ids[row][real], alone.ids[0]) and torch.equal(batch.types[row][real], alone.types[0])
            assert alone.mask.all() and (batch.ids[row][~real] == ours.pad_id).all()
    before = len(ours.prefix_ids)
    text = "a cat, 12"
    ids = ours.encode_batch([text]).ids[0].tolist()
    assert ids[before:before + len(ours.encode(text))] == ours.encode(text) and ids[:before] == ours.prefix_ids


def test_bert_and_clip_by_hand(tmp_path):
    bert_tok, clip_tok = Tokenizer.load(bert(tmp_path / "b")), Tokenizer.load(clip_files(tmp_path / "c"))
    cls, sep, pad = (bert_tok.special[name] for name in ("[CLS]", "[SEP]", "[PAD]"))
    a, b = bert_tok.encode("a cat"), bert_tok.encode("two")
    batch = bert_tok.encode_batch(["a cat", "a cat"], ["two", ""])
    assert batch.ids.tolist() == [[cls, *a, sep, *b, sep], [cls, *a, sep, sep] + [pad] * len(b)]
    assert batch.types.tolist() == [[0] * (len(a) + 2) + [1] * (len(b) + 1), [0] * (len(a) + 2) + [1] + [0] * len(b)]
    assert batch.mask.tolist() == [[1] * (len(a) + len(b) + 3), [1] * (len(a) + 3) + [0] * len(b)]
    start, end = clip_tok.special["<|startoftext|>"], clip_tok.special["<|endoftext|>"]
    ids = clip_tok.encode_batch(["A Photo"], padding="max_length").ids  # to the model's own 77
    words = clip_tok.encode("a photo")
    assert ids.tolist() == [[start, *words, end] + [end] * (75 - len(words))] and ids.shape == (1, 77)


@given(a=st.integers(0, 9), b=st.integers(0, 9), room=st.integers(0, 12), left=st.booleans())
def test_what_is_cut_is_the_longest(a, b, room, left):
    """One at a time from the longer one is the rule of `longest_first`; where that decides nothing, halves are equal."""
    first, second = list(range(a)), list(range(100, 100 + b))
    x, y = shorten(first, second, room, left)
    assert len(x) + len(y) == min(room, a + b)
    assert x == (first[a - len(x):] if left else first[:len(x)]) and y == (second[b - len(y):] if left else second[:len(y)])
    lengths = [a, b]
    while sum(lengths) > room:
        lengths[lengths.index(max(lengths))] -= 1
    assert sorted((len(x), len(y))) == sorted(lengths)


def test_no_texts_and_equal_rows(both):
    ours, _ = both
    assert all(part.shape == (0, 0) for part in ours.encode_batch([]))
    assert same(ours.encode_batch(["a b", "a b"], padding=False), ours.encode_batch(["a b", "a b"]))


@pytest.mark.parametrize("call, says", [
    (lambda tok: tok.encode_batch("one text"), "list"), (lambda tok: tok.encode_batch(5), "list"),
    (lambda tok: tok.encode_batch([b"x"]), "bytes"), (lambda tok: tok.encode_batch(["a", None]), "NoneType"),
    (lambda tok: tok.encode_batch(["a"], ["b", "c"]), "second"), (lambda tok: tok.encode_batch(["a"], "b"), "list"),
    (lambda tok: tok.encode_batch(["a"], max_length=1), "max_length"), (lambda tok: tok.encode_batch(["a"], ["b"], 2), "max_length"),
    (lambda tok: tok.encode_batch(["a"], max_length=-4), "max_length"), (lambda tok: tok.encode_batch(["a"], padding="longest"), "longest"),
    (lambda tok: tok.encode_batch(["a", "a b c d"], padding=False), "lengths"),
    (lambda tok: tok.encode_batch(["a"], padding="max_length"), "max_length"),
])
def test_wrong_arguments_are_refused(tmp_path, call, says):
    tok = Tokenizer.load(bert(tmp_path / "m"))
    with pytest.raises(BadInput) as error:
        call(tok)
    assert says in str(error.value)


@pytest.mark.parametrize("post", [
    {"type": "Nonsense"}, {}, [], "x", {"type": "BertProcessing"}, {"type": "BertProcessing", "sep": ["a", -1], "cls": ["b", 1]},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": [], "special_tokens": {}},
    {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 7}}], "pair": [], "special_tokens": {}},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
     "special_tokens": {"x": {"ids": ["y"]}}},
    {"type": "Sequence", "processors": [{"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}] * 2}])
def test_broken_frames_are_refused_where_they_are_needed(ours, post):
    tok = Tokenizer(type(ours.source)(ours.source.data | {"post_processor": post}))
    assert tok.encode("a") == ours.encode("a")
    with pytest.raises(BadInput):
        tok.encode_batch(["a"])
