"""Texts as vectors, and how well texts fit: /v1/embeddings, /v1/rerank (Cohere's and Jina's shape), /v1/score (vLLM's)."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from fastapi import FastAPI, Request
from pydantic import Field, model_validator
from torch import Tensor

from pellucid.errors import BadInput
from pellucid.server.conversation import Body
from pellucid.server.errors import Refused, told
from pellucid.server.jobs import Desk
from pellucid.server.registry import Served, VectorModel

MOST_TEXTS = 2048
PORTION = 16  # texts between two steps of an engine that also generates
Model = Served | VectorModel


class EmbeddingRequest(Body):
    """Lists of ids are the model's own tokens."""

    model: str
    input: str | list[str] | list[int] | list[list[int]] = Field(min_length=1)
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None


class Document(Body):
    text: str


How = Literal["yes-no", "likelihood", "embedding"]


class RerankRequest(Body):
    """how: what a generating model's score is, see `LLM.score` (yes-no is Qwen3-Reranker's); by default the cosine of the texts' vectors."""

    model: str
    how: How | None = None
    query: str = Field(min_length=1)
    documents: list[str | Document] = Field(min_length=1, max_length=MOST_TEXTS)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True
    max_tokens_per_doc: None = None

    @property
    def texts(self) -> list[str]:
        return [d if isinstance(d, str) else d.text for d in self.documents]


class ScoreRequest(Body):
    """One text_1 is compared with every text_2; as many as there are of those, pair by pair. how: as for rerank."""

    model: str
    how: How | None = None
    text_1: str | list[str] = Field(min_length=1)
    text_2: str | list[str] = Field(min_length=1)
    user: str | None = None

    @model_validator(mode="after")
    def fit(self) -> ScoreRequest:
        first, second = self.pairs_of()
        if len(first) != len(second) or len(first) > MOST_TEXTS:
            raise ValueError(f"give one text_1, or as many as there are text_2, at most {MOST_TEXTS}")
        return self

    def pairs_of(self) -> tuple[list[str], list[str]]:
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        second = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        return (first * len(second) if len(first) == 1 else first), second


def add_vectors(app: FastAPI, desk: Desk) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
        return await desk.limited(embedded(found(desk, body.model, request), body), request)

    @app.post("/rerank", include_in_schema=False)  # vLLM's and Cohere's other addresses
    @app.post("/v2/rerank", include_in_schema=False)
    @app.post("/v1/rerank")
    async def rerank(body: RerankRequest, request: Request) -> dict[str, Any]:
        return await desk.limited(ranked(found(desk, body.model, request), body), request)

    @app.post("/score", include_in_schema=False)
    @app.post("/v1/score")
    async def scores(body: ScoreRequest, request: Request) -> dict[str, Any]:
        return await desk.limited(scored(found(desk, body.model, request), body), request)


def found(desk: Desk, name: str, request: Request) -> Model:
    model = desk.registry.find_any(name)
    request.scope["state"]["model"] = name
    return model


async def embedded(model: Model, body: EmbeddingRequest) -> dict[str, Any]:
    texts, tokens = await asyncio.to_thread(texts_of, model, body.input)
    vectors = await embed(model, texts)
    if body.dimensions is not None:
        if body.dimensions > vectors.shape[1]:
            raise Refused(400, f"vectors of this model have {vectors.shape[1]} dimensions", "dimensions", "invalid_value")
        vectors = F.normalize(vectors[:, : body.dimensions], dim=-1)
    rows = vectors.numpy().astype("<f4")
    data = [{"object": "embedding", "index": i, "embedding": encoded(row, body.encoding_format)} for i, row in enumerate(rows)]
    return {"object": "list", "data": data, "model": body.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


async def ranked(model: Model, body: RerankRequest) -> dict[str, Any]:
    scores, tokens = await score(model, [body.query] * len(body.texts), body.texts, body.how)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: body.top_n]
    shown = [{"document": {"text": body.texts[i]}} if body.return_documents else {} for i in order]
    results = [{"index": i, "relevance_score": scores[i], **more} for i, more in zip(order, shown)]
    return {"id": f"rerank-{secrets.token_hex(12)}", "model": body.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}, "results": results}


async def scored(model: Model, body: ScoreRequest) -> dict[str, Any]:
    values, tokens = await score(model, *body.pairs_of(), body.how)
    data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(values)]
    return {"id": f"score-{secrets.token_hex(12)}", "object": "list", "created": int(time.time()), "model": body.model, "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def encoded(row: np.ndarray[Any, Any], form: str | None) -> list[float] | str:
    return base64.b64encode(row.tobytes()).decode() if form == "base64" else row.tolist()


def texts_of(model: Model, given: Any) -> tuple[list[str], int]:
    """The texts, and how many tokens they have in all."""
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    if len(given) > MOST_TEXTS:
        raise Refused(400, f"{len(given)} texts; at most {MOST_TEXTS} at a time", "input", "invalid_value")
    if wrong := [i for ids in given if not isinstance(ids, str) for i in ids if not 0 <= i < model.vocab]:
        raise Refused(400, f"{wrong[0]} is no token of this model (0 to {model.vocab - 1})", "input", "invalid_value")
    texts = [text if isinstance(text, str) else model.tokenizer.decode(text) for text in given]
    return texts, measured(model, texts, "input")


def measured(model: Model, texts: list[str], param: str) -> int:
    """Tokens of all texts; an empty one, and one that is too long, are refused."""
    sizes = [len(ids) for ids in model.tokenizer.encode_each(texts)]
    if not all(sizes):
        raise Refused(400, f"text {sizes.index(0)} is empty", param, "invalid_value")
    if max(sizes) > model.context:
        raise Refused(400, f"text {sizes.index(max(sizes))} has {max(sizes)} tokens; the context has {model.context}", param, "context_length_exceeded")
    return sum(sizes)


async def embed(model: Model, texts: list[str]) -> Tensor:
    """(N, D)"""
    return torch.cat([await model.embed(texts[i : i + PORTION]) for i in range(0, len(texts), PORTION)])


async def score(model: Model, first: list[str], second: list[str], how: How | None) -> tuple[list[float], int]:
    """How well each pair fits, and the tokens read: by a model that judges pairs, else by the cosine of the texts' vectors."""
    distinct = list(dict.fromkeys(first))
    tokens = await asyncio.to_thread(measured, model, [*distinct, *second], "documents")
    if isinstance(model, VectorModel) and how is not None:
        raise Refused(400, "an encoder has one way to score; leave `how` out", "how", "invalid_value")
    if how in ("yes-no", "likelihood") or model.judges:
        parts = [slice(i, i + PORTION) for i in range(0, len(first), PORTION)]
        try:
            return [p for part in parts for p in await model.judge(first[part], second[part], how or "")], tokens
        except BadInput as error:
            raise told(error, "how", "invalid_value") from error
    vectors = await embed(model, [*distinct, *second])
    place = {text: i for i, text in enumerate(distinct)}
    left, right = vectors[[place[text] for text in first]], vectors[len(distinct):]
    return F.cosine_similarity(left, right).tolist(), tokens
