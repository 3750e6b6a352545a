"""Vectors of texts: any encoder or decoder, with the pooling that the folders of sentence-transformers state.

    embed_texts("sentence-transformers/all-MiniLM-L6-v2", ["a cat", "a dog"])     (2, 384), float32
    classify_texts("cross-encoder/ms-marco-MiniLM-L-6-v2", questions, passages)   (N, 1): how well each pair fits

Texts are read in portions, sorted by length within each and cut into batches of little padding: memory stays bounded
whatever the corpus. Legend: N texts, B a batch, T tokens, D width.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid import events
from pellucid.errors import BadInput
from pellucid.models.hub import load, local_folder
from pellucid.nn import Decoder, DualEncoder, Encoder
from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.framing import Batch
from pellucid.tokenizers.reading import read_json

PORTION = 2**22  # ids, padding included, of the texts that are tokenized and sorted together
TOKENS = 16384  # padded tokens of a batch at most
Model = str | os.PathLike[str] | nn.Module


@dataclass
class Embedding(events.Event):
    """Texts turned into vectors so far."""

    kind = "embedding"
    done: int
    total: int
    texts_per_second: float


# --- pooling: hidden (B, T, D), mask (B, T) -> (B, D) -----------------------------------------------------------------


def mean(h: Tensor, mask: Tensor) -> Tensor:
    return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1e-9)


def mean_sqrt_length(h: Tensor, mask: Tensor) -> Tensor:
    return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1e-9).sqrt()


def weighted_mean(h: Tensor, mask: Tensor) -> Tensor:
    """Weights 1, 2, ... T: later tokens of a decoder have seen more."""
    return mean(h, mask * torch.arange(1, h.shape[1] + 1, device=h.device))


def largest(h: Tensor, mask: Tensor) -> Tensor:
    return h.masked_fill(mask[..., None] == 0, -1e9).amax(1)


def first(h: Tensor, mask: Tensor) -> Tensor:
    """Of the first real token: [CLS]."""
    return h[torch.arange(len(h), device=h.device), mask.argmax(1)]


def last(h: Tensor, mask: Tensor) -> Tensor:
    return h[torch.arange(len(h), device=h.device), (mask * torch.arange(h.shape[1], device=h.device)).argmax(1)]


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls_token": first, "max_tokens": largest, "mean_tokens": mean, "mean_sqrt_len_tokens": mean_sqrt_length,
    "weightedmean_tokens": weighted_mean, "lasttoken": last}
"""By sentence-transformers' words, in the order in which it joins several."""
SHORT = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
         "weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken"}


@dataclass(frozen=True)
class Recipe:
    """How hidden states become a text's vector. Several poolings are joined; then dense layers; then length 1."""

    poolings: tuple[str, ...]
    normalize: bool = True
    max_tokens: int | None = None  # longer texts are cut
    lower: bool = False
    prompt: str = ""  # put before every text
    dense: tuple[tuple[Tensor, Tensor | None, bool], ...] = ()  # matrix, bias, and whether tanh follows

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        h = hidden.float()
        x = torch.cat([POOLINGS[name](h, mask.to(h.dtype)) for name in self.poolings], -1)
        for weight, bias, tanh in self.dense:
            x = F.linear(x, weight.to(x.device), None if bias is None else bias.to(x.device))
            x = torch.tanh(x) if tanh else x
        return F.normalize(x, dim=-1) if self.normalize else x


def read_recipe(folder: Path, prompt_name: str | None = None) -> tuple[Recipe | None, Path]:
    """What `modules.json` and the folders that it names say (None without one), and where the model itself lies.

    prompt_name: which of the folder's prompts to put before texts ("query", "passage" ...); default its own default.
    """
    modules = read_json(folder / "modules.json")
    if modules is None:
        return None, folder
    try:
        kinds = [(str(module["type"]).rsplit(".", 1)[-1], _inside(folder, module["path"])) for module in modules]
    except (TypeError, KeyError) as error:
        raise BadInput(f"{folder / 'modules.json'} is no list of modules", repr(error), "fetch the folder again") from error
    names = [kind for kind, _ in kinds]
    rest = names[2:-1] if names[-1] == "Normalize" else names[2:]
    if names[:2] != ["Transformer", "Pooling"] or set(rest) - {"Dense"}:
        raise BadInput(f"{folder.name} asks for the modules {', '.join(names)}", "Transformer, Pooling, Dense and Normalize are known")
    (_, place), (_, pooling) = kinds[:2]
    length = _object(place / "sentence_bert_config.json")
    prompts = _object(folder / "config_sentence_transformers.json")
    chosen = prompt_name or prompts.get("default_prompt_name")
    known = prompts.get("prompts") or {}
    if prompt_name is not None and prompt_name not in known:
        raise BadInput(f"{folder.name} has no prompt {prompt_name!r}", next=f"its prompts: {', '.join(known) or 'none'}")
    limit = length.get("max_seq_length")
    return Recipe(
        pooling_names(_object(pooling / "config.json")), names[-1] == "Normalize", limit if isinstance(limit, int) else None,
        bool(length.get("do_lower_case", False)), known.get(chosen, "") if chosen else "",
        tuple(dense_layer(path) for kind, path in kinds if kind == "Dense")), place


def pooling_names(config: dict[str, Any]) -> tuple[str, ...]:
    """`pooling_mode_mean_tokens: true` ..., or in newer files `pooling_mode: "mean"`."""
    mode = config.get("pooling_mode")
    if isinstance(mode, str) and mode in SHORT:
        return (SHORT[mode],)
    names = tuple(name for name in POOLINGS if config.get(f"pooling_mode_{name}"))
    unknown = [name for name, on in config.items() if on is True and name.startswith("pooling_mode_")
               and name.removeprefix("pooling_mode_") not in POOLINGS]
    if unknown or not names:
        raise BadInput(f"the pooling {', '.join(unknown) or 'of this folder'} is not known", f"known: {', '.join(POOLINGS)}")
    return names


def dense_layer(folder: Path) -> tuple[Tensor, Tensor | None, bool]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    act = str(_object(folder / "config.json").get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    if act not in ("Tanh", "Identity"):
        raise BadInput(f"{folder} has the activation {act}", "Tanh and Identity are known")
    try:
        tensors = load_file(folder / "model.safetensors")
        return tensors["linear.weight"].float(), tensors.get("linear.bias"), act == "Tanh"
    except (OSError, KeyError, SafetensorError) as error:
        raise BadInput(f"{folder} holds no dense layer in safetensors", str(error), "fetch the folder again") from error


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if found is not None and not isinstance(found, dict):
        raise BadInput(f"{path} holds no object", next="fetch the folder again")
    return found or {}


def _inside(folder: Path, path: object) -> Path:
    if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
        raise BadInput(f"modules.json names the path {path!r:.60}", "that lies outside of its folder", "do not trust this checkpoint")
    return folder / path


# --- texts ------------------------------------------------------------------------------------------------------------


def embed_texts(
    model: Model, texts: Sequence[str], *, tokenizer: Tokenizer | None = None, recipe: Recipe | None = None, batch_size: int = 64,
    prompt_name: str | None = None, device: str = "cpu", dtype: str | torch.dtype = "float32",
) -> Tensor:
    """texts -> (N, D) float32 on the CPU, in their order; rows have length 1 unless the folder says otherwise.

    model: a folder or Hub id, or a module; then give its tokenizer.   recipe: default what the folder states, else the mean of an
    encoder's tokens and a decoder's last token, normalised; CLIP's text tower has its own.   batch_size: texts at most.
    Emits an `Embedding` event a second.
    """
    texts = listed(texts, "texts")
    if isinstance(model, nn.Module):
        module = model
    else:
        folder = local_folder(model)
        stated, place = read_recipe(folder, prompt_name)
        recipe, module = recipe or stated, load(place, dtype=dtype, device=device)
        tokenizer = tokenizer or Tokenizer.load(place)
    if type(module) not in HIDDEN and not isinstance(module, DualEncoder):
        raise BadInput(f"{type(module).__name__} is not a model whose texts have vectors")
    recipe = recipe or Recipe(("lasttoken",) if isinstance(module, Decoder) else ("mean_tokens",))

    def vectors(rows: Batch) -> Tensor:
        if isinstance(module, DualEncoder):
            return F.normalize(module.encode_text(rows.ids, rows.mask).float(), dim=-1)
        return recipe(HIDDEN[type(module)](module, rows), rows.mask)

    if recipe.lower or recipe.prompt:
        texts = [recipe.prompt + (text.lower() if recipe.lower else text) for text in texts]
    return run(module, tokenizer, texts, None, vectors, batch_size, recipe.max_tokens)


HIDDEN: dict[type, Callable[[Any, Batch], Tensor]] = {
    Encoder: lambda model, rows: model(rows.ids, rows.mask, rows.types),
    Decoder: lambda model, rows: model.hidden(rows.ids, mask=rows.mask),
}
"""The last hidden states (B, T, D) of a batch."""


def classify_texts(
    model: Model, texts: Sequence[str], pairs: Sequence[str] | None = None, *, tokenizer: Tokenizer | None = None,
    batch_size: int = 64, device: str = "cpu", dtype: str | torch.dtype = "float32",
) -> Tensor:
    """Logits (N, C) of a sequence classifier for texts, or for pairs of texts (a reranker has C = 1: how well they fit).
    The names of the classes are `model.spec.labels`."""
    texts, second = listed(texts, "texts"), None if pairs is None else listed(pairs, "pairs")
    if second is not None and len(second) != len(texts):
        raise BadInput(f"{len(texts)} texts and {len(second)} second texts", "each text needs one")
    module = model if isinstance(model, nn.Module) else load(model, dtype=dtype, device=device)
    tokenizer = tokenizer or (None if isinstance(model, nn.Module) else Tokenizer.load(model))
    if not isinstance(module, Encoder) or module.classifier is None:
        raise BadInput("this model does not classify", "its config.json names no BertForSequenceClassification")
    return run(module, tokenizer, texts, second, lambda rows: module.logits(HIDDEN[Encoder](module, rows)).float(), batch_size, None)


def listed(texts: Sequence[str], what: str) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise BadInput(f"{what} must be a list of texts", next="give [text] for one")
    return list(texts)


@torch.inference_mode()
def run(
    model: nn.Module, tokenizer: Tokenizer | None, texts: list[str], pairs: list[str] | None, vectors: Callable[[Batch], Tensor],
    batch_size: int, max_tokens: int | None,
) -> Tensor:
    """`vectors` of all batches, back in the order of the texts."""
    if tokenizer is None:
        raise BadInput("a model object needs its tokenizer", next="give tokenizer=Tokenizer.load(folder)")
    if batch_size < 1:
        raise BadInput(f"batch_size = {batch_size}", "it must be at least 1")
    spec: Any = model.spec
    lengths = (max_tokens, tokenizer.model_max_length, getattr(spec, "text", spec).context)
    limit = min(length for length in lengths if length)
    device = next(model.parameters()).device
    was_training, started, shown, cut = model.training, time.monotonic(), 0.0, 0
    model.eval()
    results = None
    for done, rows, batch in batches(tokenizer, texts, pairs, batch_size, limit):
        found = vectors(Batch(*(part.to(device) for part in batch))).cpu()
        results = found.new_empty(len(texts), found.shape[-1]) if results is None else results
        results[rows] = found
        cut += int((batch.mask.sum(1) == limit).sum())
        if (now := time.monotonic() - started) > shown + 1:
            shown = now
            events.emit(Embedding(done, len(texts), done / now))
    model.train(was_training)
    if cut:
        events.note(f"{cut} of {len(texts)} texts have {limit} tokens or more: what stands behind those was not read", "warning")
    return torch.empty(0, 0) if results is None else results


def batches(
    tokenizer: Tokenizer, texts: list[str], pairs: list[str] | None, batch_size: int, limit: int,
) -> Iterator[tuple[int, Tensor, Batch]]:
    """(texts done with this batch, its rows among the texts, the batch), the longest texts of a portion first."""
    done, size = 0, min(4096, max(64, PORTION // limit))
    for start in range(0, len(texts), size):
        stop = min(start + size, len(texts))
        whole = tokenizer.encode_batch(texts[start:stop], None if pairs is None else pairs[start:stop], max_length=limit)
        width = whole.mask.sum(1)
        order = width.argsort(descending=True, stable=True)
        at = 0
        while at < len(order):
            T = max(1, int(width[order[at]]))
            rows = order[at : at + max(1, min(batch_size, TOKENS // T))]
            at += len(rows)
            done += len(rows)
            columns = whole.mask[rows].any(0).nonzero().flatten()  # padding may stand on either side
            span = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)
            yield done, rows + start, Batch(*(part[rows][:, span] for part in whole))
