"""What is told of the server's work: metrics, request ids, the log, spans; its limits; encoders beside decoders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from served_models import Actor, random_llm

import pellucid
from pellucid import events
from pellucid.engine import LLM
from pellucid.engine.config import EngineConfig
from pellucid.server import running_server
from pellucid.server.metrics import series


def ask(url: str, timeout: float = 60, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "one"}], **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=timeout, headers=headers)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return random_llm(1024)


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    with running_server(llm, "tiny", max_tokens=300) as url:
        yield url


def figures(url: str) -> dict[tuple[str, frozenset], float]:
    """By the official client's parser of the format."""
    parser = pytest.importorskip("prometheus_client.parser")
    answer = httpx.get(f"{url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {(s.name, frozenset(s.labels.items())): s.value for family in parser.text_string_to_metric_families(answer.text) for s in family.samples}


def test_metrics(url: str):
    label = frozenset({("model_name", "tiny")})
    before = figures(url)
    asked = [ask(url, max_tokens=10, temperature=0).json()["usage"] for _ in range(3)]
    after = figures(url)

    def grown(name: str, more: tuple = ()) -> float:
        return after[name, label | set(more)] - before.get((name, label | set(more)), 0.0)

    assert grown("vllm:prompt_tokens_total") == sum(u["prompt_tokens"] for u in asked) == grown("vllm:prefix_cache_queries_total")
    assert grown("vllm:generation_tokens_total") == sum(u["completion_tokens"] for u in asked)
    assert grown("vllm:prefix_cache_hits_total") == sum(u["prompt_tokens_details"]["cached_tokens"] for u in asked) > 0
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert grown(f"vllm:{name}_count") == 3 == grown(f"vllm:{name}_bucket", (("le", "+Inf"),))
    assert grown("vllm:inter_token_latency_seconds_count") == sum(u["completion_tokens"] for u in asked) - 3
    assert 0 < grown("vllm:time_to_first_token_seconds_sum") < grown("vllm:e2e_request_latency_seconds_sum")
    buckets = sorted((float(dict(k[1])["le"]), v) for k, v in after.items() if k[0] == "vllm:e2e_request_latency_seconds_bucket")
    assert [v for _, v in buckets] == sorted(v for _, v in buckets), "cumulative"
    assert after["vllm:num_requests_running", label] == after["vllm:num_requests_waiting", label] == 0
    assert after["vllm:kv_cache_usage_perc", label] == 0, "what is kept for reuse is free"
    assert sum(v for (name, _), v in after.items() if name == "vllm:request_success_total") >= 3
    assert {dict(k[1])["finished_reason"] for k in before if k[0] == "vllm:request_success_total"} >= {"stop", "length", "abort", "error"}, "from the start"


# Names and bounds of vllm/v1/metrics/loggers.py.
LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # of this model's context
VLLM = {
    "time_to_first_token_seconds": (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
    **dict.fromkeys(("e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds", "request_prefill_time_seconds",
                     "request_decode_time_seconds"), LATENCY),
    **dict.fromkeys(("request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens", "request_params_max_tokens"), TOKENS),
    "request_params_n": (1, 2, 5, 10, 20), "iteration_tokens_total": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    **dict.fromkeys(("inter_token_latency_seconds", "time_per_output_token_seconds", "request_time_per_output_token_seconds"),
                    (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)),
}


def test_histograms_of_vllms_dashboard(llm: LLM):
    written = pytest.importorskip("prometheus_client.utils").floatToGoString
    with running_server(llm, "tiny") as url:
        label = frozenset({("model_name", "tiny")})
        one = ask(url, max_tokens=10, temperature=0, ignore_eos=True).json()["usage"]
        three = ask(url, max_tokens=6, n=3, seed=1, ignore_eos=True).json()["usage"]
        found = figures(url)
    for name, bounds in VLLM.items():
        told = {dict(labels)["le"] for (series_name, labels) in found if series_name == f"vllm:{name}_bucket"}
        assert {written(b) for b in bounds} | {"+Inf"} <= told, name
        assert len(told) <= len(bounds) + 4

    def total(name: str, part: str = "sum") -> float:
        return found[f"vllm:{name}_{part}", label]

    for name in ("request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens", "request_prefill_time_seconds",
                 "request_decode_time_seconds", "request_inference_time_seconds", "request_queue_time_seconds", "request_time_per_output_token_seconds"):
        assert total(name, "count") == 4, "of each sample"
    assert total("request_prompt_tokens") == one["prompt_tokens"] + 3 * three["prompt_tokens"]
    assert total("request_generation_tokens") == one["completion_tokens"] + three["completion_tokens"] == 10 + 18 == total("request_params_max_tokens")
    assert (total("request_params_n"), total("request_params_n", "count")) == (1 + 3, 2)
    assert (total("request_max_num_generation_tokens"), total("request_max_num_generation_tokens", "count")) == (10 + 6, 2)
    assert total("request_inference_time_seconds") == pytest.approx(total("request_prefill_time_seconds") + total("request_decode_time_seconds"))
    assert 0 < total("request_prefill_time_seconds") and 0 < total("request_decode_time_seconds") < 4 * total("e2e_request_latency_seconds")
    mean = [total("request_time_per_output_token_seconds") / 4, total("inter_token_latency_seconds") / total("inter_token_latency_seconds", "count")]
    assert 0.3 < mean[0] / mean[1] < 3
    computed = one["prompt_tokens"] + three["prompt_tokens"] - three["prompt_tokens_details"]["cached_tokens"] + 9 + 15
    assert computed <= total("iteration_tokens_total") <= computed + 2 * three["prompt_tokens"], "the other samples compute the last tokens of their prompt again"


def test_labels_are_escaped():
    assert series("a", {"b": 'x"\\\n'}, 3) == 'a{b="x\\"\\\\\\n"} 3'
    assert series("a", {"b": ""}, 123456789) == 'a{b=""} 123456789.0'


def test_request_ids_and_their_records(url: str):
    found: list[Any] = []
    with events.subscribed(lambda e: found.append(e) if e.kind in ("answered", "served") else None):
        assert ask(url, headers={"X-Request-Id": "mine-1"}, max_tokens=3).headers["x-request-id"] == "mine-1"
        made = ask(url, headers={"X-Request-Id": "x" * 200}, max_tokens=0).headers["x-request-id"]
        assert made.startswith("req_")
        assert httpx.get(f"{url}/nowhere").headers["x-request-id"] != made
        deadline = time.monotonic() + 20
        while sum(e.kind == "answered" for e in found) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    served = next(e for e in found if e.kind == "served")
    answered = {e.request_id: e for e in found if e.kind == "answered"}
    assert served.request_id == "mine-1" and served.model == "tiny" and served.first_token < served.seconds
    assert (answered["mine-1"].status, answered["mine-1"].model, answered["mine-1"].completion_tokens) == (200, "tiny", 3)
    assert answered[made].status == 400 and answered[made].prompt_tokens is None


def test_spans(llm: LLM):
    """OpenTelemetry's own SDK receives one span a request, under the caller's trace."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    with running_server(llm, "tiny", tracing=True) as url:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        answer = ask(url, headers={"traceparent": parent}, max_tokens=4)
        deadline = time.monotonic() + 20
        while not (ours := exporter.get_finished_spans()) and time.monotonic() < deadline:
            time.sleep(0.01)
    (span,) = ours
    assert span.name == "POST /v1/chat/completions" and f"{span.context.trace_id:032x}" in parent
    assert dict(span.attributes) == {
        "http.request.method": "POST", "url.path": "/v1/chat/completions", "http.response.status_code": 200,
        "pellucid.request_id": answer.headers["x-request-id"], "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": answer.json()["usage"]["prompt_tokens"], "gen_ai.usage.output_tokens": 4}


def test_limits_of_tokens_and_time(url: str, llm: LLM):
    refused = ask(url, max_tokens=301)
    assert refused.status_code == 400 and "allows 300" in refused.json()["error"]["message"]
    assert [ask(url, ignore_eos=True, **most).json()["usage"]["completion_tokens"] for most in ({}, {"max_tokens": 300})] == [300, 300]
    actor = Actor()
    actor.say("one two three " * 60, pause=0.02)
    with running_server(actor.llm, "tiny", timeout=1) as slow:
        began = time.monotonic()
        late = ask(slow, max_tokens=200)
        assert late.status_code == 504 and late.json()["error"]["type"] == "timeout_error" and time.monotonic() - began < 5
        actor.say("one two three " * 60, pause=0.02)
        streamed = ask(slow, max_tokens=200, stream=True)
        assert streamed.status_code == 200 and "took longer" in streamed.text and "[DONE]" not in streamed.text
        while httpx.get(f"{slow}/health").json()["pending"]:
            time.sleep(0.01)
        actor.say("fine")
        assert ask(slow).json()["choices"][0]["message"]["content"] == "fine"


def test_keys_share_nothing_that_is_cached(llm: LLM):
    long = [{"role": "user", "content": "one two three four five " * 8}]
    with running_server(llm, "tiny", api_key=["first-key", "second-key"], engine=EngineConfig(order="fair")) as url:
        def cached(key: str, **more: Any) -> int:
            answer = ask(url, headers={"Authorization": f"Bearer {key}"}, messages=long, max_tokens=2, **more).json()
            return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert cached("first-key") == 0 and cached("first-key") > 0
        assert cached("second-key") == 0 and cached("second-key") > 0
        assert cached("first-key", cache_salt="private") == 0 and cached("first-key", cache_salt="private") > 0
        assert ask(url, headers={"Authorization": "Bearer third"}).status_code == 401


# --- encoders -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny BERT and a tiny reranker, written by transformers, with a WordPiece tokenizer."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("encoders")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"), "one", "two", "three", "fox"]
    config = {"vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
    torch.manual_seed(0)
    found = {}
    for name, kind, more in (("bert", transformers.BertModel, {}), ("judge", transformers.BertForSequenceClassification, {"num_labels": 1})):
        folder = found[name] = root / name
        kind(transformers.BertConfig(**config, **more)).save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(words))
        transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return found


def test_encoders_are_served_beside_decoders(encoders: dict[str, Path], llm: LLM):
    transformers = pytest.importorskip("transformers")
    from pellucid.server.registry import open_model

    models = {name: open_model(str(path)) for name, path in encoders.items()}
    texts = ["one two", "fox three two", "one"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoders["bert"])
    with torch.inference_mode():
        rows = tokenizer(texts, padding=True, return_tensors="pt")
        hidden = transformers.AutoModel.from_pretrained(encoders["bert"])(**rows).last_hidden_state
        mask = rows["attention_mask"][..., None]
        vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        pairs = tokenizer(["one two"] * 3, texts, padding=True, return_tensors="pt")
        fits = transformers.AutoModelForSequenceClassification.from_pretrained(encoders["judge"])(**pairs).logits[:, 0].sigmoid()
    with running_server({"tiny": llm, **models}) as url:
        found = httpx.post(f"{url}/v1/embeddings", json={"model": "bert", "input": texts}).json()
        torch.testing.assert_close(torch.tensor([d["embedding"] for d in found["data"]]), vectors, atol=1e-5, rtol=1e-4)
        scores = httpx.post(f"{url}/v1/score", json={"model": "judge", "text_1": "one two", "text_2": texts}).json()
        torch.testing.assert_close(torch.tensor([d["score"] for d in scores["data"]]), fits, atol=1e-5, rtol=1e-4)
        ranked = httpx.post(f"{url}/v1/rerank", json={"model": "judge", "query": "one two", "documents": texts, "return_documents": False}).json()["results"]
        assert [r["index"] for r in ranked] == fits.argsort(descending=True).tolist() and set(ranked[0]) == {"index", "relevance_score"}
        for path, body in (("chat/completions", {"messages": [{"role": "user", "content": "x"}]}), ("completions", {"prompt": "x"}), ("responses", {"input": "x"})):
            refused = httpx.post(f"{url}/v1/{path}", json={"model": "bert", **body})
            assert refused.status_code == 400 and "encoder" in refused.json()["error"]["message"]
        assert httpx.post(f"{url}/v1/embeddings", json={"model": "judge", "input": "x"}).status_code == 400
        assert [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"]] == ["tiny", "bert", "judge"]
        assert httpx.get(f"{url}/metrics").status_code == 200


# --- the command ----------------------------------------------------------------------------------------------------------


def test_the_command_serves_several_models_logs_and_drains_at_sigterm(llm: LLM, encoders: dict[str, Path], tmp_path: Path):
    """A real process: the answer under way at SIGTERM is finished, exit code 0."""
    folder = tmp_path / "tiny"
    pellucid.save(llm.model, folder)
    llm.tokenizer.save(folder)
    command = [sys.executable, "-m", "pellucid", "serve", str(folder), str(encoders["bert"]), "--name", "tiny", "vectors", "--port", "0", "--json",
               "--log", str(tmp_path / "log.jsonl"), "--threads", "1", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None
        url = next(json.loads(line)["url"] for line in process.stdout if '"serving"' in line).removesuffix("/v1")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        assert [m["id"] for m in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]] == ["tiny", "vectors"]
        ask(url, max_tokens=2)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "one"}], "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert '"finish_reason":"length"' in text and "[DONE]" in text
        assert process.wait(30) == 0
    finally:
        process.kill()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {r["kind"] for r in log} == {"answered", "served"} and sum(r["kind"] == "served" for r in log) == 2
