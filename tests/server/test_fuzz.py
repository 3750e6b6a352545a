"""The HTTP face under fire: requests made from its own OpenAPI document (schemathesis), and by hand. No 500, no hang."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from served_models import random_llm

from pellucid.server import running_server

schemathesis = pytest.importorskip("schemathesis")
MODES = schemathesis.GenerationMode
FEW = ["GET /health", "GET /metrics", "GET /v1/models", "GET /version"]  # that have nothing to vary
OPERATIONS = [*FEW, "GET /v1/models/{model_id}", "GET /v1/responses/{response_id}", "DELETE /v1/responses/{response_id}", *(f"POST {path}" for path in (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/rerank", "/v1/score", "/tokenize", "/detokenize",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter"))]


def name_of(operation: Any) -> str:
    return f"{operation.method.upper()} {operation.path}"


def modes_of(operation: str) -> list[Any]:
    """Requests as the document describes them and, where there is a body, such as it forbids."""
    return [MODES.POSITIVE, MODES.NEGATIVE] if operation.startswith("POST") else [MODES.POSITIVE]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(random_llm(), "tiny", max_tokens=8, max_body=200_000, timeout=20) as url:
        yield url


def valid(body: Any, model: str = "tiny") -> Any:
    """The body with the model that exists, and short answers: else every request would end at the first check."""
    if isinstance(body, dict):
        body = {**body, "model": model} if "model" in body else body
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of"):
            if isinstance(body.get(name), int) and body[name] > 4:
                body[name] = 4
    return body


def asked(client: httpx.Client, request: dict[str, Any]) -> httpx.Response:
    """Once more where no answer came: a machine that held this process for a minute lets timers run out on both sides. Whoever makes the
    server hang up, or hang, does it again."""
    try:
        return client.request(**request)
    except (httpx.RemoteProtocolError, httpx.ReadError, httpx.TimeoutException):
        return client.request(**request)


class Over(Exception):
    """The share of time of one operation's requests is used up."""


def fuzz(url: str, operation: str, mode: Any, examples: int, share: float = 60) -> tuple[int, dict[int, int]]:
    """How many of `examples` requests to "METHOD /path" were made, and their statuses; half of them have the model that exists. The same
    ones every time.  share: seconds of this process, which makes the requests and answers them; fewer are made where it does not suffice."""
    found = next(o.ok() for o in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations() if name_of(o.ok()) == operation)
    seen: dict[int, int] = {}
    tried, began = 0, time.process_time()

    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate], derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=found.as_strategy(generation_mode=mode), real=st.booleans())
    def one(case: Any, real: bool) -> None:
        nonlocal tried
        if time.process_time() - began > share:
            raise Over
        tried += 1
        if real:
            case.body = valid(case.body)
        arguments = case.as_transport_kwargs(base_url=url)
        keep = {k: arguments.get(k) for k in ("method", "url", "json", "data", "params", "headers") if arguments.get(k) is not None}
        try:
            answer = asked(client, keep)
        except (httpx.InvalidURL, UnicodeEncodeError, httpx.LocalProtocolError, TypeError):  # what no client can send
            return
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, (keep, answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text

    with contextlib.suppress(Over), httpx.Client(timeout=30) as client:
        one()
    return tried, seen


def test_requests_made_from_the_document(url: str):
    document = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert sorted(OPERATIONS) == sorted(f"{method.upper()} {path}" for path, methods in document.items() for method in methods)
    seen: dict[int, int] = {}
    for operation in OPERATIONS:
        for mode in modes_of(operation):
            for status, count in fuzz(url, operation, mode, 4)[1].items():
                seen[status] = seen.get(status, 0) + count
    assert seen.get(200, 0) > 4 and seen.get(400, 0) > 10, seen
    assert httpx.get(f"{url}/health").json()["pending"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)  # on the clock, for a machine that does other work; all of them take two minutes of one core
@pytest.mark.parametrize("operation, mode", [pytest.param(o, m, id=f"{o} {m.value}") for o in OPERATIONS for m in modes_of(o)])
def test_many_requests_made_from_the_document(url: str, operation: str, mode: Any):
    """300 of each kind to each operation; where its share of a minute does not suffice for a third of them, that is an error."""
    tried, seen = fuzz(url, operation, mode, 300)
    assert seen and (tried >= 100 or operation in FEW), f"only {tried} requests were made in the time"
    assert httpx.get(f"{url}/health").json()["pending"] == 0


WORDS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20), st.just("\ud800"), st.sampled_from(
    ["tiny", "user", "function", "json_schema", "required", "text", "x" * 1000, "resp_1", {"type": "function", "function": {"name": "f"}},
     [{"role": "user", "content": "one"}], [{"role": "user", "content": "\ud800\x00"}], {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}},
     {"regex": "("}, {"json": {"$ref": "#/x"}}, {"grammar": "start"}, {"choice": [""]}, {"json": True}, [1, 2, 3], ["one", "two"], [[1], [2]]]))
JSON = st.recursive(WORDS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)
PATHS = {"/v1/chat/completions": {"messages": [{"role": "user", "content": "one"}], "max_tokens": 2}, "/v1/completions": {"prompt": "one", "max_tokens": 2},
         "/v1/responses": {"input": "one", "max_output_tokens": 2}, "/v1/embeddings": {"input": "one"}, "/v1/rerank": {"query": "one", "documents": ["two"]},
         "/v1/score": {"text_1": "one", "text_2": "two"}, "/tokenize": {"prompt": "one"}, "/detokenize": {"tokens": [1]}}
FIELDS = ["messages", "prompt", "input", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "stream", "logprobs", "top_logprobs", "tools", "tool_choice",
          "response_format", "structured_outputs", "logit_bias", "seed", "echo", "best_of", "prompt_logprobs", "stop_token_ids", "min_tokens", "cache_salt", "priority",
          "documents", "text_1", "text_2", "tokens", "dimensions", "encoding_format", "chat_template_kwargs", "reasoning_effort", "previous_response_id", "text", "frequency_penalty",
          "repetition_penalty", "typical_p", "metadata", "stream_options", "instructions", "user", "\ud800", "unknown"]


@settings(max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(sorted(PATHS)), change=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_good_requests_with_something_wrong(url: str, path: str, change: dict[str, Any]):
    body = {"model": "tiny", **PATHS[path], **change}
    answer = httpx.post(url + path, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code < 500, (path, body, answer.text)
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]


def test_content_types_and_encodings(url: str):
    good = json.dumps({"model": "tiny", **PATHS["/v1/chat/completions"]})
    for content, kind in ((good, "text/plain"), (good, ""), ("model=tiny", "application/x-www-form-urlencoded"), (good.encode("utf-16"), "application/json"),
                          (b"--x\r\n\r\n", "multipart/form-data; boundary=x"), (b"\x00" * 100, "application/json")):
        answer = httpx.post(f"{url}/v1/chat/completions", content=content, headers={"Content-Type": kind})
        assert answer.status_code in (200, 400), answer.text
