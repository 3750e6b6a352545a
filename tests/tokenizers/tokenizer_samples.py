"""Texts that tokenizers get wrong, and small tokenizers of each family, built with Hugging Face `tokenizers`."""

from __future__ import annotations

import json
from pathlib import Path

from pellucid.tokenizers import patterns
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
CODE = [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.py"))]
CHINESE = """澄明：让光透过；容易理解。大语言模型把文本切成词元，再把词元变成向量。“你好，世界！”——他说。
第一章　注意力是缩放点积：把查询与键相乘，除以根号d，再做softmax。１２３４５６，二〇二五年十二月，３．１４。\n""" * 3
EMOJI = "😀😃👩‍👩‍👧‍👦🏳️‍🌈🇨🇳 ok👍🏽!! ☕️ ✨\n" * 3
MIXED = """It's 2024, we'VE 12345 apples; they'll cost $1,234.50!  \t\n\n\n   x = a[0x1F] # ünïcödé naïve café cafe\u0301
हिन्दी में नमस्ते दुनिया  العربية مرحبا  한국어 안녕 日本語のテキスト ﬁ ſt'ſa İı Ǆ ½²③ⅫⅧ ١٢٣ \u00a0\u2003\u3000\u200b\ufeff
<|im_end|> <think> </think> <|endoftext|>\r\n\r\n \x00\x7f\x85 end   """
BROKEN = "\ufffd".join(["a", "中", "", " \n"]) + b"\xe4\xbd ok \xff\xfe \xf0\x9f\x98".decode(errors="replace")
TEXTS = [*CODE, CHINESE, EMOJI, MIXED, BROKEN]
SAMPLES = [*TEXTS, "", " ", "\n", "a", "   ", "\n\n \n", "é", "e\u0301", "12", "123", "1" * 50, "a" * 50, "'s'S'ſ", " 's"]

WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(pattern: str | None, size: int = 600, nfc: bool = False, special: list[str] = CONTROL,
               words: list[str] = WORDS, first: bool = False, texts: list[str] = TEXTS, **model) -> Tokenizer:
    """A byte-level BPE as the Hub's files are; pattern None: GPT-2's, inside ByteLevel. first: added tokens first."""
    tok = Tokenizer(models.BPE(**model))
    if nfc:
        tok.normalizer = normalizers.NFC()
    if pattern is None:
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tok.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False, special_tokens=special if first else [])
    tok.train_from_iterator(texts, trainer)
    tok.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    tok.add_tokens([AddedToken(name, normalized=False) for name in words])
    return tok


def llama3() -> Tokenizer:
    """As Llama 3's file: whole pieces first, every split of every token listed, tokens that no merge makes, BOS."""
    data = json.loads(byte_level(patterns.LLAMA3_PATTERN).to_str())
    model = data["model"]
    vocab = {word: i for word, i in model["vocab"].items()}
    for extra in ("Ġzebra", "ä½łå¥½", "qqqqqqq", "wxyzwxyz"):  # added afterwards, as Llama 3 did to cl100k
        vocab.setdefault(extra, len(vocab))
    shift = len(vocab)
    for place, token in enumerate(data["added_tokens"]):
        token["id"] = shift + place
    listed = []
    for word in sorted(vocab, key=vocab.__getitem__):
        cuts = [(word[:i], word[i:]) for i in range(1, len(word)) if word[:i] in vocab and word[i:] in vocab]
        listed += sorted(cuts, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
    model |= {"vocab": vocab, "merges": [list(pair) for pair in listed], "ignore_merges": True}
    tok = Tokenizer.from_str(json.dumps(data))
    tok.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A $B",
        special_tokens=[("<|endoftext|>", tok.token_to_id("<|endoftext|>"))])
    return tok


def deepseek() -> Tokenizer:
    """Cut three times in a row, with full-width bars in the special tokens."""
    tok = byte_level(None, special=["<｜begin▁of▁sentence｜>", "<｜User｜>"])
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.Split(Regex(r"[一-龥]+"), "isolated"),
        pre_tokenizers.Split(Regex(r"[\r\n]+|\s?\p{L}+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return tok


def wordpiece() -> Tokenizer:
    tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.normalizer, tok.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tok.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=900, show_progress=False, special_tokens=names))
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tok.enable_padding(length=128)
    tok.enable_truncation(128)
    return tok


def clip() -> Tokenizer:
    """As CLIP's file: lower case, white space collapsed, words end in </w>, start and end around a text."""
    tok = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tok.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "),
                                           normalizers.Lowercase()])
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(patterns.CLIP_PATTERN), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=alphabet, end_of_word_suffix="</w>"))
    data = json.loads(tok.to_str())
    vocab = data["model"]["vocab"]
    for word in [*(f"{c}</w>" for c in sorted(alphabet)), "<|startoftext|>", "<|endoftext|>"]:
        vocab.setdefault(word, len(vocab))
    data["model"]["unk_token"] = "<|endoftext|>"
    tok = Tokenizer.from_str(json.dumps(data))
    tok.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("<|startoftext|>", "<|endoftext|>")])
    start, end = ((name, vocab[name]) for name in ("<|startoftext|>", "<|endoftext|>"))
    tok.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return tok


def older_files(tok: Tokenizer, folder: Path, **config) -> Path:
    """The files that came before tokenizer.json: vocab.json and merges.txt, or vocab.txt; and tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    model = json.loads(tok.to_str())["model"]
    if "merges" in model:
        # Tokens that were added behind the vocabulary stand in it in these files.
        vocab = dict(sorted(tok.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]))
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        words = sorted(model["vocab"], key=model["vocab"].__getitem__)
        (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def unigram() -> Tokenizer:
    """As T5's and XLM-R's files: the special tokens are words of the model too."""
    tok = Tokenizer(models.Unigram())
    tok.normalizer, tok.decoder = normalizers.NFKC(), decoders.Metaspace()
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.train_from_iterator(TEXTS, trainers.UnigramTrainer(
        vocab_size=500, show_progress=False, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"]))
    return tok


def sentencepiece() -> Tokenizer:
    """As Llama 2's file: a space before the text, bytes for what is not in the vocabulary."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tok.train_from_iterator([text for text in TEXTS if text.isascii()], trainers.BpeTrainer(
        vocab_size=600, show_progress=False, special_tokens=names, limit_alphabet=80))
    data = json.loads(tok.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(data))


FAMILIES = {
    "qwen": lambda: byte_level(patterns.QWEN_PATTERN, nfc=True),
    "qwen35": lambda: byte_level(patterns.QWEN35_PATTERN, nfc=True),
    "gpt2": lambda: byte_level(None),
    "added-first": lambda: byte_level(patterns.LLAMA3_PATTERN, first=True),
    "llama3": llama3,
    "gpt-oss": lambda: byte_level(patterns.O200K_PATTERN),
    "deepseek": deepseek,
    "wordpiece": wordpiece,
    "sentencepiece": sentencepiece,
    "clip": clip,
}
BY_LIBRARY = {"deepseek", "wordpiece", "sentencepiece", "clip"}
