"""A tokenizer's files: from a folder, a tokenizer.json or a Hub id; every failure says what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pellucid.errors import BadInput
from pellucid.messages import add, three_parts
from pellucid.tokenizers import check
from pellucid.tokenizers.reading import read_json, read_object, read_text
from pellucid.tokenizers.vocabularies import NAMES, family_of, from_older_files, named

add({
    "error.tokenizer": ("{name} does not exist", "{name} 不存在"),
    "error.tokenizer.next": ("check the path; a Hub id looks like owner/name", "检查路径；Hub id 形如 owner/name"),
})

FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json",
         "generation_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
         "vocab.json", "merges.txt", "vocab.txt", "*.tiktoken"]

# Qwen v1's conversations, which its own code writes; the checkpoint names the format in generation_config.json.
CHATML = """{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"""


@dataclass
class Source:
    """data: tokenizer.json.  config: tokenizer_config.json.  templates: name -> Jinja source."""

    data: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    eos_ids: list[int] = field(default_factory=list)

    def named(self) -> dict[str, str]:
        """bos_token, eos_token ... -> text, as templates see them."""
        return named(self.config)


def open_source(path_or_id: str | Path) -> Source:
    """Read the files of a tokenizer.  Raises `BadInput` when something is missing or broken."""
    path = Path(path_or_id)
    if not path.exists():
        path = _from_hub(str(path_or_id))
    folder = path if path.is_dir() else path.parent
    config, model = read_object(folder / "tokenizer_config.json"), read_object(folder / "config.json")
    for name, token in read_object(folder / "special_tokens_map.json").items():
        config.setdefault(name, token)
    family = family_of(config, model)
    file = path / "tokenizer.json" if path.is_dir() else path
    data = read_json(file) if file.suffix == ".json" else None
    if data is None:
        added = check.vocabulary(read_object(folder / "added_tokens.json"), str(folder / "added_tokens.json"))
        data, family = from_older_files(folder, family, config, model, added)
    check.tokenizer(data, str(file))
    padding, truncation = (part if isinstance(part := data.get(name), dict) else {} for name in ("padding", "truncation"))
    for name, text in {"pad_token": padding.get("pad_token"), **NAMES.get(family, {})}.items():
        if text in data["model"]["vocab"] or any(token["content"] == text for token in data.get("added_tokens") or []):
            config.setdefault(name, text)
    for name, part in (("padding_side", padding), ("truncation_side", truncation)):
        config.setdefault(name, str(part.get("direction", "right")).lower())
    generation = read_object(folder / "generation_config.json")
    ends = generation.get("eos_token_id")
    eos_ids = [i for i in (ends if isinstance(ends, list) else [ends]) if check.is_id(i)]
    templates = _templates(folder, config)
    if not templates and generation.get("chat_format") == "chatml":
        templates = {"default": CHATML}
    return Source(data, config, templates, eos_ids)


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    inline = config.get("chat_template") or read_object(folder / "chat_template.json").get("chat_template") or {}
    if isinstance(inline, str):
        inline = {"default": inline}
    elif isinstance(inline, list):
        inline = {entry.get("name"): entry.get("template") for entry in inline if isinstance(entry, dict)}
    if not isinstance(inline, dict) or not all(isinstance(text, str) for pair in inline.items() for text in pair):
        check.broken(str(folder / "tokenizer_config.json"), "its chat_template is no text, nor named texts")
    files = {"default": folder / "chat_template.jinja"}
    files |= {extra.stem: extra for extra in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    return inline | {name: read_text(file) for name, file in files.items() if file.is_file()}


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
