"""The live view: drawn from the state of a real engine that serves."""

from __future__ import annotations

import asyncio
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1] / "server"))
from served_models import random_llm

from pellucid.cli.watch import Watch, look_at, panel, rates, strip
from pellucid.engine import AsyncLLM, SamplingParams
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import EngineStep
from pellucid.messages import set_language


@pytest.mark.parametrize("prefix", ["chain", "radix"])
def test_it_draws_queue_batch_blocks_and_tree(prefix: str):
    set_language("en")
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)

    async def main() -> tuple[str, object]:
        config = EngineConfig(running=2, cache_tokens=1024, prefix=prefix)
        async with AsyncLLM(random_llm(), name="tiny", config=config) as engine:
            async def one(i: int) -> None:
                async for _ in engine.stream(f"one two three four five six seven eight nine ten one two three four five six seven {i}", SamplingParams(max_tokens=120, ignore_eos=True)):
                    pass

            with Watch(SimpleNamespace(engines=[engine]), console, rate=20.0) as watch:
                await one(0)
                tasks = [asyncio.ensure_future(one(i)) for i in range(4)]
                text = ""
                while not all(t.done() for t in tasks):
                    await asyncio.sleep(0.02)
                    with console.capture() as capture:
                        console.print(watch.render())
                    text = max(text, capture.get(), key=lambda t: ("queue" in t, "batch" in t, len(t)))
                await asyncio.gather(*tasks)
                seen = await engine.call(look_at(engine))
            return text, seen

    text, seen = asyncio.run(main())
    assert "tiny" in text and "batch" in text and "queue" in text and "blocks" in text and "tokens/s" in text and "running" in text, text
    assert ("prefix tree" in text) == (prefix == "radix")
    assert seen.state["totals"]["hit_tokens"] > 0 and seen.held > 0 and max(seen.cells) == 1, "all are done: what is left is kept for reuse"
    if prefix == "radix":
        assert any("one two" in row[1] for row in seen.nodes) and max(row[0] for row in seen.nodes) >= 1, "a fork behind the common prefix"
    assert out.getvalue(), "it was drawn"
    assert panel(seen, 80)


def test_an_engine_that_has_ended_is_no_failure():
    """The last picture is drawn behind the end of the server: Ctrl-C ends it with exit code 0."""
    engine = AsyncLLM(random_llm(), name="tiny")
    with Watch(SimpleNamespace(engines=[engine]), Console(file=io.StringIO(), width=100), rate=20.0) as watch:
        engine.close()
        watch.render()


def test_several_engines_are_counted_together():
    step = EngineStep(1, 8, 4, 9, 9, 0, 0, 0, 0, 1, 9, 0.0, 0.1)  # of one of them, when it stepped last
    engines = [SimpleNamespace(scheduler=SimpleNamespace(running=[0] * r, waiting=[0] * w), cache=SimpleNamespace(available=lambda a=a: a, blocks=100))
               for r, w, a in ((3, 1, 20), (2, 0, 80))]
    console = Console(width=300)
    with console.capture() as capture:
        console.print(rates([step], engines))
    assert "running=5 waiting=1" in capture.get() and "cache 50% of 200 blocks" in capture.get()


def test_the_strip_shows_the_busiest_of_each_share():
    assert strip([0, 1, 2, 3], 4) == "·░▓█"
    assert strip([0, 1, 2, 0, 0, 0], 3) == "░▓·"
