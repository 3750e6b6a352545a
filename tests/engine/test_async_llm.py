"""AsyncLLM: the same tokens as LLM, all requests together, cancelled ones gone at once, failures told and survived."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pellucid.engine import LLM, AsyncLLM, SamplingParams
from pellucid.engine.async_llm import Closed, QueueFull
from pellucid.engine.config import EngineConfig
from pellucid.engine.job import TextReader
from pellucid.errors import BadInput
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.tokenizers import train_bpe


@pytest.fixture(scope="module")
def llm() -> LLM:
    tokenizer = train_bpe(["The quick brown fox jumps over the lazy dog. " * 20, "".join(map(chr, range(32, 700)))], 480)
    spec = DecoderSpec(480, 32, (Layer(Attn(4, 2, 8, Rope(8), qk_norm=True), MLP(48)),) * 2, tied=True, context=256)
    return LLM(init_weights(Decoder(spec), seed=5).eval(), tokenizer)


def run(llm: LLM, main: Any, **options: Any) -> Any:
    async def inside() -> Any:
        async with AsyncLLM(llm, **options) as engine:
            result = await main(engine)
            cache = engine.engine.cache
            for _ in range(200):  # what was cancelled leaves after the step under way
                if not engine.engine.busy and not engine.pending:
                    break
                await asyncio.sleep(0.01)
            assert cache.available() == cache.blocks, "blocks were kept"
            return result

    return asyncio.run(inside())


PROMPTS = ["The quick", "fox", "the lazy dog jumps over the quick brown fox", "over"]


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_same_as_llm_all_at_once(llm: LLM, drafts: int):
    params = [SamplingParams(max_tokens=30 + i, temperature=0.7 if i % 2 else 0.0, seed=i, n=1 + i % 2, logprobs=True) for i in range(len(PROMPTS))]
    expected = llm.generate(PROMPTS, params)

    async def one(engine: AsyncLLM, prompt: str, p: SamplingParams) -> Any:
        return [output async for output in engine.generate(prompt, p)][-1]

    async def main(engine: AsyncLLM) -> Any:
        return await asyncio.gather(*(one(engine, *pair) for pair in zip(PROMPTS, params)))

    for found, wanted in zip(run(llm, main, config=EngineConfig(drafts=drafts)), expected):
        assert found.prompt_token_ids == wanted.prompt_token_ids
        for a, b in zip(found.outputs, wanted.outputs, strict=True):
            assert (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=1e-4)


def test_a_stream_is_the_answer_in_pieces_and_ends_at_a_stop_text(llm: LLM):
    text = llm.generate(["fox"], SamplingParams(max_tokens=40))[0].outputs[0].text
    stop = text[10:13]

    async def main(engine: AsyncLLM) -> Any:
        whole = [chunk async for chunk in engine.stream("fox", SamplingParams(max_tokens=40))]
        cut = [chunk async for chunk in engine.stream("fox", SamplingParams(max_tokens=40, stop=(stop,)))]
        return whole, cut, engine.totals["generated_tokens"]

    whole, cut, generated = run(llm, main)
    assert "".join(c.text for c in whole) == text and len(whole) > 10 and whole[-1].finish_reason
    assert "".join(c.text for c in cut) == text[: text.index(stop)] and cut[-1].finish_reason == "stop"
    assert generated < 40 + 39, "what follows a stop text is not generated"


def test_chat_and_vectors(llm: LLM):
    messages = [{"role": "user", "content": "fox"}]

    async def main(engine: AsyncLLM) -> Any:
        async for output in engine.chat(messages, SamplingParams(max_tokens=8)):
            answer = output
        return answer, await engine.embed(["fox", "dog"])

    answer, vectors = run(llm, main)
    assert answer.outputs[0].text == llm.chat(messages, SamplingParams(max_tokens=8)).outputs[0].text
    torch.testing.assert_close(vectors, llm.embed(["fox", "dog"]))


def test_leaving_the_loop_and_cancelling_the_task_free_the_cache(llm: LLM):
    async def main(engine: AsyncLLM) -> None:
        stream = engine.stream("fox", SamplingParams(max_tokens=200, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        task = asyncio.ensure_future(anext(engine.generate("the quick brown fox " * 8, SamplingParams(max_tokens=100, n=4))))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(llm, main)


def test_what_can_never_run_is_refused_and_the_queue_is_bounded(llm: LLM):
    async def main(engine: AsyncLLM) -> None:
        for prompt, params in (("fox", SamplingParams(max_tokens=300)), ([], None), ([99999], None)):
            with pytest.raises(BadInput):
                async for _ in engine.generate(prompt, params):
                    pass
        streams = [engine.stream("fox", SamplingParams(max_tokens=200, ignore_eos=True)) for _ in range(4)]
        for stream in streams[:2]:
            await anext(stream)
        waiting = asyncio.ensure_future(anext(streams[2]))
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFull):
            await anext(streams[3])
        for stream in streams[:2]:
            await stream.aclose()
        assert (await waiting).text is not None, "who waited comes in"
        await streams[2].aclose()

    run(llm, main, config=EngineConfig(running=2), waiting=1)


def test_a_failure_is_told_and_survived(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    async def main(engine: AsyncLLM) -> Any:
        before = [c async for c in engine.stream("fox", SamplingParams(max_tokens=8))]
        step = engine.engine.step

        def broken() -> Any:
            raise RuntimeError("memory is full")

        monkeypatch.setattr(engine.engine, "step", broken)
        with pytest.raises(RuntimeError, match="memory is full"):
            async for _ in engine.stream("fox", SamplingParams(max_tokens=8)):
                pass
        assert engine.engine.step is not step, "a new engine serves those who come"
        after = [c async for c in engine.stream("fox", SamplingParams(max_tokens=8))]
        assert "".join(c.text for c in after) == "".join(c.text for c in before)
        return engine.totals

    assert run(llm, main)["generated_tokens"] == 16, "counters go on where the failed engine's ended"


def test_a_call_beside_a_failing_request_is_answered(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    async def main(engine: AsyncLLM) -> Any:
        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("memory is full")

        monkeypatch.setattr(engine.engine, "add", broken)
        with engine._wake:  # so that the engine's thread finds both at once
            future = engine.call_soon(lambda: 7)
            job = await engine.submit([[1, 2]], [SamplingParams(max_tokens=2)], lambda p, _: TextReader(llm.tokenizer, p))
        with pytest.raises(RuntimeError, match="memory is full"):
            async for _ in job:
                pass
        return await asyncio.wait_for(asyncio.wrap_future(future), 5)

    assert run(llm, main) == 7


def test_closing_ends_what_runs(llm: LLM):
    async def main() -> None:
        engine = AsyncLLM(llm)
        stream = engine.stream("fox", SamplingParams(max_tokens=200, ignore_eos=True))
        await anext(stream)
        await asyncio.to_thread(engine.close)
        with pytest.raises(Closed):
            async for _ in stream:
                pass
        with pytest.raises(Closed):
            await anext(engine.stream("fox", SamplingParams(max_tokens=8)))

    asyncio.run(main())


def test_a_deadline(llm: LLM):
    async def main(engine: AsyncLLM) -> None:
        job = await engine.submit([[1, 2]], [SamplingParams(max_tokens=250, ignore_eos=True)], lambda p, _: Silent())
        job.expire_after(0.02)
        with pytest.raises(TimeoutError):
            async for _ in job:
                pass

    run(llm, main)


class Silent:
    finish_reason = None

    def read(self, request: Any, tokens: list[int]) -> None:
        self.finish_reason = request.finish_reason


def test_an_answer_without_tokens_is_no_time_between_tokens():
    """A process may refuse a request that another one has begun."""
    job: Any = SimpleNamespace(first=1.0)
    choice: Any = SimpleNamespace(last=1.0)
    AsyncLLM._time(SimpleNamespace(), job, choice, 0, 2.0)  # type: ignore[arg-type]
    assert (job.first, choice.last) == (1.0, 1.0)
