"""Tokenizers from the files that came before tokenizer.json, written as the content of one.

- `vocab.json` and `merges.txt`: byte-level BPE (GPT-2, Qwen2), and CLIP's, whose words end in `</w>`.
- `*.tiktoken`: Qwen v1's list of tokens in order of rank, without merges: these are found again (`bpe.merges_of`).
- `vocab.txt`: BERT's WordPiece, one token a line.

Which family it is, is told by `tokenizer_class` in tokenizer_config.json, else by `model_type` in config.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pellucid.errors import BadInput
from pellucid.tokenizers import check, reading
from pellucid.tokenizers.bpe import merges_of
from pellucid.tokenizers.layout import ByteLevelBPE, write
from pellucid.tokenizers.patterns import CLIP_PATTERN, GPT2_PATTERN, QWEN_PATTERN
from pellucid.tokenizers.proof import MOST_STEPS

Data = dict[str, Any]
END_OF_TEXT = "<|endoftext|>"
"""The usual name (GPT-2, Qwen, ours) of the token between documents."""

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

QWEN_V1_SPECIAL = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

BERTS = {"BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer"}

# What each class of transformers names its tokens where tokenizer_config.json is silent.
_BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
NAMES: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), END_OF_TEXT),
    "QWenTokenizer": dict.fromkeys(("eos_token", "pad_token"), END_OF_TEXT),
    "CLIPTokenizer": {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), END_OF_TEXT),
    **dict.fromkeys(BERTS, _BERT),
}
OF_MODEL_TYPE = {
    "gpt2": "GPT2Tokenizer", "qwen": "QWenTokenizer", "qwen2": "Qwen2Tokenizer", "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer", "clip": "CLIPTokenizer", "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer", "electra": "ElectraTokenizer", "mobilebert": "MobileBertTokenizer"}


def family_of(config: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The tokenizer's class: by the config of the tokenizer, else by that of the model; "" when neither tells."""
    named = config.get("tokenizer_class")
    return named.removesuffix("Fast") if isinstance(named, str) else OF_MODEL_TYPE.get(str(model.get("model_type")), "")


def from_older_files(folder: Path, family: str, config: Mapping[str, Any], model: Mapping[str, Any],
                     added: Mapping[str, int]) -> tuple[Data, str]:
    """The content of tokenizer.json, and the family.  Raises `BadInput` when there are no such files, or they are broken.

    family: "" for what the files' names tell.  config: tokenizer_config.json.  model: config.json.
    added: added_tokens.json (text -> id).
    """
    ranks = next(iter(sorted(folder.glob("*.tiktoken"))), None)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        known, files = {"GPT2Tokenizer", "Qwen2Tokenizer", "CLIPTokenizer"}, "vocab.json and merges.txt"
    elif ranks is not None:
        known, files = {"QWenTokenizer"}, ranks.name
        family = family or ("QWenTokenizer" if files == "qwen.tiktoken" else "")
    elif (folder / "vocab.txt").is_file():
        known, files, family = BERTS, "vocab.txt", family or "BertTokenizer"
    else:
        have = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise BadInput(f"{folder} holds no tokenizer.json", f"it holds {have}",
                       "give the folder of a model, or convert its tokenizer with transformers' AutoTokenizer")
    if family not in known:
        raise BadInput(f"{folder} has {files} but no tokenizer.json",
                       f"how tokenizer_class {family!r} cuts text is not known here",
                       "save it with transformers' AutoTokenizer, which writes tokenizer.json")
    if files == "vocab.txt":
        data = wordpiece(reading.read_lines(folder / files), config)
    elif ranks is not None and files == ranks.name:
        data = qwen_v1(reading.read_ranks(ranks), model)
    else:
        make = clip if family == "CLIPTokenizer" else byte_level
        vocab = check.vocabulary(reading.read_json(folder / "vocab.json"), str(folder / "vocab.json"))
        data = make(vocab, reading.read_merges(folder / "merges.txt"), family)
    names = {name: text for name, text in (NAMES[family] | named(config)).items() if config.get(name, text) is not None}
    data["added_tokens"] = added_tokens(data, names, config, added)
    data["post_processor"] = framed(family, data["added_tokens"], names, config)
    return data, family


# ---- the families

def byte_level(vocab: dict[str, int], pairs: list[list[str]], family: str) -> Data:
    """GPT-2's and Qwen2's; vocabulary and merges as they are spelled in the files."""
    qwen = family == "Qwen2Tokenizer"
    data = write(ByteLevelBPE({}, [], QWEN_PATTERN if qwen else GPT2_PATTERN, nfc=qwen))
    data["model"] |= {"vocab": vocab, "merges": pairs}
    return data


def clip(vocab: dict[str, int], pairs: list[list[str]], family: str) -> Data:
    data = byte_level(vocab, pairs, family)
    data["model"] |= {"end_of_word_suffix": "</w>", "unk_token": END_OF_TEXT, "continuing_subword_prefix": ""}
    data["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, {"type": "Lowercase"}]}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": CLIP_PATTERN}, "behavior": "Removed", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}
    return data


def qwen_v1(ranks: dict[bytes, int], model: Mapping[str, Any]) -> Data:
    """The control tokens stand behind the ranks, in an order that Qwen's own code holds, not a file."""
    rows = model.get("vocab_size")
    if isinstance(rows, int) and rows - len(ranks) - len(QWEN_V1_SPECIAL) > 1024:  # rows are padded, but not so far
        check.broken("the .tiktoken file", f"it ends after {len(ranks)} tokens, and the model has {rows}")
    if sum(len(token) ** 2 for token in ranks) > MOST_STEPS:
        check.broken("the .tiktoken file", "its tokens are too long to find their merges again")
    pairs = merges_of(ranks)
    # tiktoken takes a piece that is a token whole; where merges make every token, that is no rule of its own.
    whole = len(pairs) < len(ranks) - 256
    data = write(ByteLevelBPE(ranks, pairs, QWEN_PATTERN, nfc=True, whole_pieces=whole))
    data["added_tokens"] = [entry(len(ranks) + i, name) for i, name in enumerate(QWEN_V1_SPECIAL)]
    return data


def wordpiece(vocab: dict[str, int], config: Mapping[str, Any]) -> Data:
    unknown = (_BERT | named(config))["unk_token"]
    if unknown not in vocab:
        check.broken("vocab.txt", f"it lacks {unknown}, the token of unknown words")
    settings = {name: config.get(name, default) for name, default in (
        ("do_lower_case", True), ("tokenize_chinese_chars", True), ("strip_accents", None))}
    for name, value in settings.items():
        if value not in (True, False, None):
            check.broken("tokenizer_config.json", f"{name} is {value!r:.40}, neither true nor false")
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": settings["tokenize_chinese_chars"],
                       "strip_accents": settings["strip_accents"], "lowercase": settings["do_lower_case"]},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab}}


# ---- added tokens, and what stands around a text

def entry(number: int, content: str, special: bool = True, **options: Any) -> Data:
    """One of `added_tokens`."""
    return {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special} | options


def named(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token ... -> text, as far as tokenizer_config.json tells."""
    return {name: text for name in NAMED if (text := text_of(config.get(name)))}


def text_of(token: Any) -> str:
    """A token's text; configs hold it as it is, or in an object with options."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def added_tokens(data: Data, names: Mapping[str, str], config: Mapping[str, Any], more: Mapping[str, int]) -> list[Data]:
    """Those that `data` has, of `added_tokens_decoder`, of added_tokens.json, and the special ones, in order of id."""
    where, vocab = "tokenizer_config.json", data["model"]["vocab"]
    found = {token["content"]: token for token in data["added_tokens"]}
    listed = check.an_object(config.get("added_tokens_decoder") or {}, f"added_tokens_decoder in {where}")
    for number, token in listed.items():
        options = dict(check.an_object(token, f"added_tokens_decoder in {where}"))
        content, special = options.pop("content", None), bool(options.pop("special", False))
        if not isinstance(content, str) or not number.isdecimal() or len(number) > 8:
            check.broken(where, f"added_tokens_decoder holds {number!r:.40}: {token!r:.80}")
        options = {name: bool(options[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in options}
        found[content] = entry(int(number), content, special, **options)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    special_texts = [*names.values(), *(text_of(token) for token in extra if text_of(token))]
    for content, place in more.items():
        found.setdefault(content, entry(place, content, content in special_texts))
    for content in special_texts:
        if content not in found:
            found[content] = entry(vocab[content] if content in vocab else _next_free(vocab, found.values()), content)
    return sorted(found.values(), key=lambda token: token["id"])


def _next_free(vocab: Mapping[str, int], tokens: Iterable[Data]) -> int:
    return 1 + max([*vocab.values(), *(token["id"] for token in tokens)], default=-1)


def framed(family: str, added: list[Data], names: Mapping[str, str], config: Mapping[str, Any]) -> Data:
    """The post-processor: [CLS] a [SEP] b [SEP]; CLIP's start and end; for the others what the config's flags say."""
    ids = {token["content"]: token["id"] for token in added}
    if family == "CLIPTokenizer":
        cls, sep = ([name, ids[name]] for name in (names["bos_token"], names["eos_token"]))
        return {"type": "RobertaProcessing", "sep": sep, "cls": cls, "trim_offsets": False, "add_prefix_space": False}
    bert = family in BERTS
    start = names.get("cls_token") if bert else names.get("bos_token") if config.get("add_bos_token") else None
    end = names.get("sep_token") if bert else names.get("eos_token") if config.get("add_eos_token") else None

    def part(name: str | None, kind: int) -> list[Data]:
        return [] if name is None else [{"SpecialToken": {"id": name, "type_id": kind}}]

    def text(name: str, kind: int) -> list[Data]:
        return [{"Sequence": {"id": name, "type_id": kind}}]

    single = part(start, 0) + text("A", 0) + part(end, 0)
    pair = single + (part(start, 1) if not bert else []) + text("B", 1) + part(end, 1)
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (start, end) if name is not None}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
