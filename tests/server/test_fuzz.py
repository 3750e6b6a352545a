"""The HTTP face under fire: requests made from its own OpenAPI document (schemathesis), and by hand. No 500, no hang."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from served_models import random_llm

from pellucid.server import running_server

schemathesis = pytest.importorskip("schemathesis")


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


def fuzz(url: str, examples: int) -> dict[int, int]:
    """Statuses that came, of `examples` requests to each operation; half of them with the model that exists."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    seen: dict[int, int] = {}
    with httpx.Client(timeout=30) as client:
        for found in schema.get_all_operations():
            operation = found.ok()
            strategy = operation.as_strategy()
            if operation.method == "post":
                strategy = st.one_of(strategy, operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))

            @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate], derandomize=True,
                      suppress_health_check=list(HealthCheck))
            @given(case=strategy, real=st.booleans())
            def one(case: Any, real: bool) -> None:
                if real:
                    case.body = valid(case.body)
                arguments = case.as_transport_kwargs(base_url=url)
                keep = {k: arguments.get(k) for k in ("method", "url", "json", "data", "params", "headers") if arguments.get(k) is not None}
                try:
                    answer = client.request(**keep)
                except (httpx.InvalidURL, UnicodeEncodeError, httpx.LocalProtocolError, TypeError):  # what no client can send
                    return
                seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
                assert answer.status_code < 500, (keep, answer.text)
                if answer.status_code >= 400:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text

            one()
    return seen


def test_requests_made_from_the_document(url: str):
    seen = fuzz(url, 8)
    assert seen.get(200, 0) > 4 and seen.get(400, 0) > 10, seen
    assert httpx.get(f"{url}/health").json()["pending"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1500)  # most of it is schemathesis, which makes the requests
def test_many_requests_made_from_the_document(url: str):
    fuzz(url, 300)
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
