"""The engines' figures in Prometheus's text format, under the names that vLLM's dashboards read (`vllm:...`), one series a model.

Gauges tell the state of now, counters what happened since the start, histograms how long requests waited and ran.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pellucid.engine.async_llm import AsyncLLM
from pellucid.engine.core import accepted_at
from pellucid.engine.latency import Histogram
from pellucid.server.registry import Registry, Served

Row = tuple[dict[str, str], float]

GAUGES = {
    "vllm:num_requests_running": ("Requests that run", lambda e: len(e.engine.scheduler.running)),
    "vllm:num_requests_waiting": ("Requests that wait", lambda e: len(e.engine.scheduler.waiting)),
    "vllm:spec_decode_draft_acceptance_rate": (
        "Share of the proposed tokens that was accepted, since the start", lambda e: e.totals["accepted_tokens"] / max(1, e.totals["proposed_tokens"])),
    "vllm:kv_cache_usage_perc": ("Share of the cache's blocks in use; 1 is all", lambda e: 1 - e.engine.cache.available() / e.engine.cache.blocks),
}
COUNTERS = {  # name -> (help, the engine's total)
    "vllm:prompt_tokens": ("Tokens of prompts", "prompt_tokens"),
    "vllm:generation_tokens": ("Tokens generated", "generated_tokens"),
    "vllm:prefix_cache_queries": ("Tokens of prompts that were looked for in the prefix cache", "prompt_tokens"),
    "vllm:prefix_cache_hits": ("Tokens of prompts that the prefix cache held", "hit_tokens"),
    "vllm:num_preemptions": ("Times that a running request gave way", "preemptions"),
    "vllm:spec_decode_num_drafts": ("Times that tokens were proposed to a request by speculative decoding", "proposals"),
    "vllm:spec_decode_num_draft_tokens": ("Tokens proposed by speculative decoding", "proposed_tokens"),
    "vllm:spec_decode_num_accepted_tokens": ("Of these, accepted", "accepted_tokens"),
}
HISTOGRAMS = {  # name -> (help, field of the engine's latencies)
    "vllm:request_queue_time_seconds": ("Until a request was taken up", "queued"),
    "vllm:time_to_first_token_seconds": ("Until a request's first token", "first"),
    "vllm:inter_token_latency_seconds": ("Between two tokens of a request", "between"),
    "vllm:time_per_output_token_seconds": ("The same, by the name that older dashboards read", "between"),
    "vllm:e2e_request_latency_seconds": ("Until a request's last token", "whole"),
    "vllm:request_prefill_time_seconds": ("From when a request was taken up to its first token", "prefill"),
    "vllm:request_decode_time_seconds": ("From a request's first token to its last", "decode"),
    "vllm:request_inference_time_seconds": ("From when a request was taken up to its last token", "running"),
    "vllm:request_time_per_output_token_seconds": ("Between two tokens, the mean of each request", "pace"),
    "vllm:request_prompt_tokens": ("Tokens of each request's prompt", "prompt"),
    "vllm:request_generation_tokens": ("Tokens generated for each request", "written"),
    "vllm:request_max_num_generation_tokens": ("Tokens of the longest sample of each request", "longest"),
    "vllm:request_params_max_tokens": ("Tokens that each request allowed", "asked"),
    "vllm:request_params_n": ("Samples that each request asked for", "samples"),
    "vllm:iteration_tokens_total": ("Tokens computed in a step of the engine", "step"),
}
REASONS = ("stop", "length", "abort", "error")


def exposition(registry: Registry) -> str:
    """All series of all models, each ended by a line break."""
    engines = registry.engines
    lines: list[str] = []
    for name, (text, value) in GAUGES.items():
        lines += family(name, "gauge", text, ((labels(e), value(e)) for e in engines))
    for name, (text, total) in COUNTERS.items():
        lines += family(f"{name}_total", "counter", text, ((labels(e), e.totals[total]) for e in engines))
    places = (({**labels(e), "position": str(i)}, e.totals[accepted_at(i)]) for e in engines for i in range(e.engine.drafts))
    lines += family("vllm:spec_decode_num_accepted_tokens_per_pos_total", "counter", "Tokens accepted at each place of a proposal", places)
    reasons = (({**labels(e), "finished_reason": reason}, count) for e in engines for reason, count in sorted({**dict.fromkeys(REASONS, 0), **e.reasons}.items()))
    lines += family("vllm:request_success_total", "counter", "Samples that ended, by reason", reasons)
    for name, (text, field) in HISTOGRAMS.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
        for e in engines:
            lines += histogram(name, labels(e), getattr(e.latencies, field))
    adapters = ({"model_name": m.parent or "", "adapter": m.name} for m in registry.models.values() if isinstance(m, Served) and m.adapter is not None)
    lines += family("vllm:lora_adapters_loaded", "gauge", "Adapters that can be asked for", ((label, 1) for label in adapters))
    return "\n".join(lines) + "\n"


def labels(engine: AsyncLLM) -> dict[str, str]:
    return {"model_name": engine.name}


def family(name: str, kind: str, text: str, rows: Iterable[Row]) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for label, value in rows:
        yield series(name, label, value)


def histogram(name: str, label: dict[str, str], found: Histogram) -> Iterator[str]:
    sums = found.cumulative()
    for bound, count in zip([*map(bound_text, found.bounds), "+Inf"], sums):
        yield series(f"{name}_bucket", {**label, "le": bound}, count)
    yield series(f"{name}_sum", label, found.sum)
    yield series(f"{name}_count", label, sums[-1])


def bound_text(bound: float) -> str:
    """As Prometheus's own client writes it: bounds are compared as texts.

    >>> bound_text(1), bound_text(0.25), bound_text(2000000)
    ('1.0', '0.25', '2e+06')
    """
    return f"{bound:g}" if bound >= 10**6 else repr(float(bound))


def series(name: str, label: dict[str, str], value: Any) -> str:
    def quoted(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    inside = ",".join(f'{key}="{quoted(text)}"' for key, text in label.items())
    return f"{name}{{{inside}}} {float(value):g}" if isinstance(value, int) and value < 10**6 else f"{name}{{{inside}}} {float(value)!r}"
