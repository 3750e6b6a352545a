"""Files of every family, ours and broken ones, against `tokenizers` and transformers."""

from __future__ import annotations

import inspect
import json
import random
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_samples import BY_LIBRARY, CHINESE, CONTROL, EMOJI, MIXED, SAMPLES, byte_level

from pellucid.errors import BadInput
from pellucid.tokenizers import Tokenizer, layout, patterns, train_bpe
from pellucid.tokenizers.proof import NotByteLevel, merged_by_rank
from tokenizers import Tokenizer as Library

NAMES = st.sampled_from(["<|im_end|>", "<think>", "<|im_", "end|>", " ", "\n", "e\u0301", "\u1100\u1161", "中", "x", "12"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.lists(NAMES, max_size=12).map("".join)
SHARED = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def both(library: Library, text: str) -> tuple[list[int], list[int]]:
    """The library's ids with special text as plain text, and with special tokens."""
    library.encode_special_tokens = True
    plain = library.encode(text, add_special_tokens=False).ids
    library.encode_special_tokens = False
    return plain, library.encode(text, add_special_tokens=False).ids


def test_ids_equal_the_library(family):
    name, library, folder = family
    tok = Tokenizer.load(folder)
    assert tok.backend.startswith("tokenizers" if name in BY_LIBRARY else "tiktoken"), tok.backend
    for text in SAMPLES:
        assert (tok.encode(text), tok.encode(text, allow_special=True)) == both(library, text), repr(text[:40])
    batch = [tok.encode(text) for text in SAMPLES]
    assert tok.encode_each(SAMPLES) == batch
    assert tok.encode_each([MIXED * 200] * 3) == [tok.encode(MIXED * 200)] * 3  # long enough for threads
    assert tok.vocab_size == max(library.get_vocab(with_added_tokens=True).values()) + 1


@SHARED
@given(text=TEXT)
def test_ids_equal_the_library_on_any_text(family, cache, text):
    name, library, folder = family
    if name not in cache:
        cache[name] = Tokenizer.load(folder)
    assert (cache[name].encode(text), cache[name].encode(text, allow_special=True)) == both(library, text)


@pytest.fixture(scope="session")
def cache():
    return {}


def decoded(name: str, library: Library, ids: list[int], skip: bool = False) -> str:
    """As transformers decodes: CLIP's marks of ended words are spaces."""
    text = library.decode(ids, skip_special_tokens=skip)
    return text.replace("</w>", " ").strip() if name == "clip" else text


def test_decoding_and_streaming_equal_the_library(family):
    name, library, folder = family
    tok, rng = Tokenizer.load(folder), random.Random(1)
    for text in [*SAMPLES, CHINESE + EMOJI + MIXED]:
        ids = tok.encode(text, allow_special=True)
        assert tok.decode(ids) == decoded(name, library, ids)
        assert tok.decode(ids, skip_special=True) == decoded(name, library, ids, skip=True)
        stream = tok.stream()
        assert "".join(map(stream.add, ids)) + stream.finish() == tok.decode(ids)
    for _ in range(100):
        ids = [rng.randrange(tok.vocab_size) for _ in range(9)]
        assert tok.decode(ids) == decoded(name, library, ids)


def test_nfc_is_the_librarys():
    """Also where its tables are older than Python's (Dives Akuru, Unicode 13), and for all of Unicode."""
    library = byte_level(patterns.QWEN_PATTERN, nfc=True)
    tok = Tokenizer.from_bpe(layout.read(json.loads(library.to_str())))
    assert unicodedata.normalize("NFC", "\U00011935\U00011930") == "\U00011938"
    for text in ("\U00011935\U00011930", "\U00011099\U000110ba", "a\u0897\u0327", "\u1112\u1161\u11ab", "\u212b\u2126"):
        assert tok.encode(text) == library.encode(text, add_special_tokens=False).ids, ascii(text)
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    for before, after in (("", ""), ("a", "\u0327"), ("a\u0315", ""), ("\u1100", "\u1161")):
        texts = [text for c in characters if unicodedata.is_normalized("NFC", text := before + c + after)]
        assert library.normalizer.normalize_str("\n".join(texts)) == "\n".join(texts)


def test_llama3_keeps_the_tokens_that_no_merge_makes(family):
    name, library, folder = family
    if name == "llama3":
        tok = Tokenizer.load(folder)
        assert len(tok.encode("qqqqqqq")) == 1 and len(tok.encode("qqqqqqqq")) > 1
        assert tok.prefix_ids == [tok.special["<|endoftext|>"]] == library.encode("").ids


def random_bpe(rng: random.Random, honest: bool) -> layout.ByteLevelBPE:
    """Merges over "abc": learned-like, or with ids and merges in any order, missing and superfluous ones."""
    words = [b"a", b"b", b"c"]
    merges = []
    while len(merges) < 8:
        left, right = rng.choice(words), rng.choice(words)
        if left + right not in words:
            merges.append((left, right))
            words.append(left + right)
    numbers = list(range(256, 256 + len(words) - 3))
    if not honest:
        if rng.random() < 0.5:
            rng.shuffle(numbers)
        if rng.random() < 0.5:
            merges += [(a, b) for a in words for b in words if a + b in words and rng.random() < 0.5]
        if rng.random() < 0.3:
            rng.shuffle(merges)
        if rng.random() < 0.3:
            del merges[rng.randrange(len(merges))]
    vocab = {bytes([b]): b for b in range(256)} | dict(zip(words[3:], numbers))
    return layout.ByteLevelBPE(vocab, merges, patterns.QWEN_PATTERN, whole_pieces=not honest and rng.random() < 0.5)


TRIALS = 400


def test_what_the_proof_accepts_is_equal():
    """Adversarial merge lists: where tiktoken is chosen, its ids are the library's on every short text."""
    rng, verdicts = random.Random(5), {True: 0, False: 0}
    for trial in range(TRIALS):
        bpe = random_bpe(rng, honest=trial % 4 == 0)
        tok, library = Tokenizer.from_bpe(bpe), Library.from_str(json.dumps(layout.write(bpe)))
        try:
            merged_by_rank(bpe)
        except NotByteLevel:
            verdicts[False] += 1
            assert tok.backend.startswith("tokenizers")
            continue
        verdicts[True] += 1
        assert tok.backend.startswith("tiktoken")
        for _ in range(60):
            text = "".join(rng.choices("abc", k=rng.randint(1, 14)))
            assert tok.encode(text) == library.encode(text).ids, (bpe.merges, text)
    assert min(verdicts.values()) > 60, verdicts


@pytest.mark.parametrize("change, says", [
    (lambda d: d["model"]["merges"].reverse(), "stands before"),
    (lambda d: d["model"]["merges"].pop(5), "not in the file"),
    (lambda d: d["model"]["vocab"].pop("Ġ"), "lacks some of the 256 bytes"),
    (lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+|\W+"), "not on the list"),
    (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithNext"), "MergedWithNext"),
    (lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "a space is put before"),
    (lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True), "2 times"),
    (lambda d: d["pre_tokenizer"]["pretokenizers"][1].pop("use_regex"), "2 times"),
    (lambda d: d.update(pre_tokenizer=None), "does not cut"),
    (lambda d: d.update(normalizer={"type": "NFKC"}), "NFKC"),
    (lambda d: d["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    (lambda d: d["added_tokens"][1].update(lstrip=True), "by whitespace"),
])
def test_every_difference_goes_to_the_library(ours, change, says):
    data = json.loads(json.dumps(ours.source.data))
    change(data)
    try:
        library = Library.from_str(json.dumps(data))
    except Exception:
        library = None  # broken for the library as well
    if library is None:
        with pytest.raises(BadInput):
            Tokenizer(type(ours.source)(data))
        return
    tok = Tokenizer(type(ours.source)(data))
    assert tok.backend.startswith("tokenizers") and says in tok.backend
    for text in SAMPLES:
        assert (tok.encode(text), tok.encode(text, allow_special=True)) == both(library, text)


def test_added_tokens_are_found_longest_first(ours):
    library = byte_level(patterns.QWEN_PATTERN, special=["<|a|>", "<|a|><|b|>"], words=["<x", "<x>", "<x>y"])
    tok = Tokenizer.from_bpe(layout.read(json.loads(library.to_str())))
    for text in ("<|a|><|b|>", "<|a|><|a|><|b|>", "<x>y<x>z<xx", "<x><|a|>y"):
        assert (tok.encode(text), tok.encode(text, allow_special=True)) == both(library, text)


def test_saved_folder_opens_everywhere(ours, saved):
    from transformers import AutoTokenizer

    assert {path.name for path in saved.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    again, transformer = Tokenizer.load(saved), AutoTokenizer.from_pretrained(saved)
    library = Library.from_file(str(saved / "tokenizer.json"))
    for text in SAMPLES:
        assert again.encode(text) == ours.encode(text)
        assert ours.encode(text, True) == library.encode(text).ids == transformer.encode(text)
        assert transformer.decode(ours.encode(text)) == text == library.decode(ours.encode(text), False)
    assert (again.special, again.eos_ids, again.pad_id) == (ours.special, ours.eos_ids, ours.pad_id)
    assert transformer.eos_token_id == ours.end_of_turn_id == ours.special["<|im_end|>"]
    assert transformer.pad_token_id == ours.pad_id == ours.special["<|endoftext|>"]
    assert len(transformer) == ours.vocab_size and set(ours.special) == set(CONTROL)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe", "llama", "gpt2"])
def test_transformers_keeps_our_cut_beside_a_model(ours, tmp_path, model_type):
    """AutoTokenizer looks at config.json too, and for some families would put its own pattern in place of ours."""
    from transformers import AutoTokenizer

    ours.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    transformer = AutoTokenizer.from_pretrained(tmp_path)
    assert transformer.encode(MIXED + "12345") == ours.encode(MIXED + "12345", allow_special=True)


def test_what_transformers_saves_loads_here(ours, saved, tmp_path):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(saved).save_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode_each(SAMPLES) == ours.encode_each(SAMPLES) and again.backend == ours.backend
    assert (again.special, again.eos_ids, again.pad_id) == (ours.special, ours.eos_ids, ours.pad_id)
    assert again.render([{"role": "user", "content": "x"}]) == ours.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("family_class, pattern", [("Qwen2Tokenizer", patterns.QWEN_PATTERN), ("GPT2Tokenizer", None)])
def test_vocab_and_merges_files(tmp_path, family_class, pattern):
    from transformers import GPT2Tokenizer, Qwen2Tokenizer

    library = byte_level(pattern, nfc=pattern is not None, words=[], special=["<|endoftext|>"])
    library.model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    vocab["<|endoftext|>"] = len(vocab)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": family_class}))
    tok = Tokenizer.load(tmp_path)
    reference = {"Qwen2Tokenizer": Qwen2Tokenizer, "GPT2Tokenizer": GPT2Tokenizer}[family_class].from_pretrained(tmp_path)
    assert tok.backend.startswith("tiktoken")
    for text in SAMPLES:
        assert tok.encode(text, allow_special=True) == reference.encode(text)


def test_named_tokens_come_from_every_file(ours, tmp_path):
    ours.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "<think>"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, ours.special["<|im_end|>"]]}))
    tok = Tokenizer.load(tmp_path)
    assert tok.bos_id == ours.special["<|im_start|>"]
    assert tok.eos_ids == [ours.special["<|im_end|>"], ours.special["<|endoftext|>"], 7]
    assert tok.pad_id == ours.special["<|endoftext|>"]


def test_ids_without_a_token(ours):
    """Models have more rows than tokens: such an id shows as U+FFFD; a label does not pass for a token."""
    assert ours.decode([ours.vocab_size + 5, 65]) == "\ufffdA"
    stream = ours.stream()
    assert stream.add(10**6) == "\ufffd"
    with pytest.raises(BadInput, match="-100"):
        ours.decode([65, -100])


def test_ids_without_a_token_in_words(family):
    """The same for the library's tokenizers, which drop such ids or fail."""
    _, _, folder = family
    tok = Tokenizer.load(folder)
    ids = tok.encode("a cat 12")
    for strange in (tok.vocab_size + 5, 1 << 40):
        stream = tok.stream()
        assert tok.decode([strange]) == "\ufffd" == stream.add(strange) + stream.finish()
        assert "\ufffd" in tok.decode([*ids, strange, *ids]) and tok.token_bytes(strange).decode() == "\ufffd"


BREAKS = {
    "no-folder": lambda folder: None,
    "empty": lambda folder: folder.mkdir(),
    "half": lambda folder: (folder.mkdir(), (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a"')),
    "list": lambda folder: (folder.mkdir(), (folder / "tokenizer.json").write_text("[]")),
    "other-json": lambda folder: (folder.mkdir(), (folder / "tokenizer.json").write_text('{"hello": 1}')),
    "no-vocab": lambda folder: (folder.mkdir(), (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')),
    "binary": lambda folder: (folder.mkdir(), (folder / "tokenizer.json").write_bytes(b"\xff\xfe\x00" * 9)),
    "merges-only": lambda folder: (folder.mkdir(), (folder / "vocab.json").write_text("{}"),
                                   (folder / "merges.txt").write_text("#version: 0.2\n")),
}


@pytest.mark.parametrize("break_it", BREAKS.values(), ids=BREAKS)
def test_broken_files_say_what_to_do(tmp_path, break_it):
    break_it(tmp_path / "model")
    with pytest.raises(BadInput) as error:
        Tokenizer.load(tmp_path / "model")
    assert error.value.next and ("model" in error.value.what or "tokenizer.json" in error.value.what)


def test_hub_ids_respect_offline():
    """No network in tests: an id that is not in the cache is told apart from a wrong path."""
    with pytest.raises(BadInput) as error:
        Tokenizer.load("nobody/no-such-model")
    assert "Hub" in str(error.value) and "local folder" in error.value.next


def test_no_torch_and_no_network_library_until_needed():
    code = ("import sys, pellucid.tokenizers as t; tok = t.train_bpe(['hello world'] * 9, 370); tok.encode('hi');"
            "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_saving_over_an_old_tokenizer_leaves_one(ours, tmp_path):
    train_bpe([CHINESE, MIXED], 400).save(tmp_path)
    ours.save(tmp_path)
    assert Tokenizer.load(tmp_path).vocab_size == ours.vocab_size


def test_patterns_are_those_that_transformers_holds():
    """Written by others into their own code, or into the files that their converters make."""
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as qwen2
    from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as qwen3_5

    llama3 = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    assert (patterns.QWEN_PATTERN, patterns.QWEN35_PATTERN, patterns.LLAMA3_PATTERN) == (qwen2, qwen3_5, llama3)
    assert (GGUF_PRE_TOKENIZER_SPLITS["gpt-4o"], GGUF_PRE_TOKENIZER_SPLITS["llama3"]) == (patterns.O200K_PATTERN, llama3)
