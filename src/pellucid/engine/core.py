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
from pellucid.engine.ahead import Ahead
from pellucid.engine.config import ORDERS, EngineConfig, choose_room, codes_for, drafts_of, groups_for, make_cache
from pellucid.engine.drafting import DraftModel, PredictionHead, check_proposer
from pellucid.engine.layer_groups import windows_of
from pellucid.engine.native_step import NativeStep
from pellucid.engine.pace import Pace
from pellucid.engine.params import SamplingParams
from pellucid.engine.prefix_cache import held
from pellucid.engine.request import Request, State
from pellucid.engine.runner import Logits, Runner
from pellucid.engine.sampler import Sampler, best
from pellucid.engine.scheduler import Plan, Scheduler
from pellucid.engine.speculation import PromptLookup, Proposer, accepted
from pellucid.engine.stopping import StopTexts
from pellucid.engine.structured import Grammars
from pellucid.errors import BadInput
from pellucid.nn import Decoder
from pellucid.tokenizers import Tokenizer


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
        self.ahead = Ahead(self)
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
        if c.proposer == "mtp":  # whose passes are shared where the runner's are
            return PredictionHead(self.model, tokens, c.running, self.runner.predictor)
        return PromptLookup()

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
        self.ahead.note(request)
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
        plan, given, planning = self.ahead.step() if self.ahead.able else self._wait_for_step(start)
        for r, _ in given:
            for follower in self.held.pop(r, ()):
                self.scheduler.add(follower)
            if r in self.ended:
                self.scheduler.finish(r, self.ended.pop(r))
                self._forget(r)
        if not self.busy:
            self.ahead.rest()
        self._tell(plan, given, planning, time.perf_counter() - start, before)
        return given

    def _wait_for_step(self, start: float) -> tuple[Plan, list[tuple[Request, list[int]]], float]:
        """Plans, computes and draws, one after the other."""
        self._propose()
        plan = self.scheduler.plan()
        planning = time.perf_counter() - start
        logits = self.runner.step(plan)
        given = self._sample(logits) if logits else []
        if self.scheduler.pace:
            self.scheduler.pace.observe([(p.start, p.count) for p in plan.parts], time.perf_counter() - start)
        self.scheduler.done(plan)
        return plan, given, planning

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

    def _sample(self, logits: Logits) -> list[tuple[Request, list[int]]]:
        """Draws at every place that was computed, and keeps what stands (see engine/speculation.py)."""
        places = [(r, j) for r in logits for j in range(1 + r.drafts)]
        self.totals["proposals"] += sum(r.drafts > 0 for r in logits)
        self.totals["proposed_tokens"] += len(places) - len(logits)
        whole = logits.whole
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
            self.totals["accepted_tokens"] += max(0, len(tokens) - 1)
            for i in range(len(tokens) - 1):
                self.totals[accepted_at(i)] += 1
            given.append((r, tokens))
        self.adjuster.record(given)
        return given

    def _stand(self, r: Request, tokens: list[int]) -> list[int]:
        """The tokens go behind the request's, up to the one that ends it, or a place where there is none."""
        for i, token in enumerate(tokens):
            if token < 0:
                self.fail(r)
                return tokens[:i]
            r.tokens.append(token)
            if reason := self._ended(r, token):
                self.ended[r] = reason
                return tokens[: i + 1]
        return tokens

    def fail(self, r: Request) -> None:
        """Its logits are no numbers: it ends with this step, the others go on."""
        r.fault = "not_numbers"
        self.ended[r] = "error"

    def _draw(self, places: list[Place], logits: Tensor) -> tuple[list[int], list[float], list[list[tuple[int, float]]]]:
        """One token for each place, logits (N, V), -1 where they are no numbers; its log-probability and the most probable tokens
        where somebody asked."""
        plain, changed = logits, [i for i, (r, _) in enumerate(places) if self.adjuster.changes(r)]
        asked = [i for i in changed if places[i][0].params.top is not None]
        if changed:
            logits = logits.float()
            rows = torch.tensor(asked, dtype=torch.int64, device=logits.device)
            plain = logits[rows]  # a copy, as the model left them
            self.adjuster(logits, places)
        sampler = self._sampler([r for r, _ in places], logits.device)
        tokens, logprobs = sampler(logits, torch.tensor([r.generated + j for r, j in places], device=logits.device), check=False)
        if logprobs is None:
            return tokens.tolist(), [], []
        if asked:
            logprobs[rows] = sampler.scaled(plain, rows).log_softmax(-1).gather(-1, tokens[rows, None].clamp_min(0)).squeeze(-1)
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
            self.sampler.alone = isinstance(self.runner.compiled, NativeStep)
            self.sampled = requests
        assert self.sampler is not None
        return self.sampler

    def _forget(self, r: Request) -> None:
        self.runner.forget(r)
        self.ahead.forget(r)
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
                r.fault = "form_lost"
                return "error"
            if r.constraint.complete:
                return "stop"
        if p.stop and self.stop is not None and self.stop(r):
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


def accepted_at(place: int) -> str:
    """The name, among the engine's totals, of drafts accepted at this place (from 0) of a proposal."""
    return f"accepted_at_{place}"


def warm_up(model: Decoder) -> float:
    """Two tokens through a small engine: kernels of the model's shape are compiled (the first time on a machine), and the files'
    pages are read, before anybody waits for them. Returns the seconds."""
    began = time.perf_counter()
    engine = Engine(model, config=EngineConfig(running=1, cache_tokens=min(64, model.spec.limit)))
    engine.add(Request([0, 1], SamplingParams(max_tokens=2, temperature=0.0), 0))
    while engine.busy:
        engine.step()
    return time.perf_counter() - began
