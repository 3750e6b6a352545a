"""The models that a server has, by the names that clients use; adapters come and go while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.engine import LLM
from pellucid.engine.adapters import Adapter
from pellucid.engine.async_llm import AsyncLLM, Closed
from pellucid.engine.config import EngineConfig
from pellucid.errors import BadInput
from pellucid.models import classify_texts, embed_texts, load
from pellucid.models.embedding import Recipe, read_recipe
from pellucid.models.hub import local_folder, read_config, shape_of, spec_of
from pellucid.nn import Encoder
from pellucid.parallel import RankDied
from pellucid.server.defaults import NOTHING, Defaults, read_defaults
from pellucid.server.errors import Refused
from pellucid.server.formats import FORMATS, Format, format_of
from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.chat import variables as template_variables

MOST_NAMES = 256


@dataclass
class Served:
    """A name that clients use.  adapter: low-rank changes of the weights that its requests run with; parent: the name of its model."""

    name: str
    engine: AsyncLLM
    form: Format
    adapter: Adapter | None = None
    parent: str | None = None
    root: str = ""
    defaults: Defaults = NOTHING
    namespace: str = ""  # of cached prefixes: an adapter's differ from its model's, and from those of its last version
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @property
    def llm(self) -> LLM:
        return self.engine.llm

    @property
    def tokenizer(self) -> Tokenizer:
        return self.llm.tokenizer

    @cached_property
    def hidden(self) -> frozenset[int]:
        """Control tokens that an answer does not show: all but those which the format reads."""
        return frozenset(i for text, i in self.tokenizer.special.items() if text not in self.form.markers)

    @cached_property
    def thinks(self) -> bool:
        """Whether the chat template knows thoughts."""
        return self.form.channels or any(self.form.think[0] in t for t in self.tokenizer.source.templates.values())

    def encode(self, text: str, special: bool = True) -> list[int]:
        """special: behind what the tokenizer puts before a text."""
        with self._lock:
            return self.llm.prompt_ids(text) if special else self.tokenizer.encode(text)

    def chat_ids(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, thinking: bool | None, goes_on: bool = False,
                 **variables: Any) -> list[int]:
        """goes_on: the last message is the assistant's, and is left open."""
        with self._lock:
            return (self.llm.open_ids if goes_on else self.llm.chat_ids)(messages, tools, thinking, **variables)

    def read_by_template(self, tools: list[dict[str, Any]] | None) -> frozenset[str]:
        """Names of what the chat template reads."""
        return template_variables(self.tokenizer.template(tools))

    @property
    def context(self) -> int:
        return self.llm.context

    @property
    def vocab(self) -> int:
        return self.llm.model.spec.vocab

    judges = False

    async def embed(self, texts: list[str]) -> Tensor:
        return await self.engine.embed(texts)

    async def judge(self, first: list[str], second: list[str], how: str) -> list[float]:
        return await self.engine.score(first, second, how=how)

    def as_dict(self) -> dict[str, Any]:
        return about(self) | {"root": self.root or self.name, "parent": self.parent}


@dataclass
class VectorModel:
    """An encoder: it makes vectors of texts or, with a head of one output, judges pairs of texts. It generates nothing."""

    name: str
    module: Encoder
    tokenizer: Tokenizer
    recipe: Recipe | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self.judges = self.module.classifier is not None
        if self.judges and len(self.module.spec.labels or "1") != 1:
            raise BadInput(f"{self.name} classifies texts", "a model that is served makes vectors, or judges pairs with one output")

    @classmethod
    def open(cls, name: str, path: str, device: str = "cpu") -> VectorModel:
        recipe, place = read_recipe(local_folder(path))
        return cls(name, load(place, device=device), Tokenizer.load(place), recipe)

    @property
    def context(self) -> int:
        return min(n for n in (self.module.spec.context, self.tokenizer.model_max_length, self.recipe and self.recipe.max_tokens) if n)

    @property
    def vocab(self) -> int:
        return self.module.spec.vocab

    async def embed(self, texts: list[str]) -> Tensor:
        if self.judges:
            raise Refused(400, f"{self.name} judges pairs of texts; ask /v1/rerank or /v1/score", "model", "invalid_value")
        return await asyncio.to_thread(self._alone, lambda: embed_texts(self.module, texts, tokenizer=self.tokenizer, recipe=self.recipe))

    async def judge(self, first: list[str], second: list[str], how: str = "") -> list[float]:
        logits = await asyncio.to_thread(self._alone, lambda: classify_texts(self.module, first, second, tokenizer=self.tokenizer))
        return torch.sigmoid(logits[:, 0]).tolist()

    def _alone(self, function: Callable[[], Tensor]) -> Tensor:
        with self._lock:
            return function()

    def as_dict(self) -> dict[str, Any]:
        return about(self) | {"root": self.name, "parent": None}


def open_model(path: str, config: EngineConfig | None = None, *, device: str = "cpu", **options: Any) -> LLM | VectorModel:
    """What a folder or Hub id holds: a model that generates, or an encoder.  options: of the former, see `LLM`."""
    _, place = read_recipe(local_folder(path))
    if shape_of(spec_of(read_config(place))) is Encoder:
        return VectorModel.open(path, path, device)
    return LLM(path, device=device, config=config, **options)


def about(model: Served | VectorModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "pellucid", "max_model_len": model.context}


class Registry:
    """`find(name)`, and the engines behind the names."""

    def __init__(self, models: dict[str, LLM | VectorModel], waiting: int = 16, config: EngineConfig | None = None, form: str | None = None,
                 recommended: bool = True):
        if form is not None and form not in FORMATS:
            raise BadInput(f"no format of tool calls is called {form!r}", next=f"use one of {', '.join(FORMATS)}")
        self.models: dict[str, Served | VectorModel] = {}
        self.config = config or EngineConfig()
        self._ending = threading.Lock()
        self._versions = itertools.count(1)
        for name, llm in models.items():
            if isinstance(llm, VectorModel):
                llm.name = name
                self.models[name] = llm
                continue
            defaults = read_defaults(llm.folder) if recommended else NOTHING  # first: it may be refused
            engine = AsyncLLM(llm, config=self.config, waiting=waiting, name=name)
            templates = " ".join(llm.tokenizer.source.templates.values())
            self.models[name] = Served(name, engine, FORMATS[form] if form else format_of(templates), root=str(llm.folder or ""), defaults=defaults)

    @property
    def engines(self) -> list[AsyncLLM]:
        return [m.engine for m in self.models.values() if isinstance(m, Served) and m.adapter is None]

    @property
    def pending(self) -> int:
        return sum(engine.pending for engine in self.engines)

    def find(self, name: str) -> Served:
        """The model of that name that generates text."""
        model = self.find_any(name)
        if not isinstance(model, Served):
            raise Refused(400, f"{name} is an encoder: it generates no text; ask /v1/embeddings, /v1/rerank or /v1/score", "model", "invalid_value")
        return model

    def find_any(self, name: str) -> Served | VectorModel:
        if name not in self.models:
            known = ", ".join(map(repr, self.models))
            raise Refused(404, f"the model {name!r} does not exist; this server has {known}", "model", "model_not_found")
        return self.models[name]

    def add_adapter(self, name: str, path: Path, base: str | None = None) -> Served:
        """Serves a LoRA adapter of the model `base` (by default the first one that generates) under a name of its own."""
        if name in self.models:
            raise Refused(400, f"the name {name!r} is taken", "lora_name", "invalid_value")
        if len(self.models) >= MOST_NAMES:
            raise Refused(400, f"{MOST_NAMES} models and adapters are loaded; unload one first", "lora_name", "invalid_value")
        parent = self.find(base or next(m.name for m in self.models.values() if isinstance(m, Served)))
        adapter = parent.llm.load_adapter(path, name)
        served = Served(name, parent.engine, parent.form, adapter, parent.name, str(path), parent.defaults, f"{name}#{next(self._versions)}")
        self.models = {**self.models, name: served}  # others may be looking through the old ones
        return served

    def remove_adapter(self, name: str) -> None:
        """Requests under way end with it."""
        model = self.find_any(name)
        if not isinstance(model, Served) or model.adapter is None:
            raise Refused(400, f"{name!r} is a model, not an adapter", "lora_name", "invalid_value")
        self.models = {known: other for known, other in self.models.items() if known != name}
        adapter, llm = model.adapter, model.llm
        with contextlib.suppress(Closed, RankDied):  # then it is gone anyway
            model.engine.call_soon(lambda: llm.drop_adapter(adapter))

    def close(self) -> None:
        """From any thread, also several times."""
        with self._ending:
            for engine in self.engines:
                engine.close()


