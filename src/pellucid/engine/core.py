"""The engine: scheduler, runner and sampler in one step. Token ids in, token ids out; text is the business of `LLM`.

    engine = Engine(model, eos=[2])
    engine.add(Request(prompt, SamplingParams(max_tokens=20)))
    while engine.busy:
        for request, tokens in engine.step(): ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid import events
from pellucid.engine.adjust import Adjuster, Place
from pellucid.engine.drafting import DraftModel, PredictionHead, check_proposer, is_stateful
from pellucid.engine.hash_chain import HashChain
from pellucid.engine.layer_groups import layer_groups, windows_of
from pellucid.engine.ordering import Planned
from pellucid.engine.pace import Pace
from pellucid.engine.params import SamplingParams
from pellucid.engine.planning import depth_first
from pellucid.engine.prefix_cache import NoReuse, PrefixCache, held
from pellucid.engine.radix_tree import RadixTree
from pellucid.engine.request import Request, State
from pellucid.engine.runner import Runner
from pellucid.engine.sampler import Sampler, best
from pellucid.engine.scheduler import Fair, Order, Plan, Scheduler, first_come, longest_hit
from pellucid.engine.speculation import PromptLookup, Proposer, accepted
from pellucid.engine.stopping import StopTexts
from pellucid.engine.structured import Grammars
from pellucid.errors import BadInput
from pellucid.nn import Decoder, DecoderSpec, prediction_spec
from pellucid.nn.count import cache_bytes
from pellucid.ops.cache_codes import CacheCodes, cache_codes
from pellucid.runtime import Choice, available_memory_bytes
from pellucid.tokenizers import Tokenizer

DRAFTS = 4
"""Tokens proposed at a time where nobody says how many."""
ORDERS: dict[str, Callable[[], Order]] = {"first-come": lambda: first_come, "longest-hit": lambda: longest_hit,
                                     "depth-first": lambda: depth_first, "planned": Planned, "fair": Fair}


@dataclass
class EngineStep(events.Event):
    """One step of the engine.  prompt, hit: tokens of the prompts admitted in it, and of those that the prefix cache held.
    planning, seconds: of the scheduler, and of the whole step.  proposed, accepted: drafts of speculative decoding."""

    kind = "engine_step"
    step: int
    tokens: int
    generated: int
    running: int
    waiting: int
    admitted: int
    prompt: int
    hit: int
    preempted: int
    available: int
    blocks: int
    planning: float
    seconds: float
    proposed: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs. Every field is an option of `pellucid serve`."""

    cache_tokens: int | None = None
    """Tokens that the cache has room for; by default what memory allows, at most 64 full contexts."""
    block: int = 16
    """Tokens of a block of the cache."""
    cache_dtype: str = "auto"
    """How the cache keeps numbers: auto (as the model computes), f32, bf16, fp8, int8 (the last two with a scale a token and head, see
    ops/cache_codes.py). States of linear attention stay as they are computed."""
    reuse_windows: bool = True
    """Layers that read a window of the last tokens give back what falls behind it (not with radix trees).
    `cache_tokens` counts tokens in every layer: of longer ones, more fit."""
    prefix: str = "chain"
    """Prefix cache: chain (hashes of blocks), radix (a tree, exact to the token), radix-cost (evicts what is cheapest to lose), none."""
    budget: int = 512
    """Tokens computed in a step."""
    chunk: int | None = None
    """Most prompt tokens of one request in a step; by default the budget."""
    running: int = 64
    """Requests that run at a time."""
    step_seconds: float | None = None
    """A step's time is kept under this by computing less of the prompts in it; those who are writing get a token in every step."""
    order: str = "first-come"
    """Who is admitted first: first-come, longest-hit (in the prefix cache), depth-first (through the tree of the waiting prompts' prefixes),
    planned (the next few so that the fewest tokens are computed, by dynamic programming), fair (the namespace served least)."""
    swap: bool = False
    """Preempted requests keep their cache in host memory instead of computing it again."""
    drafts: int | None = None
    """Tokens proposed at a time and checked in one pass (speculative decoding); 0: none. By default 4 where a draft model or `proposer`
    was asked for, else none."""
    proposer: str | None = None
    """Where proposals come from, if from no draft model: lookup (what followed the last tokens before; the default where only `drafts`
    are asked for), mtp (the model's own layer of multi-token prediction)."""
    speculate_up_to: int = 8
    """No proposals while more requests than this run: a fuller batch has better use for the budget."""


class Engine:
    """Continuous batching over a paged cache. Not thread-safe: one thread calls it.

    eos: tokens that end an answer.  tokenizer: for what speaks of text, stop texts and structured output; rows of the embedding that
    it has no token for are never drawn.  draft: a smaller model that proposes; same: as in `DraftModel`.  runner: what computes the
    steps (several processes have others, see engine/tensor_parallel.py).
    """

    def __init__(self, model: Decoder, eos: Sequence[int] = (), config: EngineConfig | None = None,
                 tokenizer: Tokenizer | None = None, proposer: Proposer | None = None, draft: Decoder | None = None, same: int | None = None,
                 runner: Callable[..., Runner] = Runner):
        c = config = config or EngineConfig()
        if c.order not in ORDERS:
            raise BadInput(f"order {c.order!r} is not known", next=f"use one of {', '.join(ORDERS)}")
        if c.step_seconds is not None and not c.step_seconds > 0:
            raise BadInput(f"a step of {c.step_seconds} seconds is not possible", next="give a time above 0, or none")
        self.model, self.eos, self.config, self.tokenizer = model, set(eos), config, tokenizer
        codes = codes_for(model, c)
        self.stop = None if tokenizer is None else StopTexts(tokenizer)
        self.grammars: Grammars | None = None  # made when the first structured output is asked for
        self.drafts = drafts_of(c, draft is not None or proposer is not None)
        if self.drafts:
            check_proposer(model.spec, c.proposer, None if draft is None else draft.spec, same)
        self.known = None if tokenizer is None or tokenizer.vocab_size >= model.spec.vocab else tokenizer.vocab_size
        self.room = choose_room(model, c, draft if self.drafts else None)
        self.groups = groups_for(model, c)
        size, several = 1 if c.prefix.startswith("radix") else c.block, len(self.groups.value)
        self.cache = make_cache(c.prefix, model, -(-self.room.value // size) * several, size, windows_of(self.groups.value))
        apart = {"groups": self.groups.value} if any(self.cache.windows) else {}
        self.runner = runner(model, self.cache.blocks, size, c.running, codes, **apart)
        self.scheduler = Scheduler(self.cache, budget=c.budget, places=c.running, chunk=c.chunk, context=model.spec.limit,
                                   order=ORDERS[c.order](), swap=c.swap, pace=Pace(c.step_seconds) if c.step_seconds else None)
        self.proposer = proposer or self._choose_proposer(c, draft, same)
        if isinstance(self.proposer, PredictionHead):
            self.runner.observer = self.proposer.observe
        self.adjuster = Adjuster(model.spec.vocab, self.eos, model.embed.weight.device)
        self.sampler: Sampler | None = None
        self.sampled: list[Request] = []  # whose settings the sampler holds
        self.held: dict[Request, list[Request]] = {}  # who waits until a request's prompt is in the cache
        self.ended: dict[Request, str] = {}  # of this step, why
        self.steps = 0
        self.totals = dict.fromkeys(("prompt_tokens", "hit_tokens", "generated_tokens", "computed_tokens", "preemptions",
                                     "proposals", "proposed_tokens", "accepted_tokens", *map(accepted_at, range(self.drafts))), 0)

    def _choose_proposer(self, c: EngineConfig, draft: Decoder | None, same: int | None) -> Proposer | None:
        if not self.drafts:
            return None
        tokens = self.room.value + self.cache.size + c.running * (self.drafts + 16)  # twins, with their drafts and half-filled blocks
        if draft is not None:
            return DraftModel(draft.eval(), self.model.spec, tokens, c.running, same)
        return PredictionHead(self.model, tokens, c.running) if c.proposer == "mtp" else PromptLookup()

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def check(self, request: Request) -> None:
        """BadInput where it could never run. May be called from any thread, before `add`."""
        self.scheduler.check(request)
        p, vocab = request.params, self.model.spec.vocab
        if wrong := [t for t in (*request.prompt, *(p.logit_bias or ()), *p.stop_token_ids) if not 0 <= t < vocab]:
            raise BadInput(f"{wrong[0]} is no token of this model", f"its ids go from 0 to {vocab - 1}", "use the model's own tokenizer")
        if p.stop and self.stop is None:
            raise BadInput("stop texts need a tokenizer", "this engine was made without one", "give stop_token_ids, or a tokenizer to the engine")
        if p.structured is not None and request.constraint is None:
            if self.grammars is None:
                if self.tokenizer is None:
                    raise BadInput("structured output needs a tokenizer", "this engine was made without one")
                self.grammars = Grammars(self.tokenizer, vocab, sorted(self.eos))
            request.constraint = self.grammars.constraint(p.structured, request.prompt)

    def add(self, request: Request, behind: Request | None = None) -> None:
        """BadInput where it could never run. behind: a request with the same prompt; this one starts when that one's is in the cache."""
        self.check(request)
        self.totals["prompt_tokens"] += len(request.prompt)
        if behind is not None and behind.generated == 0 and behind.state is not State.FINISHED:
            self.held.setdefault(behind, []).append(request)
        else:
            self.scheduler.add(request)

    def cancel(self, request: Request) -> None:
        """In whatever state it is; its blocks are free at once."""
        for followers in self.held.values():
            if request in followers:
                followers.remove(request)
        self.scheduler.finish(request, "cancelled")
        self._forget(request)

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, list[int]]]:
        """Computes one step; the requests that received tokens, with them. `finish_reason` says which of them are done."""
        start = time.perf_counter()
        before = self.totals["proposed_tokens"], self.totals["accepted_tokens"]
        self._propose()
        plan = self.scheduler.plan()
        planned = time.perf_counter()
        logits = self.runner.step(plan)
        given = self._sample(logits) if logits else []
        if self.scheduler.pace:
            self.scheduler.pace.observe([(p.start, p.count) for p in plan.parts], time.perf_counter() - start)
        self.scheduler.done(plan)
        for r, _ in given:
            for follower in self.held.pop(r, ()):
                self.scheduler.add(follower)
            if r in self.ended:
                self.scheduler.finish(r, self.ended.pop(r))
                self._forget(r)
        self._tell(plan, given, planned - start, time.perf_counter() - start, before)
        return given

    def _propose(self) -> None:
        """Drafts behind the requests that are one token behind; none while too many run for guesses to pay."""
        c = self.config
        ready = [r for r in self.scheduler.running if r.behind == 1 and not r.drafts]
        if self.proposer is None or not ready or len(self.scheduler.running) > c.speculate_up_to:
            return
        for r, drafts in zip(ready, self.proposer.propose(ready, self.drafts), strict=True):
            drafts = drafts[: max(0, r.params.max_tokens - r.generated - 1)]
            r.tokens += drafts
            r.drafts = len(drafts)

    def _sample(self, logits: dict[Request, Tensor]) -> list[tuple[Request, list[int]]]:
        """Draws at every place that was computed, and keeps what stands (see engine/speculation.py)."""
        places = [(r, j) for r in logits for j in range(1 + r.drafts)]
        self.totals["proposals"] += sum(r.drafts > 0 for r in logits)
        self.totals["proposed_tokens"] += len(places) - len(logits)
        whole = torch.cat(list(logits.values()))  # a copy
        if self.known is not None:  # rows of the embedding that only fill it up
            whole[:, self.known :] = -torch.inf
        drawn, logprobs, tops = self._draw(places, whole)
        given, at = [], 0
        for r in logits:
            drafts = r.tokens[len(r.tokens) - r.drafts :]
            del r.tokens[len(r.tokens) - r.drafts :]
            r.drafts = 0
            tokens = self._stand(r, accepted(drafts, drawn[at : at + 1 + len(drafts)]))
            if r.params.top is not None:
                r.logprobs += logprobs[at : at + len(tokens)]
                r.tops += tops[at : at + len(tokens)] if tops else [[]] * len(tokens)
            at += 1 + len(drafts)
            self.totals["accepted_tokens"] += len(tokens) - 1
            for i in range(len(tokens) - 1):
                self.totals[accepted_at(i)] += 1
            given.append((r, tokens))
        self.adjuster.record(given)
        return given

    def _stand(self, r: Request, tokens: list[int]) -> list[int]:
        """The tokens go behind the request's, up to the one that ends it."""
        for i, token in enumerate(tokens):
            r.tokens.append(token)
            if reason := self._ended(r, token):
                self.ended[r] = reason
                return tokens[: i + 1]
        return tokens

    def _draw(self, places: list[Place], logits: Tensor) -> tuple[list[int], list[float], list[list[tuple[int, float]]]]:
        """One token for each place, logits (N, V); its log-probability and the most probable tokens where somebody asked."""
        plain, changed = logits, [i for i, (r, _) in enumerate(places) if self.adjuster.changes(r)]
        asked = [i for i in changed if places[i][0].params.top is not None]
        if changed:
            logits = logits.float()
            rows = torch.tensor(asked, dtype=torch.int64, device=logits.device)
            plain = logits[rows]  # a copy, as the model left them
            self.adjuster(logits, places)
        sampler = self._sampler([r for r, _ in places], logits.device)
        tokens, logprobs = sampler(logits, torch.tensor([r.generated + j for r, j in places], device=logits.device))
        if logprobs is None:
            return tokens.tolist(), [], []
        if asked:
            logprobs[rows] = sampler.scaled(plain, rows).log_softmax(-1).gather(-1, tokens[rows, None]).squeeze(-1)
        return tokens.tolist(), logprobs.tolist(), self._tops(places, logits, plain, asked, sampler)

    def _tops(self, places: list[Place], logits: Tensor, plain: Tensor, asked: list[int], sampler: Sampler) -> list[list[tuple[int, float]]]:
        """The most probable tokens at each place. plain: rows `asked` of logits before they were changed."""
        tops: list[list[tuple[int, float]]] = [[] for _ in places]
        for most in {r.params.top for r, _ in places if r.params.top}:
            wanted = [i for i, (r, _) in enumerate(places) if r.params.top == most]
            for some, source in (([i for i in wanted if i not in asked], logits), ([i for i in wanted if i in asked], plain)):
                if some:
                    rows = torch.tensor(some, device=logits.device)
                    from_source = rows if source is logits else torch.tensor([asked.index(i) for i in some], device=logits.device)
                    found = best(sampler.scaled(source[from_source], rows).log_softmax(-1), most or 0)
                    for i, top in zip(some, found, strict=True):
                        tops[i] = top
        return tops

    def _sampler(self, requests: list[Request], device: torch.device) -> Sampler:
        """The last one, where the batch is the same."""
        if requests != self.sampled:  # by identity: requests do not compare
            self.sampler = Sampler([r.params for r in requests], [r.seed for r in requests], device)
            self.sampled = requests
        assert self.sampler is not None
        return self.sampler

    def _forget(self, r: Request) -> None:
        self.runner.forget(r)
        self.adjuster.forget(r)
        self.ended.pop(r, None)
        for follower in self.held.pop(r, ()):
            self.scheduler.add(follower)
        if self.proposer is not None:
            self.proposer.forget(r)

    def _ended(self, r: Request, token: int) -> str | None:
        p = r.params
        if token in p.stop_token_ids or (token in self.eos and not (p.ignore_eos and r.constraint is None)):
            return "stop"
        if r.constraint is not None:
            if not r.constraint.accept(token) or r.constraint.error:  # a form too complex for the library to follow
                return "error"
            if r.constraint.complete:
                return "stop"
        if p.stop and self.stop is not None and r.generated >= p.min_tokens and self.stop(r):
            return "stop"
        return "length" if r.generated >= p.max_tokens else None

    # --- what is shown ------------------------------------------------------------------------------------------------

    def _tell(self, plan: Plan, given: list[tuple[Request, list[int]]], planning: float, seconds: float,
              before: tuple[int, int]) -> None:
        self.steps += 1
        t = self.totals
        t["generated_tokens"] += sum(len(tokens) for _, tokens in given)
        t["computed_tokens"] += plan.tokens
        t["preemptions"] += len(plan.preempted)
        new = [r for r in plan.admitted if r.preemptions == 0]
        hit = sum(r.hit for r in new)
        t["hit_tokens"] += hit
        events.emit(EngineStep(
            self.steps, plan.tokens, sum(len(tokens) for _, tokens in given), len(self.scheduler.running), len(self.scheduler.waiting),
            len(plan.admitted), sum(len(r.prompt) for r in new), hit, len(plan.preempted), self.cache.available(), self.cache.blocks, planning, seconds,
            t["proposed_tokens"] - before[0], t["accepted_tokens"] - before[1]))

    def snapshot(self) -> dict[str, Any]:
        """The engine's real state, as plain data: queue, running requests with their block tables, totals."""
        def row(r: Request) -> dict[str, Any]:
            return {"number": r.number, "state": r.state.value, "prompt": len(r.prompt), "computed": r.computed, "known": len(r.tokens),
                    "hit": r.hit, "preemptions": r.preemptions, "priority": r.priority, "namespace": r.namespace, "blocks": held(r.tables)}
        return {"running": [row(r) for r in self.scheduler.running], "waiting": [row(r) for r in self.scheduler.waiting],
                "available": self.cache.available(), "blocks": self.cache.blocks, "block": self.cache.size, "totals": dict(self.totals),
                "groups": [list(group.layers) for group in self.groups.value], "groups_reason": self.groups.reason,
                "cache_dtype": self.runner.pages.codes.name, "path": self.runner.path.value, "path_reason": self.runner.path.reason}


def make_cache(kind: str, model: Decoder, blocks: int, size: int, windows: tuple[int | None, ...] = (None,)) -> PrefixCache:
    """What a model of constant states (linear attention) leaves cannot be found block by block: it gets no reuse."""
    if is_stateful(model.spec) or kind == "none":
        return NoReuse(blocks, size, windows)
    if kind == "chain":
        return HashChain(blocks, size, windows=windows)
    if kind in ("radix", "radix-cost"):
        return RadixTree(blocks, size, "cost" if kind == "radix-cost" else "lru")
    raise BadInput(f"prefix cache {kind!r} is not known", next="use one of chain, radix, radix-cost, none")


def drafts_of(config: EngineConfig, asked: bool = False) -> int:
    """Tokens proposed at a time.  asked: a proposer was given beside the config."""
    if config.drafts is not None:
        return config.drafts
    return DRAFTS if asked or config.proposer else 0


def accepted_at(place: int) -> str:
    """The name, among the engine's totals, of drafts accepted at this place (from 0) of a proposal."""
    return f"accepted_at_{place}"


def codes_for(model: Decoder, config: EngineConfig) -> CacheCodes:
    return cache_codes(config.cache_dtype, model.compute_dtype or model.embed.weight.dtype)


def groups_for(model: Decoder, config: EngineConfig) -> Choice:
    """A radix tree keeps whole paths: it has one table for all layers."""
    return layer_groups(model.spec, config.reuse_windows and not config.prefix.startswith("radix"))


def choose_room(model: Decoder, config: EngineConfig, draft: Decoder | None = None) -> Choice:
    """Tokens of cache, with the reason: what was asked, or half of the free memory, or 64 full contexts. A draft model's cache, or the
    prediction layer's, holds as many."""
    if config.cache_tokens is not None:
        if config.cache_tokens < 1:
            raise BadInput(f"a cache of {config.cache_tokens} tokens is not possible", next="give --cache-tokens 4096 or so")
        return Choice(config.cache_tokens, "as asked")
    token = sum(cache_bytes(layer.mixer, codes_for(model, config)) for layer in model.spec.layers)
    if draft is not None:
        token += cached_bytes(draft)
    elif config.proposer == "mtp" and drafts_of(config):
        token += cached_bytes(model, prediction_spec(model.spec, 1))
    token = max(1, token)
    groups, context = groups_for(model, config).value, model.spec.context
    each = -(-sum(context if g.window is None else min(context, g.window + config.budget + 2 * config.block) for g in groups) // len(groups))
    most = config.running * each
    free = torch.cuda.mem_get_info()[0] if model.embed.weight.is_cuda else available_memory_bytes()
    if free is None or free // 2 // token >= most:
        return Choice(most, f"{config.running} full contexts of {model.spec.context} tokens, {most * token / 2**20:.0f} MiB")
    return Choice(max(config.block, free // 2 // token), f"half of the free memory, {free / 2**31:.1f} GiB, at {token} bytes a token")


def cached_bytes(model: Decoder, spec: DecoderSpec | None = None) -> int:
    """Of a token, in a proposer's cache: of a draft model, or of a part of the model. Those keep numbers as they are computed."""
    dtype = model.compute_dtype or model.embed.weight.dtype
    return sum(cache_bytes(layer.mixer, cache_codes("auto", dtype)) for layer in (spec or model.spec).layers)


def warm_up(model: Decoder) -> float:
    """Two tokens through a small engine: kernels of the model's shape are compiled (the first time on a machine), and the files'
    pages are read, before anybody waits for them. Returns the seconds."""
    began = time.perf_counter()
    engine = Engine(model, config=EngineConfig(running=1, cache_tokens=min(64, model.spec.limit)))
    engine.add(Request([0, 1], SamplingParams(max_tokens=2, temperature=0.0), 0))
    while engine.busy:
        engine.step()
    return time.perf_counter() - began


__all__ = ["Engine", "EngineConfig", "State", "is_stateful", "warm_up"]
