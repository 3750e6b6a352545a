"""Several processes as one engine: outputs are those of one process, token by token, however the work is shared out.

One pair of processes opens one model after the other (see conftest.py).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from several import LAYOUTS, ROOMY, TIGHT, requests, run, same
from tiny_splits import tokenizer, write_adapter

from pellucid import events
from pellucid.engine import LLM, AsyncLLM, SamplingParams, StructuredOutput
from pellucid.engine.adapters import read_adapter
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.fleet import Fleet
from pellucid.engine.job import TextReader
from pellucid.engine.layout import Layout
from pellucid.engine.opening import open_model
from pellucid.engine.request import Request, State
from pellucid.errors import BadInput
from pellucid.models.hub import read_config, spec_of
from pellucid.parallel import Processes, RankDied
from pellucid.quant import bits_named


@pytest.fixture(scope="module")
def alone(folders):
    """One process's answers, by family."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = run(Engine(open_model(folders(family)), [], ROOMY, tokenizer()), requests())
        return made[family]

    return of


CONFIGS = {"roomy": ROOMY, "tight": TIGHT, "swap": EngineConfig(cache_tokens=128, block=4, budget=16, running=4, swap=True),
           "radix": EngineConfig(cache_tokens=160, budget=16, prefix="radix"), "drafts": EngineConfig(cache_tokens=800, block=4, drafts=3)}


CASES = [
    ("tensor", "llama", "tight"), ("tensor", "qwen3", "radix"), ("tensor", "qwen3-moe", "roomy"), ("tensor", "deepseek-v3", "tight"),
    ("tensor", "qwen3-next", "swap"), ("attention", "deepseek-v3", "tight"), ("attention", "qwen3-moe", "roomy"), ("replicas", "qwen3", "roomy"),
    ("disaggregated", "llama", "roomy"), ("disaggregated", "gpt-oss", "roomy"), ("disaggregated", "qwen3-next", "roomy"), ("disaggregated", "deepseek-v3", "tight"),
]
MORE = [
    *[("tensor", family, "roomy") for family in ("llama", "qwen3", "deepseek-v3", "llama-one-kv", "gpt-oss", "gpt2")],
    ("tensor", "qwen3", "tight"), ("tensor", "qwen3-moe", "tight"), ("tensor", "llama", "swap"), ("tensor", "deepseek-v3", "drafts"),
    ("attention", "deepseek-v3", "roomy"), ("attention", "deepseek-v3", "radix"), ("attention", "qwen3-moe", "tight"), ("attention", "llama", "drafts"),
    ("attention", "qwen3-next", "swap"), ("disaggregated", "deepseek-v3", "radix"), ("disaggregated", "llama", "tight"),
    ("disaggregated", "llama", "drafts"), ("disaggregated", "gpt-oss", "swap"),
]


@pytest.mark.parametrize(("kind", "family", "config"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)])
def test_outputs_are_those_of_one_process(kind, family, config, fleet_of, alone):
    fleet = fleet_of(family, kind, CONFIGS[config])
    same(run(fleet, requests()), alone(family))
    assert fleet.cache.available() == fleet.cache.blocks and not fleet.requests and not fleet.number_of
    if config == "tight":
        assert fleet.totals["preemptions"] > 0
    if config == "roomy" and family != "qwen3-next" and kind != "attention":
        again = run(fleet, requests())
        same(again, alone(family))
        assert fleet.totals["hit_tokens"] > 0 and again[4].hit > 0


@pytest.mark.parametrize(("kind", "family", "quantize"), [
    ("tensor", "llama", "int8"), ("tensor", "qwen3-wide", "int4"), ("attention", "deepseek-v3", "int8"), ("disaggregated", "qwen3-wide", "int4"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("tensor", "deepseek-v3", "int8"), ("attention", "qwen3-moe", "int4"), ("replicas", "qwen3", "int8"),
        ("tensor", "qwen3-moe", "int8"), ("tensor", "qwen3-next", "int8"), ("tensor", "gpt2", "int8"), ("attention", "llama", "int4"),
        ("replicas", "deepseek-v3", "int4"), ("disaggregated", "deepseek-v3", "int8"), ("disaggregated", "qwen3-next", "int8")))])
def test_quantized_outputs_are_those_of_one_quantized_process(kind, family, quantize, fleet_of, folders):
    """Sums in another order move an activation over the edge of a rounding now and then: tokens are the same, log-probabilities nearly."""
    fleet = fleet_of(family, kind, TIGHT, quantize=quantize)
    want = run(Engine(open_model(folders(family), bits=bits_named(quantize)), [], ROOMY, tokenizer()), requests())
    for a, b in zip(run(fleet, requests()), want, strict=True):
        assert a.output == b.output and a.finish_reason == b.finish_reason
        for ours, theirs in ((a.logprobs, b.logprobs), (a.prompt_logprobs, b.prompt_logprobs)):
            assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=2e-2)
    assert fleet.totals["preemptions"] > 0 or kind == "disaggregated"
    assert all(r["weights"] < 0.8 * sum(p.numel() for p in fleet.model.parameters()) * 4 for r in fleet.ready)


@pytest.mark.slow
def test_replicas_of_tensor_parallel_groups(folders, alone):
    """Two engines of two processes each: both answer, together as one process; with drafts, INT8 weights and an adapter in all of them."""
    layout = Layout(tp=2, dp=2)
    assert layout.leads == [0, 2] and layout.links == [(0, 1), (2, 3)]
    processes = Processes("pellucid.engine.worker", layout.processes, layout.links, threads=1)
    folder = folders("llama")

    def opened(**options) -> Fleet:
        return Fleet(folder, layout, spec_of(read_config(folder)), tokenizer(), replace(TIGHT, drafts=3), processes=processes, **options)

    try:
        fleet = opened()
        same(run(fleet, requests()), alone("llama"))
        assert [fleet.latest[rank]["totals"]["generated_tokens"] > 0 for rank in (0, 2)] == [True, True]
        assert fleet.totals["generated_tokens"] == sum(10 + i for i in range(6)) and fleet.router.loads == [0, 0]
        fleet.close()
        write_adapter(folder, folder.parent / "adapter", target_modules=["o_proj", "v_proj"], r=2, lora_alpha=8)
        fleet, model = opened(quantize="int8"), open_model(folder, bits=8)
        answers = []
        for engine, adapter in ((fleet, fleet.load_adapter(folder.parent / "adapter")), (Engine(model, [], ROOMY), read_adapter(folder.parent / "adapter", model))):
            asked = requests()
            for r in asked[::2]:
                r.adapter, r.namespace = adapter, "adapter"
            answers.append([r.output for r in run(engine, asked)])
        assert answers[0] == answers[1]
        fleet.close()
    finally:
        processes.close()


@pytest.mark.parametrize(("family", "quantize", "config"), [("deepseek-v3", None, "tight"), pytest.param("qwen3-moe", None, "roomy", marks=pytest.mark.slow),
                                                            pytest.param("deepseek-v3", "int8", "drafts", marks=pytest.mark.slow)])
def test_groups_with_requests_of_their_own_share_feed_forwards(family, quantize, config, folders):
    """Data-parallel attention of groups of two: heads are cut in two, experts and feed-forwards in four."""
    layout, folder = Layout(tp=2, dp_attention=2), folders(family)
    assert layout.leads == [0, 2] and layout.processes == 4 and layout.together
    processes = Processes("pellucid.engine.worker", layout.processes, layout.links, threads=1)
    try:
        model = open_model(folder, bits=bits_named(quantize))
        want = run(Engine(model, [], ROOMY, tokenizer()), requests())
        fleet = Fleet(folder, layout, spec_of(read_config(folder)), tokenizer(), CONFIGS[config], processes=processes, quantize=quantize)
        got = run(fleet, requests())
        if quantize is None:
            same(got, want)
            weights = sum(p.nbytes for p in model.parameters())
            assert all(r["weights"] < 0.6 * weights for r in fleet.ready)
        assert [r.output for r in got] == [r.output for r in want]
        assert all(fleet.latest[rank]["totals"]["generated_tokens"] > 0 for rank in (0, 2)) and len(fleet.ready) == 4
        fleet.router.choose = lambda request: 1  # type: ignore[method-assign]
        assert [r.output for r in run(fleet, requests())] == [r.output for r in want]  # the other group has nothing to do
        fleet.close()
    finally:
        processes.close()


def test_outputs_are_those_of_transformers(fleet_of, folders):
    """One family a layout, beside an engine that is not ours."""
    import transformers

    for kind, family in (("tensor", "deepseek-v3"), ("attention", "qwen3-moe"), ("disaggregated", "llama")):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folders(family))
        fleet = fleet_of(family, kind)
        for r in run(fleet, requests(prompt_logprobs=None)[:3]):
            with torch.no_grad():
                want = theirs.generate(torch.tensor([r.prompt]), max_new_tokens=r.params.max_tokens, do_sample=False, pad_token_id=0)
            assert r.output == want[0, len(r.prompt) :].tolist()
        fleet.close()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_everything_that_a_request_can_ask_for_goes_with_it(kind, fleet_of, folders):
    asked = dict(temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.3, logit_bias={5: 1.5, 9: -2.0}, min_tokens=3,
                 stop_token_ids=(17,), stop=("or", "12"), ignore_eos=False)
    ours, model = fleet_of("qwen3-moe", kind), open_model(folders("qwen3-moe"))
    want = run(Engine(model, tokenizer().eos_ids, ROOMY, tokenizer()), requests(**asked))
    same(run(ours, requests(**asked)), want)
    form = StructuredOutput(regex="[0-9]{3}-[a-f]+")
    want = run(Engine(model, tokenizer().eos_ids, ROOMY, tokenizer()), requests(structured=form, ignore_eos=False))
    same(run(ours, requests(structured=form, ignore_eos=False)), want)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_cancelling_at_any_time_frees_everything(kind, fleet_of, alone):
    fleet = fleet_of("deepseek-v3", kind, TIGHT)
    for moment in (0, 1, 3, 6):
        some = requests()
        for r in some:
            fleet.add(r)
        for _ in range(moment):
            if fleet.busy:
                fleet.step()
        for r in some[::2]:
            fleet.cancel(r)
            fleet.cancel(r)
        while fleet.busy:
            fleet.step()
        assert all(r.state is State.FINISHED for r in some) and {r.finish_reason for r in some[1::2]} == {"length"}
        same(some[1::2], alone("deepseek-v3")[1::2])
    same(run(fleet, requests()), alone("deepseek-v3"))  # its answers come behind all that was cancelled
    assert fleet.cache.available() == fleet.cache.blocks and fleet.router.loads == [0] * len(fleet.router.loads)


def test_the_latent_cache_is_divided_by_requests_and_held_several_times_by_tensor_parallelism(fleet_of, folders):
    """Bytes of cache a token and process: MLA keeps one latent for all heads; GQA's heads can be shared out."""
    spec = spec_of(read_config(folders("deepseek-v3")))
    tensor, attention = fleet_of("deepseek-v3", "tensor"), None
    assert [r["cache_bytes_per_token"] for r in tensor.ready] == [spec.kv_bytes_per_token] * 2
    tokens = tensor.cache.blocks * tensor.cache.size
    tensor.close()
    attention = fleet_of("deepseek-v3", "attention")
    assert [r["cache_bytes_per_token"] for r in attention.ready] == [spec.kv_bytes_per_token] * 2
    assert attention.cache.blocks * attention.cache.size == 2 * tokens  # in the same bytes: each process holds other requests
    used = []
    for r in requests()[:4]:
        attention.add(r)
    with events.subscribed(lambda e: used.append(e.blocks - e.available) if e.kind == "engine_step" else None):
        while attention.busy:
            attention.step()
    assert len({place for place in range(2) if attention.latest.get(place)}) == 2 and max(used) > 0
    attention.close()
    qwen = fleet_of("qwen3", "tensor")
    assert [r["cache_bytes_per_token"] for r in qwen.ready] == [spec_of(read_config(folders("qwen3"))).kv_bytes_per_token / 2] * 2
    assert all(r["read"] <= r["weights"] < 0.6 * 4 * 2 * 10**6 for r in qwen.ready) and all(r["peak"] for r in qwen.ready)


def test_an_idle_process_takes_part(fleet_of, alone):
    """All requests in one process: the other computes its experts for it in every step."""
    fleet = fleet_of("deepseek-v3", "attention")
    fleet.router.choose = lambda request: 1  # type: ignore[method-assign]
    same(run(fleet, requests()), alone("deepseek-v3"))
    assert fleet.latest[0]["totals"]["computed_tokens"] == 0 < fleet.latest[1]["totals"]["computed_tokens"]


def test_rows_of_few_among_many_are_packed(folders, alone):
    """Four processes: all requests in one of them, then most of them there. Filled up, the others' rows would be mostly nothing."""
    layout, folder = Layout(dp_attention=4), folders("qwen3-moe")
    processes = Processes("pellucid.engine.worker", layout.processes, layout.links, threads=1)
    try:
        fleet = Fleet(folder, layout, spec_of(read_config(folder)), tokenizer(), ROOMY, processes=processes)
        for place in (lambda r: 2, lambda r: 3 * (len(r.prompt) > 50)):
            fleet.router.choose = place  # type: ignore[method-assign]
            same(run(fleet, requests()), alone("qwen3-moe"))
        fleet.close()
    finally:
        processes.close()


def test_tokens_that_overtake_others_wait_for_them(fleet_of):
    """What the answering process says may be heard before what the prompt's process said."""
    fleet = fleet_of("llama", "disaggregated")
    r = Request([1, 2, 3], SamplingParams(max_tokens=9, logprobs=True))
    fleet.requests[0], fleet.number_of[r], fleet.router.loads[0] = (r, 0), 0, r.limit
    fleet.scheduler.waiting.append(r)

    def row(at, tokens, reason=None):
        return {"number": 0, "at": at, "tokens": tokens, "logprobs": [-float(t) for t in tokens], "reason": reason, "fault": None, "hit": 0, "preemptions": 0}

    assert fleet._take(1, {"step": [row(1, [11])]}) == [] and r.generated == 0
    assert fleet._take(1, {"step": [row(2, [12, 13])]}) == []
    assert fleet._take(0, {"step": [row(0, [10])]}) == [(r, [10]), (r, [11]), (r, [12, 13])]
    assert r.output == [10, 11, 12, 13] and r.logprobs == [-10, -11, -12, -13]
    assert fleet._take(1, {"step": [row(4, [14], "length")]}) == [(r, [14])] and not fleet.requests and not fleet.early


def test_a_request_stands_once_in_a_step_whatever_was_heard_meanwhile(fleet_of):
    """Processes go on while nobody listens: its last tokens and those before them may be taken in one step. A reader would end at the first."""
    fleet = fleet_of("llama", "replicas")
    r, other = (Request([1, 2, 3], SamplingParams(max_tokens=3)) for _ in range(2))
    for number, request in enumerate((r, other), start=1000):
        fleet.requests[number], fleet.number_of[request] = (request, 0), number
        fleet.scheduler.waiting.append(request)
        fleet.router.loads[0] += request.limit
        fleet.router.counts[0] += 1
    for number, at, tokens, reason in ((1000, 0, [10], None), (1001, 0, [20], None), (1000, 1, [11, 12], "length"), (1001, 1, [21], None)):
        fleet.heard.put((0, {"step": [{"number": number, "at": at, "tokens": tokens, "reason": reason, "fault": None, "hit": 0, "preemptions": 0}]}))
    given = fleet.step()
    assert given == [(r, [10, 11, 12]), (other, [20, 21])] and r.finish_reason == "length"
    reader = TextReader(tokenizer(), r.params)
    chunk = reader.read(*given[0])
    assert chunk is not None and chunk.token_ids == [10, 11, 12] and chunk.finish_reason == "length"
    fleet._leave(other, "cancelled")


# --- the faces --------------------------------------------------------------------------------------------------------------


def test_llm_and_async_llm_speak_to_processes(folders):
    folder = folders("qwen3")
    plain, llm = LLM(folder), LLM(folder, tp=2, config=EngineConfig(cache_tokens=2048, running=8))
    try:
        prompts = ["hello world", "12 + 30 =", "assistant think"]
        params = SamplingParams(max_tokens=12, n=2, temperature=0.7, seed=3)
        assert [[c.text for c in o.outputs] for o in llm.generate(prompts, params)] == [[c.text for c in o.outputs] for o in plain.generate(prompts, params)]
        assert [c.token_ids for c in llm.beam_search("hello", 3, 8)[0].outputs] == [c.token_ids for c in plain.beam_search("hello", 3, 8)[0].outputs]
        stream = llm.stream("hello world", SamplingParams(max_tokens=30))
        next(stream)
        stream.close()
        assert not llm.fleet.busy
        assert llm.score("hello", [" world", " 12"], how="likelihood") == pytest.approx(plain.score("hello", [" world", " 12"], how="likelihood"), abs=1e-4)
        with pytest.raises(BadInput, match="whole model in this process"):
            llm.embed(["hello"])

        async def asked() -> list[str]:
            async with AsyncLLM(llm, config=llm.config) as served:
                async def one(prompt: str) -> str:
                    return "".join([c.text async for c in served.stream(prompt, SamplingParams(max_tokens=10))])
                return await asyncio.gather(*(one(p) for p in prompts))

        assert asyncio.run(asked()) == [o.outputs[0].text for o in plain.generate(prompts, SamplingParams(max_tokens=10))]
        assert llm.fleet is None  # its processes have ended with it
    finally:
        llm.close()


@pytest.mark.parametrize(("options", "victim"), [
    ({"tp": 2}, 1), ({"disaggregate": True}, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ({"disaggregate": True}, 0), ({"dp_attention": 2}, 1), ({"dp_attention": 2}, 0), ({"dp": 2}, 0)))])
def test_a_process_that_dies_is_told_to_everybody_at_once(options, victim, folders):
    """Also where it was to take over a prompt, or meets the others in every layer."""
    async def story() -> None:
        served = AsyncLLM(LLM(folders("llama"), **options), config=EngineConfig(cache_tokens=4096, running=8))
        told = asyncio.Event()
        loop = asyncio.get_running_loop()
        times: list[int] = []
        served.when_dead = lambda: (times.append(1), loop.call_soon_threadsafe(told.set))
        processes = served.engine.processes
        got = 0
        with pytest.raises(RankDied, match=f"process {victim} of 2 has ended") as died:
            async for _ in served.stream("hello world", SamplingParams(max_tokens=200, ignore_eos=True)):
                got += 1
                if got == 3:
                    os.kill(processes.running[victim].pid, signal.SIGKILL)
        assert "signal 9" in died.value.why
        await asyncio.wait_for(told.wait(), 10)
        with pytest.raises(RankDied):
            await served.submit([[1]], [SamplingParams(max_tokens=4)], lambda p, n: None)
        await asyncio.to_thread(served.close)
        assert all(p.poll() is not None for p in processes.running) and len(times) == 1

    began = time.monotonic()
    asyncio.run(story())
    assert time.monotonic() - began < 60


def test_what_cannot_be_spread_is_refused_before_a_process_starts(folders):
    folder = folders("qwen3")
    for options, told in (({"tp": 3}, "4 attention heads"), ({"dp": 2, "dp_attention": 2}, "do not go together"), ({"tp": 2, "disaggregate": True}, "do not go together"), ({"tp": 0}, "--tp 0"),
                          ({"tp": 2, "draft": open_model(folder)}, "model object")):
        with pytest.raises(BadInput, match=told):
            LLM(folder, **options)
    llm = LLM(folder, tp=2, quantize="int4")
    with pytest.raises(BadInput, match="INT4 weights cannot be cut over 2 processes"):
        llm.engine()


def test_what_a_process_refuses_is_told_here(folders, tmp_path):
    """A folder whose weights do not fit its config."""
    for path in folders("qwen3").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="is not a whole safetensors file"):
        LLM(tmp_path, tp=2).engine()
