"""What a client can send or ask that must harm nobody else: odd types of body, extreme parameters, salts, crowds for vectors."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from served_models import Actor, random_llm
from test_server_limits import LONG, ask, pending, until

from pellucid.engine import LLM
from pellucid.engine.config import EngineConfig
from pellucid.engine.job import Job
from pellucid.errors import BadInput
from pellucid.server import create_app, guard, responses, run, running_server
from pellucid.server.answers import finite
from pellucid.server.cors import check_origins
from pellucid.server.errors import Refused
from pellucid.server.jobs import namespace_of
from pellucid.server.protocol import Sampling
from pellucid.server.run import bind

GOOD = json.dumps({"model": "actor", "messages": [{"role": "user", "content": "one"}]}).encode()


@pytest.fixture(scope="module")
def actor() -> Actor:
    return Actor()


@pytest.fixture(scope="module")
def url(actor: Actor) -> Iterator[str]:
    with running_server(actor.llm, "actor", engine=EngineConfig(running=2), waiting=4) as url:
        yield url


# --- the body ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("headers", "status"), [
    ({}, 200),
    ({"Content-Type": "application/x-www-form-urlencoded"}, 200),  # curl -d
    ({"Content-Type": "application/json; charset=utf-8", "Origin": "http://page"}, 200),
    ({"Content-Type": "application/vnd.api+json", "Origin": "http://page"}, 200),
    ({"Origin": "http://page"}, 415),
    ({"Content-Type": "text/plain", "Origin": "http://page"}, 415),
    ({"Content-Type": "application/x-www-form-urlencoded", "Origin": "null"}, 415),
    ({"Content-Type": "application/json", "Content-Encoding": "identity"}, 200),
    ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415)])
def test_types_of_body(url: str, actor: Actor, headers: dict[str, str], status: int):
    """JSON is understood however it is declared, but not from a page of another origin that never asked whether it may."""
    actor.say("fine")
    content = gzip.compress(GOOD) if headers.get("Content-Encoding") == "gzip" else GOOD
    answer = httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    if status == 200:
        assert answer.json()["choices"][0]["message"]["content"] == "fine"
    else:
        assert answer.json()["error"]["code"] == ("unsupported_encoding" if "Content-Encoding" in headers else "unsupported_type")


def test_pages_of_named_origins_may_call(actor: Actor):
    """As a browser asks: first whether it may send JSON, a key and the client's own headers; what comes back it shows to that page alone."""
    page, other = "http://localhost:3000", "https://elsewhere.example"
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
    with running_server(actor.llm, "actor", api_key="key", cors=[page]) as url:
        chat, key = f"{url}/v1/chat/completions", {"Authorization": "Bearer key", "Content-Type": "application/json"}
        asked = httpx.options(chat, headers={"Origin": page, **wanted})
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == page and "POST" in asked.headers["access-control-allow-methods"]
        assert {"authorization", "content-type", "x-stainless-os"} <= set(asked.headers["access-control-allow-headers"].lower().replace(" ", "").split(","))
        refused = httpx.options(chat, headers={"Origin": other, **wanted})
        assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
        for more in ({}, {"stream": True}):
            actor.say("fine")
            answer = httpx.post(chat, json={**json.loads(GOOD), **more}, headers={"Origin": page, **key}, timeout=60)
            assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == page and '"finish_reason":"stop"' in answer.text
            assert "x-request-id" in answer.headers["access-control-expose-headers"].lower() and "access-control-allow-credentials" not in answer.headers
        for headers, status in (({"Authorization": "Bearer no"}, 401), ({"Content-Type": "text/plain"}, 415), ({"Content-Type": "application/json"}, 400)):
            answer = httpx.post(chat, content=b"{", headers={"Origin": page, **key, **headers})
            assert answer.status_code == status and answer.headers["access-control-allow-origin"] == page, "the page can read why"
        actor.say("fine")
        answer = httpx.post(chat, content=GOOD, headers={"Origin": other, **key}, timeout=60)
        assert "access-control-allow-origin" not in answer.headers, "a browser keeps it from the page"
        assert httpx.post(chat, content=GOOD, headers={"Origin": other, **key, "Content-Type": "text/plain"}).status_code == 415
        assert "access-control-allow-origin" not in httpx.get(f"{url}/health").headers
    with running_server(actor.llm, "actor", api_key="key", cors=["*"]) as url:
        assert httpx.options(f"{url}/v1/models", headers={"Origin": other, **wanted}).headers["access-control-allow-origin"] == "*"


def test_without_the_option_no_page_may_call(url: str, actor: Actor):
    actor.say("fine")
    asked = httpx.options(f"{url}/v1/chat/completions", headers={"Origin": "http://page", "Access-Control-Request-Method": "POST"})
    answer = httpx.post(f"{url}/v1/chat/completions", content=GOOD, headers={"Origin": "http://page", "Content-Type": "application/json"}, timeout=60)
    assert asked.status_code == 405 and not [h for r in (asked, answer) for h in r.headers if h.startswith("access-control")]


def test_origins_are_checked_before_anything_is_served():
    for origin in ("http://localhost:3000", "https://chat.example.org", "http://[::1]:8080", "chrome-extension://abcdef", "tauri://localhost"):
        check_origins([origin], locked=False)
    for origin in ("localhost:3000", "http://", "http://page/", "http://page/path", "HTTP://page", "http://Page", "http://a b", "http://page:x", "http://page:99999",
                   "http://page:80", "https://page:443", "http://me@page", "https://*.example.org", "null", "", "http://página"):
        with pytest.raises(BadInput, match="is no origin"):
            check_origins([origin], locked=True)
    check_origins(["*"], locked=True)
    with pytest.raises(BadInput, match="asks for no key"):
        check_origins(["*"], locked=False)


def test_an_image_is_refused_by_its_name(url: str):
    image = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "actor", "messages": [{"role": "user", "content": image}]})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "messages.0.content.1" and error["code"] == "unsupported_type"
    assert error["message"] == "messages.0.content.1: 'image_url' is not supported here; it may be 'text', 'refusal'"
    answer = httpx.post(f"{url}/v1/responses", json={"model": "actor", "input": [{"type": "web_search_call"}]})
    assert answer.status_code == 400 and "'web_search_call' is not supported here" in answer.text


def test_what_is_wrong_is_named(url: str):
    """Of a field that may be a text or parts, the part that is wrong; where nothing is more exact, the field."""
    def error(path: str, **body: Any) -> dict[str, Any]:
        answer = httpx.post(f"{url}/v1/{path}", json={"model": "actor", **body})
        assert answer.status_code == 400
        return answer.json()["error"]

    image = {"type": "image_url", "image_url": {"url": "x"}}
    found = error("chat/completions", messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, image]}])
    assert "image_url" in found["message"] and found["param"] == "messages.0.content.1"
    assert "input_text" in error("responses", input=[{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}])["message"]
    assert error("responses", input=[{"type": "reasoning", "content": [{"text": 5}]}, {"role": "user", "content": "x"}])["param"].endswith("text")
    assert error("completions", prompt=["a", [1]])["param"] == "prompt"
    assert error("chat/completions", messages=[{"role": "user"}])["param"] == "messages.0"


def test_answers_are_not_held_back(url: str):
    """A connection that is kept: the kernel would wait for 40 ms with the second half of an answer if nobody forbade it."""
    with bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP, "by this asyncio knows that it may forbid it"
    with httpx.Client() as client:
        def seconds() -> float:
            began = time.perf_counter()
            client.get(f"{url}/health")
            return time.perf_counter() - began

        assert min(seconds() for _ in range(10)) < 0.03


def test_a_body_of_just_the_size_and_one_that_dribbles(actor: Actor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "READING", 0.5)
    actor.say("fine")
    with running_server(actor.llm, "actor", max_body=1000) as url:
        for size, status in ((1000, 200), (1001, 413)):
            assert httpx.post(f"{url}/v1/chat/completions", content=GOOD.ljust(size), timeout=60).status_code == status
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_halves_of_characters_are_told_to_their_sender(url: str, actor: Actor):
    actor.say("fine")
    answer = httpx.post(f"{url}/v1/responses", content=b'{"model": "actor", "input": "x", "instructions": "a \\ud800 b"}', timeout=60)
    assert answer.status_code == 200 and answer.json()["instructions"] == "a \ud800 b"


# --- connections and the end ------------------------------------------------------------------------------------------------------------


def test_connections_that_ask_nothing_are_closed(actor: Actor, monkeypatch: pytest.MonkeyPatch):
    """Silent ones, half a header, half a second one; not a stream that takes longer than the silence that is borne."""
    monkeypatch.setattr(run, "SILENCE", 0.4)
    with running_server(actor.llm, "actor") as url:
        host, port = url.removeprefix("http://").split(":")
        actor.say(LONG, pause=0.02)
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(ask, url, stream=True, max_tokens=100)
            for sent in (b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /he"):
                with socket.create_connection((host, int(port)), timeout=20) as connection:
                    connection.sendall(sent)
                    received = b""
                    while part := connection.recv(1000):
                        received += part
                    assert received.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")
            assert stream.result().text.endswith("data: [DONE]\n\n")


def test_answers_longer_than_the_grace_hear_that_the_server_ends(actor: Actor):
    server = run.Server(create_app(actor.llm, "actor"), grace=0.4)
    listener = bind("127.0.0.1", 0)
    url = run.url_of(listener)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    with ThreadPoolExecutor(2) as pool:
        actor.say(LONG * 3, pause=0.02)
        whole, stream = (pool.submit(ask, url, max_tokens=400, stream=stream) for stream in (False, True))
        until(lambda: pending(url) == 2)
        server.should_exit = True
        began = time.monotonic()
        answer = whole.result()
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5" and answer.json()["error"]["code"] == "shutting_down"
        assert '"shutting_down"' in stream.result().text.splitlines()[-2] and "[DONE]" not in stream.result().text
    thread.join(20)
    assert not thread.is_alive() and 0.3 < time.monotonic() - began < 5


# --- extreme parameters -------------------------------------------------------------------------------------------------------


def test_extreme_parameters_are_refused_and_disturb_nobody(url: str, actor: Actor):
    actor.say(LONG, pause=0.01)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, url, max_tokens=60)
        until(lambda: pending(url) == 1)
        for wrong in ({"repetition_penalty": 1e-300}, {"top_k": 10**30}, {"top_k": 2**31}, {"logit_bias": {"9" * 5000: 1}},
                      {"seed": 2**63}, {"priority": 10**30}, {"max_tokens": 10**30}, {"min_tokens": 10**30}):
            answer = ask(url, **{"max_tokens": 3, **wrong})
            assert answer.status_code == 400 and next(iter(wrong)) in answer.text, (wrong, answer.text)
        for odd in ({"temperature": 5e-324, "logprobs": True, "top_logprobs": 2}, {"top_p": 5e-324}, {"typical_p": 5e-324}, {"repetition_penalty": 0.01}, {"top_k": 2**31 - 1}, {"seed": -(2**63)},
                    {"seed": 2**63 - 1, "n": 2}):
            assert ask(url, **{"max_tokens": 2, "temperature": 1, **odd}).status_code == 200, odd
        answer = running.result()
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 60


def test_a_stop_text_in_a_call_that_was_cut_off_ends_the_answer_all_the_same(url: str, actor: Actor):
    text = "<tool_call> one stop two"
    actor.say(text)
    choice = ask(url, stop="stop", max_tokens=len(actor.tokenizer.encode(text))).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("<tool_call> one ", "stop")


def test_what_is_impossible_has_a_probability_that_json_can_hold():
    assert [finite(p) for p in (-math.inf, math.nan, -1.5)] == [-9999.0, -9999.0, -1.5]


def test_no_salt_is_anothers_namespace():
    """Not an adapter's, not a key's: whoever shares a namespace reads what others have cached."""
    def namespace(model: str, tenant: str, salt: str | None) -> str:
        return namespace_of(SimpleNamespace(namespace=model), Sampling(model="m", cache_salt=salt), tenant)  # type: ignore[arg-type]

    assert namespace("", "", None) == ""
    parts = [(m, t, s) for m in ("", "a#1", "0") for t in ("", "0", "1") for s in (None, "a#1", "0", "\0", "\x000", "0\0", "a#1\0\0", "', '0")]
    assert len({namespace(*p) for p in parts}) == len(parts)


# --- what is kept ---------------------------------------------------------------------------------------------------------------


def test_kept_responses_count_with_all_that_they_hold(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(responses, "KEPT_CHARACTERS", 10_000)
    kept = responses.Conversations()
    for i in range(20):
        kept.keep({"id": str(i), "instructions": "x" * 3000}, [], "")
    assert list(kept.kept) == ["17", "18", "19"] and 9000 < kept.characters <= 10_000
    for i in ("17", "18", "19"):
        kept.forget(i, "")
    assert kept.characters == 0
    monkeypatch.setattr(responses, "KEPT", 2)
    for i in range(5):
        kept.keep({"id": str(i)}, [], str(i % 2))
    assert list(kept.kept) == ["3", "4"] and kept.find("3", "1").body == {"id": "3"}
    for tenant in ("", "0"):
        with pytest.raises(Refused, match="no response '3'"):
            kept.find("3", tenant)
        with pytest.raises(Refused):
            kept.forget("3", tenant)


def test_a_job_that_has_ended_is_not_held_until_its_time_is_up():
    async def run() -> None:
        job = Job([], asyncio.get_running_loop(), lambda _: None)
        job.expire_after(1000)
        job.cancel()
        assert job.expiry is not None and job.expiry.cancelled()
        job = Job([], asyncio.get_running_loop(), lambda _: None)
        job.expire_after(0.01)
        with pytest.raises(TimeoutError, match=r"longer than 0\.01 s"):
            async for _ in job:
                pass

    asyncio.run(run())


# --- usage while it streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "asked"), [("chat/completions", {"messages": [{"role": "user", "content": "x"}]}), ("completions", {"prompt": "x"})])
def test_usage_with_every_part(url: str, actor: Actor, path: str, asked: dict[str, Any]):
    def parts(**options: bool) -> list[dict[str, Any]]:
        actor.say("one two three")
        text = httpx.post(f"{url}/v1/{path}", json={"model": "actor", "stream": True, "stream_options": options, "max_tokens": 6, **asked}).text
        return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]

    every = [part["usage"]["completion_tokens"] for part in parts(continuous_usage_stats=True)]
    assert every == sorted(every) and every[0] < every[-1] <= 6 and len(every) > 3
    assert [bool(part.get("usage")) for part in parts(include_usage=True)][-2:] == [False, True]
    assert not any(part.get("usage") for part in parts())


# --- vectors ------------------------------------------------------------------------------------------------------------------------


def vectors(url: str, timeout: float = 60) -> httpx.Response:
    return httpx.post(f"{url}/v1/embeddings", json={"model": "tiny", "input": "one"}, timeout=timeout)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> tuple[LLM, threading.Event]:
    """A model that makes vectors when the gate is open."""
    llm, gate = random_llm(), threading.Event()
    embed = llm.embed
    embed(["one"])  # what has to be compiled is
    monkeypatch.setattr(llm, "embed", lambda texts: embed(texts) if gate.wait(60) else None)
    return llm, gate


def test_crowds_for_vectors_are_refused_too(gated: tuple[LLM, threading.Event]):
    """Two may be here; one that leaves makes room; all are answered when the engine goes on."""
    llm, gate = gated
    with running_server(llm, "tiny", engine=EngineConfig(running=1), waiting=1) as url, ThreadPoolExecutor(4) as pool:
        try:
            with pytest.raises(httpx.ReadTimeout):
                vectors(url, 0.3)
            time.sleep(0.3)  # by then the server has seen that it is gone
            waiting = [pool.submit(vectors, url) for _ in range(2)]
            time.sleep(0.3)
            late = vectors(url)
            assert late.status_code == 429 and late.headers["retry-after"] == "1" and late.json()["error"]["code"] == "queue_full"
            assert httpx.post(f"{url}/v1/rerank", json={"model": "tiny", "query": "x", "documents": ["y"]}).status_code == 429
            assert httpx.post(f"{url}/v1/score", json={"model": "tiny", "text_1": "x", "text_2": "y"}).status_code == 429
            assert not any(f.done() for f in waiting)
        finally:
            gate.set()
        assert [f.result().status_code for f in waiting] == [200] * 2
        assert vectors(url).status_code == 200


def test_vectors_have_the_time_that_answers_have(gated: tuple[LLM, threading.Event]):
    llm, gate = gated
    with running_server(llm, "tiny", timeout=1) as url:
        late = vectors(url)
        gate.set()
        assert late.status_code == 504 and "1 s" in late.json()["error"]["message"]
        assert vectors(url).status_code == 200
