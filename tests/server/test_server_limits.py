"""What the server bears: broken bodies, large ones, too many at once, clients that leave, its own end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from served_models import Actor, poisoned_llm

from pellucid import events
from pellucid.engine.config import EngineConfig
from pellucid.errors import BadInput
from pellucid.server import running_server
from pellucid.server.run import bind, url_of

LONG = "one two three " * 60


@pytest.fixture(scope="module")
def actor() -> Actor:
    return Actor()


@pytest.fixture(scope="module")
def url(actor: Actor) -> Iterator[str]:
    with running_server(actor.llm, "actor", waiting=2, max_body=20_000, engine=EngineConfig(running=1)) as url:
        yield url


@pytest.fixture
def served() -> Iterator[list[Any]]:
    found: list[Any] = []
    with events.subscribed(lambda e: found.append(e) if e.kind == "served" else None):
        yield found


def ask(url: str, timeout: float = 60, **more: Any) -> httpx.Response:
    body = {"model": "actor", "messages": [{"role": "user", "content": "one"}], **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=timeout)


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def pending(url: str) -> int:
    return httpx.get(f"{url}/health").json()["pending"]


@pytest.mark.parametrize(("content", "status", "says"), [
    (b"{", 400, "not valid JSON"),
    (b"", 400, "missing"),
    (b"[]", 400, ""),
    (b"null", 400, ""),
    (b'"text"', 400, ""),
    (b"\xff\xfe", 400, ""),
    (b'{"model": "actor", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "NaN is no number of JSON"),
    (b'{"model": "actor", "messages": [{"role": "user", "content": "x"}], "tools": [1e400]}', 400, "1e400 is no number of JSON"),
    (b'{"model": "actor", "messages": [{"role": "user", "content": "\xe9"}]}', 400, "'utf-8' codec can't decode"),
    (b'{"seed": ' + b"9" * 5000 + b"}", 400, "Exceeds the limit"),
    (b'{"model": "actor", "messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}', 200, ""),
    (b"[" * 15_000, 400, "recursion"),
    (b'{"pad": "' + b"x" * 30_000 + b'"}', 413, "20,000"),
])
def test_broken_bodies(url: str, actor: Actor, content: bytes, status: int, says: str):
    actor.say("fine")
    answer = httpx.post(f"{url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and says in error["message"]
    assert ask(url).status_code == 200


def test_a_large_body_without_its_length_is_not_read_to_its_end(url: str):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Transfer-Encoding: chunked\r\n\r\n" + (b"%x\r\n" % 25_000) + b"x" * 25_000 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413"), "the last chunk was never sent"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/v1/images/generations", 404),
                                                        ("GET", "/docs", 404), ("GET", "/v1/models/other", 404)])
def test_other_paths(url: str, method: str, path: str, status: int):
    answer = httpx.request(method, url + path)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_too_many_at_once(url: str, actor: Actor):
    """One runs and two wait; the fourth hears so at once, and the three are answered."""
    actor.say(LONG).model.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        first = [pool.submit(ask, url, max_tokens=5) for _ in range(3)]
        try:
            until(lambda: pending(url) == 3)
            answer = ask(url, max_tokens=5)
            assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "queue_full"
            assert ask(url, stream=True).status_code == 429, "a stream hears it before it begins"
            assert not any(f.done() for f in first)
        finally:
            actor.model.gate.set()
        assert [f.result().status_code for f in first] == [200] * 3
    until(lambda: pending(url) == 0)


def test_one_generation_at_a_time(url: str, actor: Actor):
    actor.say("one", pause=0.03)
    inside, most, step = [0], [0], actor.model.logits

    def watched(hidden: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        try:
            return step(hidden)
        finally:
            inside[0] -= 1

    actor.model.logits = watched  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(3) as pool:
            assert [f.result().status_code for f in [pool.submit(ask, url, max_tokens=8) for _ in range(3)]] == [200] * 3
    finally:
        del actor.model.logits
    assert most == [1]


def test_the_loop_stays_free_while_it_generates(url: str, actor: Actor):
    actor.say(LONG).model.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, url, max_tokens=5)
        try:
            until(lambda: pending(url) == 1)
            assert httpx.get(f"{url}/v1/models", timeout=20).status_code == 200 and not running.done()
        finally:
            actor.model.gate.set()
        assert running.result().status_code == 200


def test_a_reader_who_leaves_a_stream_ends_the_work(url: str, actor: Actor, served: list[Any]):
    actor.say(LONG, pause=0.02)
    body = {"model": "actor", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 400}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
        time.sleep(0.1)
    until(lambda: served)
    assert served[0].finish_reason == "cancelled" and served[0].completion_tokens < 200


def test_a_client_who_hangs_up_ends_the_work(url: str, actor: Actor, served: list[Any]):
    actor.say(LONG, pause=0.02)
    with pytest.raises(httpx.ReadTimeout):
        ask(url, timeout=0.4, max_tokens=400)
    until(lambda: served)
    assert served[0].finish_reason == "cancelled" and served[0].completion_tokens < 200


def test_one_who_leaves_the_queue_costs_nothing(url: str, actor: Actor, served: list[Any]):
    actor.say(LONG, pause=0.02)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, url, max_tokens=60)
        until(lambda: pending(url) == 1)
        with pytest.raises(httpx.ReadTimeout):
            ask(url, timeout=0.4, max_tokens=400)
        assert running.result().status_code == 200
    until(lambda: len(served) == 2)
    assert sorted((e.finish_reason, e.completion_tokens) for e in served) == [("cancelled", 0), ("length", 60)]


def test_a_failure_inside_is_told_and_survived(url: str, actor: Actor, monkeypatch: pytest.MonkeyPatch):
    def broken(hidden: Any) -> Any:
        raise RuntimeError("secret path /home/x")

    actor.say("fine")
    monkeypatch.setattr(actor.model, "logits", broken)
    answer = ask(url)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error" and "secret" not in answer.text
    streamed = ask(url, stream=True)
    assert streamed.status_code == 200 and "RuntimeError" in streamed.text and "[DONE]" not in streamed.text and "secret" not in streamed.text
    monkeypatch.undo()
    assert ask(url).json()["choices"][0]["message"]["content"] == "fine"


def test_logits_that_are_no_numbers_end_one_request_alone():
    """The embedding of a character is NaN: who sends it hears so, whole, streamed, and of /v1/responses; all others are answered as before."""
    llm, poison = poisoned_llm()
    never = {str(poison): -100}
    with running_server(llm, "actor") as url, ThreadPoolExecutor(8) as pool:
        def say(text: str, **more: Any) -> httpx.Response:
            return ask(url, messages=[{"role": "user", "content": text}], logit_bias=never, max_tokens=60, temperature=0, ignore_eos=True, **more)

        texts = [f"one {i}" for i in range(4)]
        want = [say(text).json()["choices"] for text in texts]
        running = [(pool.submit(say, text), pool.submit(say, f"{text} a~b", stream=i % 2 == 1)) for i, text in enumerate(texts)]
        for i, (good, bad) in enumerate(running):
            assert good.result().json()["choices"] == want[i]
            answer = bad.result()
            assert answer.status_code == (200 if i % 2 else 500)
            error = answer.json() if not i % 2 else json.loads(answer.text.strip().split("data: ")[-1])
            assert error["error"]["type"] == "server_error" and error["error"]["code"] == "not_numbers" and "not numbers" in error["error"]["message"]
            assert "[DONE]" not in answer.text
        body = {"model": "actor", "input": "a~b", "max_output_tokens": 5}
        assert httpx.post(f"{url}/v1/responses", json=body).status_code == 500
        failed = httpx.post(f"{url}/v1/responses", json={**body, "stream": True}).text
        assert "event: response.failed" in failed and "not numbers" in failed and "response.completed" not in failed
        assert 'finished_reason="error"} 6' in httpx.get(f"{url}/metrics").text
        until(lambda: pending(url) == 0)
        assert "vllm:kv_cache_usage_perc{model_name=\"actor\"} 0" in httpx.get(f"{url}/metrics").text


def test_shutdown_lets_the_running_answer_end(actor: Actor):
    actor.say(LONG, pause=0.01)
    results: list[httpx.Response] = []
    with running_server(actor.llm, "actor") as url:
        thread = threading.Thread(target=lambda: results.append(ask(url, max_tokens=60)))
        thread.start()
        until(lambda: pending(url) == 1)
    thread.join(10)
    assert results and results[0].status_code == 200 and results[0].json()["usage"]["completion_tokens"] == 60
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_health_needs_no_key(actor: Actor):
    with running_server(actor.llm, "actor", api_key="key") as url:
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "model": "actor", "pending": 0}
        for headers in ({}, {"Authorization": "Basic key"}, {"Authorization": "key"}, {"Authorization": "Bearer keys"}, {"Authorization": "Bearer ke"}, {"Authorization": "Bearer"}):
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "bearer key"}).status_code == 200


def test_it_listens_on_this_machine_only_and_says_when_it_cannot(actor: Actor):
    listener = bind("127.0.0.1", 0)
    try:
        assert url_of(listener).startswith("http://127.0.0.1:")
        listener.listen()
        with pytest.raises(BadInput, match="cannot listen"):
            bind("127.0.0.1", listener.getsockname()[1])
    finally:
        listener.close()
    for host, port in (("127.0.0.1", 70_000), ("no such host", 0)):
        with pytest.raises(BadInput, match="cannot listen"):
            bind(host, port)
    with running_server(actor.llm, "actor") as url:
        port = int(url.rsplit(":", 1)[1])
        others = {a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
        for address in (a for a in others if not a.startswith("127.")):
            with pytest.raises(OSError):
                socket.create_connection((address, port), timeout=1)


def test_the_openapi_document(url: str):
    document = httpx.get(f"{url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} <= set(document["paths"])
    assert "messages" in json.dumps(document)
