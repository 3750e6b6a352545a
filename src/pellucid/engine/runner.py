"""A step of the engine on a device: the planned tokens of all requests in one flat pass.

Everything that works on each token alone (projections of the feed-forward, experts, norms, head) sees all tokens at once,
so that weights are read once a step. Mixers see segments: the requests that got one token each together, every longer
part by itself. Models of plain attention run by kernels that read the pages where they lie instead: compiled ones on a CPU
(engine/paged_step.py), Triton's on a GPU (engine/gpu_step.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pellucid.engine.adapters import Adapter, applied
from pellucid.engine.decode import unsuited
from pellucid.engine.gpu_step import GpuStep, choose_gpu_step
from pellucid.engine.layer_groups import Group
from pellucid.engine.native_step import NativeStep, choose_native_step
from pellucid.engine.paged_cache import Pages, Rows, Saved
from pellucid.engine.paged_step import READABLE, PagedBatch, PagedStep
from pellucid.engine.predictor import Predictor
from pellucid.engine.request import Request
from pellucid.engine.sampler import best
from pellucid.engine.scheduler import Part, Plan
from pellucid.engine.transfer import to_device
from pellucid.nn import Decoder
from pellucid.nn.context import Context, Segment, open_context
from pellucid.ops import choose_jit
from pellucid.ops.cache_codes import CacheCodes, cache_codes
from pellucid.runtime import Choice

PROMPT_ROWS = 64
"""Places of a prompt whose log-probabilities are made at a time."""


class Logits(Mapping[Request, Tensor]):
    """Of each request whose next token follows from a step, (1 + drafts, V): of the place behind its last known token, and behind each
    draft.  whole: (N, V), all of them in order, which the next step may write over."""

    def __init__(self, requests: Sequence[Request], whole: Tensor):
        self.requests, self.whole = requests, whole
        self.rows: dict[Request, slice] | None = None  # mostly nobody asks

    def __getitem__(self, request: Request) -> Tensor:
        if self.rows is None:
            stops = list(itertools.accumulate(1 + r.drafts for r in self.requests))
            self.rows = {r: slice(stop - 1 - r.drafts, stop) for r, stop in zip(self.requests, stops, strict=True)}
        return self.whole[self.rows[request]]

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class Runner:
    """Holds the pages. `places`: requests that can be in the engine at a time (for constant states).  codes: the cache's format, by
    default the numbers that the model computes with.

    path: 'compiled', 'triton' or 'flat', and why: whether steps run by compiled kernels on a CPU, by Triton's on a GPU, or through the
    model alone. With 'compiled', adapters take the flat pass in any case, and with numba's kernels long prompts.
    """

    def __init__(self, model: Decoder, blocks: int, size: int, places: int, codes: CacheCodes | None = None,
                 groups: Sequence[Group] | None = None):
        self.model = model
        self.device, self.dtype = model.embed.weight.device, model.compute_dtype or model.embed.weight.dtype
        self.pages = Pages(model.spec, blocks, size, places, codes or cache_codes("auto", self.dtype), self.device, groups)
        native = choose_native_step(model, self.pages)
        self.path = choose_path(model, self.pages.codes, native)
        gpu = choose_gpu_step(model, self.pages)
        self.gpu: GpuStep | None = gpu.value
        if self.gpu is not None or self.device.type != "cpu":
            native, self.path = Choice(None, gpu.reason), Choice("flat" if self.gpu is None else "triton", gpu.reason)
        self.compiled: NativeStep | PagedStep | None = native.value
        if self.compiled is None and self.path.value == "compiled":
            self.compiled = PagedStep(model)
        self.swapped: dict[Request, Saved] = {}
        self.observer: Callable[[list[Part], Tensor], None] | None = None  # gets every step's last hidden states

    @torch.inference_mode()
    def step(self, plan: Plan, sources: Mapping[Request, int] | None = None) -> Logits:
        """Of no request where nobody's next token follows.  sources: rows of the last step's draw (`gpu.drawn`) that are the last token of
        these requests, which the host does not know yet."""
        for request, blocks in plan.swapped_out:
            self.swapped[request] = self.pages.copy_out(blocks, request.computed, self.place_of.get(request))
        for request in plan.preempted:
            self.pages.table.forget(request)
        for request, blocks in plan.swapped_in:
            self.pages.copy_in(blocks, self.pages.table.row(request), self.swapped.pop(request))
            request.moved = 0  # other blocks than before
        nothing = Logits([], torch.empty(0))
        if not plan.parts:
            return nothing
        order, hidden, logits = self._hidden(plan.parts, sources)
        asked: list[Request] = []
        places: list[int] = []
        at = 0
        for part in order:
            at += part.count
            if part.samples:
                asked.append(part.request)
                places += range(at - 1 - part.request.drafts, at)
        if self.observer is not None:
            self.observer(order, hidden.to(self.dtype))
        self._score_prompts(order, hidden)
        if not asked:
            return nothing
        if logits is None or len(places) != len(hidden):
            logits = self._logits(hidden if len(places) == len(hidden) else hidden[to_device(torch.tensor(places), self.device)])
        return Logits(asked, logits)

    def _hidden(self, parts: Sequence[Part], sources: Mapping[Request, int] | None) -> tuple[list[Part], Tensor, Tensor | None]:
        """The parts in the order of their rows, and the last hidden states (N, D), with their logits where those were made along. Requests
        of an adapter run apart, in one pass for each adapter, through the model itself."""
        order: list[Part] = []
        states: list[Tensor] = []
        for adapter, own in self._apart(parts):
            groups = segments_of(own)
            mine = [part for group in groups for part in group]
            with applied(self.model, adapter):
                if self.gpu is not None:
                    known = None if sources is None else [sources.get(part.request, -1) for part in mine]
                    states.append(self.gpu.hidden(mine, adapter is None, known))
                    order += mine
                    continue
                compiled = adapter is None and self.compiled is not None and self.compiled.suits(mine)
                states.append(self._compiled(mine) if compiled else self._flat(groups))
            order += mine
        if len(states) > 1:
            return order, torch.cat(states), None
        return order, states[0], None if self.gpu is None else self.gpu.logits

    def _apart(self, parts: Sequence[Part]) -> Iterator[tuple[Adapter | None, list[Part]]]:
        """The parts of each adapter, and those without."""
        for adapter in dict.fromkeys(part.request.adapter for part in parts):
            yield adapter, [part for part in parts if part.request.adapter is adapter]

    def predictor(self, blocks: int, size: int, places: int) -> Predictor:
        """What makes the passes of the model's own prediction layer."""
        return Predictor(self.model, blocks, size, places)

    def _logits(self, hidden: Tensor) -> Tensor:
        """hidden (N, D) -> (N, V); with compiled kernels a buffer that the next call writes over."""
        compiled = self.compiled is not None and len(hidden) <= self.compiled.batch  # rows of adapters were computed without it
        return self.compiled.logits(hidden) if compiled else self.model.logits(hidden)  # type: ignore[union-attr]

    def _score_prompts(self, order: Sequence[Part], hidden: Tensor) -> None:
        """Log-probabilities of prompt tokens for those who ask, a few rows at a time: never prompt x vocabulary."""
        at = 0
        for part in order:
            r, first = part.request, at
            at += part.count
            if (most := r.params.prompt_logprobs) is None:
                continue
            known = len(r.prompt_logprobs)  # a prompt that was preempted is computed again
            for start in range(known, min(part.start + part.count, len(r.prompt) - 1), PROMPT_ROWS):
                stop = min(start + PROMPT_ROWS, part.start + part.count, len(r.prompt) - 1)
                logp = self._logits(hidden[first + start - part.start : first + stop - part.start]).float().log_softmax(-1)
                tokens = torch.tensor(r.prompt[start + 1 : stop + 1], device=self.device)
                r.prompt_logprobs += logp.gather(-1, tokens[:, None]).squeeze(-1).tolist()
                r.prompt_tops += best(logp, most)

    def _compiled(self, order: Sequence[Part]) -> Tensor:
        """The last hidden state (N, D) of all parts, by kernels that read the pages in place."""
        assert self.compiled is not None
        tokens = torch.tensor([t for p in order for t in p.request.tokens[p.start : p.start + p.count]])
        return self.compiled.hidden(tokens, PagedBatch(self.pages, order, self.model.spec.context))

    def _flat(self, groups: Sequence[Sequence[Part]]) -> Tensor:
        """The same through the model itself: the readable twin, for every kind of mixer."""
        tokens = torch.tensor([[t for group in groups for p in group for t in p.request.tokens[p.start : p.start + p.count]]],
                              device=self.device)
        ctx = self._context(groups)
        hidden = self.model.run(tokens, ctx)[0]
        for segment in ctx.segments or []:
            segment.ctx.cache.advance(0)  # type: ignore[union-attr]
        return hidden

    def _context(self, groups: Sequence[Sequence[Part]]) -> Context:
        flat = Context(torch.empty(0), self.dtype, segments=[])
        positions, at = [], 0
        for group in groups:
            count = group[0].count
            rows = Rows(self.pages, [p.request for p in group], count)
            shape = torch.empty(len(group), count, device=self.device)
            ctx = open_context(shape, self.dtype, cache=rows)  # type: ignore[arg-type]
            flat.segments.append(Segment(at, at + len(group) * count, len(group), ctx))  # type: ignore[union-attr]
            positions.append(ctx.positions.expand(len(group), count).flatten())
            at += len(group) * count
        flat.positions = torch.cat(positions)[None]
        return flat

    @property
    def place_of(self) -> dict[Request, int]:
        """Where the constant states of each request are, and the row of its slots."""
        return self.pages.table.row_of

    def forget(self, request: Request) -> None:
        """The request has left: its place is free, its swapped blocks are dropped."""
        self.swapped.pop(request, None)
        self.pages.table.forget(request)


def choose_path(model: Decoder, codes: CacheCodes, native: Choice) -> Choice:
    """How a step runs, with the reason. native: the C++ step, or why it is none."""
    if native.value is not None:
        return Choice("compiled", native.reason)
    why = unsuited(model)
    if why is None and codes.kept not in READABLE:
        why = f"a cache of {codes.name} has no compiled kernel"
    return Choice("flat", why) if why else Choice(
        "compiled", f"{choose_jit().reason}; attention reads {codes.name} where it lies; {native.reason}")


def segments_of(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts of one token together, every other part alone."""
    single = [part for part in parts if part.count == 1]
    return [*([single] if single else []), *([part] for part in parts if part.count > 1)]
