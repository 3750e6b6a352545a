"""A tokenizer's files: from a folder, a tokenizer.json or a Hub id; every failure says what to do."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pellucid.errors import BadInput
from pellucid.messages import add, three_parts
from pellucid.tokenizers.layout import AddedToken, ByteLevelBPE, unspell, write
from pellucid.tokenizers.patterns import GPT2_PATTERN, QWEN_PATTERN

add({
    "error.tokenizer": ("{name} does not exist", "{name} 不存在"),
    "error.tokenizer.next": ("check the path; a Hub id looks like owner/name", "检查路径；Hub id 形如 owner/name"),
})

END_OF_TEXT = "<|endoftext|>"
"""The usual name (GPT-2, Qwen, ours) of the token between documents."""

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
         "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "vocab.json", "merges.txt"]


@dataclass
class Source:
    """data: tokenizer.json.  config: tokenizer_config.json.  templates: name -> Jinja source."""

    data: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    eos_ids: list[int] = field(default_factory=list)

    def named(self) -> dict[str, str]:
        """bos_token, eos_token ... -> text, as templates see them."""
        found = {}
        for name in NAMED:
            token = self.config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[name] = token
        return found


def open_source(path_or_id: str | Path) -> Source:
    """Read the files of a tokenizer.  Raises `BadInput` when something is missing or broken."""
    path = Path(path_or_id)
    if not path.exists():
        path = _from_hub(str(path_or_id))
    folder = path if path.is_dir() else path.parent
    config = _json(folder / "tokenizer_config.json") or {}
    for name, token in (_json(folder / "special_tokens_map.json") or {}).items():
        config.setdefault(name, token)
    data = _json(path / "tokenizer.json" if path.is_dir() else path)
    if data is None:
        data = _from_vocabulary(folder, config)
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise BadInput(f"{path} holds no tokenizer", "a tokenizer.json has a field \"model\"", _AGAIN)
    generation = _json(folder / "generation_config.json") or {}
    ends = generation.get("eos_token_id")
    eos_ids = [ends] if isinstance(ends, int) else [i for i in ends or [] if isinstance(i, int)]
    return Source(data, config, _templates(folder, config), eos_ids)


_AGAIN = "copy or download the model's folder again"


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"{path} is broken", f"it is not JSON: {error}", _AGAIN) from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read", str(error.strerror), "check the file's permissions") from error


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    inline = config.get("chat_template") or (_json(folder / "chat_template.json") or {}).get("chat_template")
    if isinstance(inline, list):
        templates = {entry["name"]: entry["template"] for entry in inline}
    else:
        templates = {"default": inline} if isinstance(inline, str) else {}
    files = {"default": folder / "chat_template.jinja"}
    files |= {extra.stem: extra for extra in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    return templates | {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}


def _from_vocabulary(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json made of the older pair of files vocab.json and merges.txt (GPT-2, Qwen2)."""
    vocab = _json(folder / "vocab.json")
    if vocab is None or not (folder / "merges.txt").is_file():
        have = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise BadInput(f"{folder} holds no tokenizer.json", f"it holds {have}",
                       "give the folder of a model, or convert its tokenizer with transformers' AutoTokenizer")
    family = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if family not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        raise BadInput(f"{folder} has vocab.json and merges.txt but no tokenizer.json",
                       f"how tokenizer_class {family!r} cuts text is not known here",
                       "save it with transformers' AutoTokenizer, which writes tokenizer.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    listed = {int(i): entry for i, entry in (config.get("added_tokens_decoder") or {}).items()}
    added = [AddedToken(i, entry["content"], entry.get("special", False)) for i, entry in sorted(listed.items())]
    if not added and END_OF_TEXT in vocab:
        added = [AddedToken(vocab[END_OF_TEXT], END_OF_TEXT)]
    names = {token.content for token in added}
    bpe = ByteLevelBPE({unspell(word): i for word, i in vocab.items() if word not in names},
                       [(unspell(left), unspell(right)) for left, right in pairs],
                       QWEN_PATTERN if family == "Qwen2Tokenizer" else GPT2_PATTERN, added, family == "Qwen2Tokenizer")
    return write(bpe)


def _from_hub(name: str) -> Path:
    """Download, or find in the cache, the tokenizer files of a Hub repository."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise BadInput(*three_parts("error.tokenizer", name=name))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    again = "check the name and the network, or give a local folder"
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except RepositoryNotFoundError as error:
        raise BadInput(f"no folder and no Hub repository is named {name}", next=again) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BadInput(f"{name} is no local folder, and the Hub could not be reached for it",
                       str(error).split("\n")[0][:160], again) from error
