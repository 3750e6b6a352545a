"""What an engine does, for people: one line per interval, from its events, or a live view of its inside.

    engine  running=3 waiting=0  prompt 512.0 generated 84.2 tokens/s  cache 12% of 40,960 tokens  hits 63%  preempted 0  drafts 71% of 340 accepted
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time as clock
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from pellucid.cli.display import printable
from pellucid.cli.live import sparkline
from pellucid.errors import PellucidError
from pellucid.events import Event, subscribed
from pellucid.messages import add, say

add({
    "watch.queue": ("queue", "队列"), "watch.batch": ("batch", "批次"), "watch.blocks": ("blocks", "缓存块"), "watch.tree": ("prefix tree", "前缀树"),
    "watch.idle": ("idle", "空闲"), "watch.more": ("and {count} more", "另有 {count} 个"),
    "watch.legend": ("█ several share  ▓ one uses  ░ kept for reuse  · empty", "█ 多者共享  ▓ 单个使用  ░ 留待复用  · 空"),
})
SUMMED = ("tokens", "generated", "preempted", "hit", "prompt", "proposed", "accepted")  # fields of steps
ROWS, NODES, SPAN = 8, 12, 10  # requests, nodes of the tree, and seconds of steps that are shown


class EngineLines:
    """Subscriber of `engine_step`: says at most every `interval` seconds what the steps since the last line did."""

    def __init__(self, out: TextIO, interval: float = 5.0):
        self.out, self.interval = out, interval
        self._since = clock.monotonic()
        self._sums = dict.fromkeys(SUMMED, 0)

    def __call__(self, event: Event) -> None:
        if event.kind != "engine_step":
            return
        step: Any = event
        for name in self._sums:
            self._sums[name] += getattr(step, name)
        now = clock.monotonic()
        if now - self._since >= self.interval:
            self.out.write(line(step, self._sums, now - self._since) + "\n")
            self.out.flush()
            self._since, self._sums = now, dict.fromkeys(self._sums, 0)


def line(step: Any, sums: dict[str, int], seconds: float) -> str:
    """step: the latest event, or all engines together; sums: over the steps of the last `seconds`."""
    used = 1 - step.available / step.blocks
    hits = f"{sums['hit'] / sums['prompt']:.0%}" if sums["prompt"] else "-"
    return (f"engine  running={step.running} waiting={step.waiting}  prompt {(sums['tokens'] - sums['generated']) / seconds:.1f} "
            f"generated {sums['generated'] / seconds:.1f} tokens/s  cache {used:.0%} of {step.blocks:,} blocks  hits {hits}  "
            f"preempted {sums['preempted']}{drafts_told(sums['proposed'], sums['accepted'])}")


def drafts_told(proposed: int, accepted: int) -> str:
    """Of speculative decoding; nothing where nothing was proposed."""
    return f"  drafts {accepted / proposed:.0%} of {proposed:,} accepted" if proposed else ""


# --- live ---------------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One engine as it stands: `Engine.snapshot`, its cache, and what its steps did in the last seconds."""

    name: str
    state: dict[str, Any]
    cells: list[int]  # of each block: 0 empty, 1 kept for reuse, 2 used by one, 3 shared
    nodes: list[tuple[int, str, int, int, int]]  # of the tree: depth, text, blocks, of these in use, hits
    held: int  # blocks that can be found


@dataclass
class Watch:
    """Context manager: draws every engine of a registry `rate` times a second until it is left."""

    registry: Any
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))
    rate: float = 4.0

    def __post_init__(self) -> None:
        self.steps: deque[Any] = deque()
        self.begun = clock.monotonic()
        self._seen: dict[str, Seen] = {}
        self._asked: dict[str, Future[Seen]] = {}
        self._lock = threading.Lock()
        own = self.console.file in (sys.stdout, sys.stderr)  # what others print meanwhile goes above the view
        self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=self.rate, transient=True,
                          redirect_stdout=own, redirect_stderr=own)
        self._subscription = subscribed(self._take)

    def __enter__(self) -> Watch:
        self._subscription.__enter__()
        self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._live.stop()
        self._subscription.__exit__(None, None, None)

    def _take(self, event: Any) -> None:
        if event.kind == "engine_step":
            with self._lock:
                self.steps.append(event)

    def render(self) -> RenderableType:
        """From the newest answers of the engines; they are asked again, and answer between two steps."""
        with self._lock:
            while self.steps and self.steps[0].time < clock.time() - SPAN:
                self.steps.popleft()
            steps = list(self.steps)
        zones: list[RenderableType] = [rates(steps, [engine.engine for engine in self.registry.engines])]
        for engine in self.registry.engines:
            asked = self._asked.get(engine.name)
            if asked is not None and asked.done() and asked.exception() is None:
                self._seen[engine.name] = asked.result()
            if asked is None or asked.done():
                with contextlib.suppress(PellucidError):  # one that has ended stays as it was seen last
                    self._asked[engine.name] = engine.call_soon(look_at(engine))
            if engine.name in self._seen:
                zones += panel(self._seen[engine.name], self.console.width)
        return Group(*zones)


def look_at(engine: Any) -> Callable[[], Seen]:
    """Runs in the engine's thread: copies what is shown."""
    def look() -> Seen:
        cache, decode = engine.engine.cache, engine.llm.tokenizer.decode
        nodes = tree(cache, decode) if hasattr(cache, "nodes") else []
        known = [key is not None for key in cache.key_of] if hasattr(cache, "key_of") else getattr(cache, "held", [0] * cache.blocks)
        cells = [3 if n - bool(nodes and k) > 1 else 2 if n - bool(nodes and k) == 1 else 1 if k else 0 for n, k in zip(cache.references, known)]
        return Seen(engine.name, engine.engine.snapshot(), cells, nodes, sum(map(bool, known)))

    return look


def tree(cache: Any, decode: Callable[[list[int]], str]) -> list[tuple[int, str, int, int, int]]:
    """The first nodes of a radix tree, deepest branch first."""
    depth: dict[int, int] = {}
    rows = []
    for node in itertools.islice(cache.nodes(), NODES):
        depth[id(node)] = depth.get(id(node.parent), -1) + 1
        used = sum(cache.references[b] > 1 for b in node.blocks)
        rows.append((depth[id(node)], decode(node.tokens[:24]), len(node.blocks), used, node.hits))
    return rows


@dataclass
class Now:
    """All engines together, as they stand; a step's event tells these of its own engine."""

    running: int
    waiting: int
    available: int
    blocks: int


def rates(steps: list[Any], engines: list[Any]) -> RenderableType:
    """The line of the last seconds, with a curve of the tokens of each of them."""
    if not steps:
        return Text(say("watch.idle"), "dim")
    sums = {name: sum(getattr(step, name) for step in steps) for name in SUMMED}
    seconds = max(0.5, clock.time() - steps[0].time)
    now = clock.time()
    bins = [0.0] * (SPAN * 2)
    for step in steps:
        bins[max(0, min(len(bins) - 1, int((SPAN - (now - step.time)) * 2)))] += step.tokens
    lengths = ((len(e.scheduler.running), len(e.scheduler.waiting), e.cache.available(), e.cache.blocks) for e in engines)
    return Text.assemble(line(Now(*map(sum, zip(*lengths, strict=True))), sums, seconds), "  ", (sparkline(bins), "cyan"))


def panel(seen: Seen, width: int) -> list[RenderableType]:
    """Batch, queue, blocks and tree of one engine."""
    zones: list[RenderableType] = [Rule(Text(printable(seen.name), "bold"), style="dim", align="left")]
    for title, rows in ((say("watch.batch"), seen.state["running"]), (say("watch.queue"), seen.state["waiting"])):
        if rows:
            zones.append(requests(title, rows))
    totals = seen.state["totals"]
    hits = f"{totals['hit_tokens'] / totals['prompt_tokens']:.0%}" if totals["prompt_tokens"] else "-"
    zones.append(Text.assemble(
        (f"{say('watch.blocks')}  ", "bold"), f"{sum(c >= 2 for c in seen.cells)} + {sum(c == 1 for c in seen.cells)} / {len(seen.cells)} x {seen.state['block']}"
        f"   hits {hits}   preempted {totals['preemptions']}   evicted {totals.get('evictions', 0)}"
        f"{drafts_told(totals['proposed_tokens'], totals['accepted_tokens'])}   ", (say("watch.legend"), "dim")))
    zones.append(Text(strip(seen.cells, max(16, width - 2)), "green"))
    if seen.nodes:
        zones.append(Text(say("watch.tree"), "bold"))
        for depth, text, blocks, used, found in seen.nodes:
            zones.append(Text(f"{'  ' * depth}└ {printable(text)[:60]!r}  {blocks} blocks, {used} in use, {found} hits", no_wrap=True, overflow="ellipsis"))
    return zones


def requests(title: str, rows: list[dict[str, Any]]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_row(Text(title, "bold"), *(Text(name, "dim") for name in ("prompt", "hit", "computed", "of", "preempted", "block table")))
    for row in rows[:ROWS]:
        blocks = row["blocks"]
        shown = " ".join(map(str, blocks if len(blocks) <= 12 else [*blocks[:8], "…", *blocks[-3:]]))
        table.add_row(f"#{row['number']} {row['state']}", str(row["prompt"]), str(row["hit"]), str(row["computed"]), str(row["known"]),
                      str(row["preemptions"]), Text(shown, "dim", no_wrap=True, overflow="ellipsis"))
    if len(rows) > ROWS:
        table.add_row(Text(say("watch.more", count=len(rows) - ROWS), "dim"))
    return table


def strip(cells: list[int], width: int) -> str:
    """The blocks in order, `width` signs at most: each shows the busiest of its share."""
    share = -(-len(cells) // width)
    return "".join("·░▓█"[max(cells[i : i + share])] for i in range(0, len(cells), share))
