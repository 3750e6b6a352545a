"""Proposers that are models: a smaller one (arXiv 2211.17192), or the model's own head for the token after the next.

Both keep a cache of their own, in which a request has a twin: as far as its tokens agree with the request's, what the cache
holds stays; what was only proposed and then refused is written over. A proposer draws with the request's own settings and
with the numbers that the engine will draw with (engine/speculation.py), so that greedy proposals are its best guesses and
sampled ones fall where the engine's will, as far as the distributions agree.
Legend: D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pellucid.engine.predictor import Predictor
from pellucid.engine.prefix_cache import NoReuse
from pellucid.engine.request import Request
from pellucid.engine.runner import Runner
from pellucid.engine.sampler import Sampler
from pellucid.engine.scheduler import Part, Plan
from pellucid.errors import BadInput
from pellucid.nn import Decoder, DecoderSpec
from pellucid.nn.count import count

BLOCK = 16
CATCH_UP = 512
"""Tokens of a request that a proposer reads in a step: a long prompt is read over several, without proposals."""


def is_stateful(spec: DecoderSpec) -> bool:
    """Whether a layer keeps a state that is not a list of tokens' entries."""
    return any(count(layer.mixer, spec.dim).state for layer in spec.layers)


def check_proposer(spec: DecoderSpec, proposer: str | None, draft: DecoderSpec | None = None, same: int | None = None) -> None:
    """BadInput where a model of `spec` cannot be helped so: by what `EngineConfig.proposer` names, or by a draft model. Specs are
    enough: nothing needs to be loaded.  same: ids below it mean the same to both; None: nothing is known but their number."""
    if draft is not None and same is None and draft.vocab != spec.vocab:
        raise BadInput(f"the draft model has {draft.vocab} tokens, the model {spec.vocab}", "a proposal is a token of both",
                       "use two models of one family")
    if draft is not None and proposer is not None:
        raise BadInput(f"both a draft model and the proposer {proposer!r} were asked for", "one of them proposes", "leave one of them out")
    if proposer not in (None, "lookup", "mtp"):
        raise BadInput(f"proposer {proposer!r} is not known", next="use lookup or mtp")
    if proposer == "mtp" and not spec.mtp:
        raise BadInput("this model has no layers of multi-token prediction", next="use the proposer lookup, or a draft model")
    if is_stateful(spec):
        raise BadInput("speculative decoding needs a cache that can forget its last tokens",
                       "this model's linear attention keeps one state, which a refused token has changed", "leave --drafts at 0")
    if draft is not None and is_stateful(draft):
        raise BadInput("a model with linear attention cannot be the draft model", "its state cannot forget a refused token", "use another one")


def drawn(requests: Sequence[Request], logits: Tensor, ahead: int) -> list[int]:
    """logits (len(requests), V) of the places `ahead` behind the requests' tokens. -1 where they are no numbers."""
    sampler = Sampler([r.params for r in requests], [r.seed for r in requests], logits.device)
    return sampler(logits, torch.tensor([r.generated + ahead for r in requests], device=logits.device), check=False)[0].tolist()


class DraftModel:
    """A smaller model with the same vocabulary proposes.  tokens: of its cache; a request that finds no room gets no proposals.
    same: ids below it mean the same to both models, whose tables may be of different lengths; see `check_proposer`."""

    def __init__(self, model: Decoder, spec: DecoderSpec, tokens: int = 65536, places: int = 64, same: int | None = None):
        check_proposer(spec, None, model.spec, same)
        self.model, self.places = model, places
        self.same = min(n for n in (same, model.spec.vocab, spec.vocab) if n)
        self.pool = NoReuse(-(-tokens // BLOCK), BLOCK)
        self.runner = Runner(model, self.pool.blocks, BLOCK, places)
        self.twins: dict[Request, Request] = {}
        self.known: dict[Request, int] = {}  # tokens of the request that its twin had been told

    def propose(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        twins = {r: self._follow(r) for r in requests}
        drafts: dict[Request, list[int]] = {r: [] for r in requests}
        going = list(requests)
        for ahead in range(most):
            parts = {r: part for r in going if (part := self._part(twins[r])) is not None}
            if not parts:
                break
            logits = self.runner.step(Plan(list(parts.values())))
            going = [r for r in parts if twins[r] in logits]
            for part in parts.values():
                part.request.computed += part.count
            if not going:
                break  # all of them are still reading
            rows = torch.cat([logits[twins[r]][:, : self.same] for r in going])
            told = [(r, token) for r, token in zip(going, drawn(going, rows, ahead), strict=True) if token >= 0]
            going = [r for r, _ in told]
            for r, token in told:
                drafts[r].append(token)
                twins[r].tokens.append(token)
        return [drafts[r] for r in requests]

    def _follow(self, r: Request) -> Request:
        """The twin, told what the request has become."""
        if r not in self.twins:
            self.twins[r], self.known[r] = Request(self._told(r.prompt), r.params, r.seed), len(r.prompt)
        twin, known = self.twins[r], self.known[r]
        same = known
        while same < min(len(twin.tokens), len(r.tokens)) and twin.tokens[same] == r.tokens[same]:
            same += 1
        twin.tokens[same:] = self._told(r.tokens[same:])
        twin.computed = min(twin.computed, same, len(r.tokens) - 1)
        self.known[r] = len(r.tokens)
        return twin

    def _told(self, tokens: list[int]) -> list[int]:
        """A prompt may hold ids that only the model has."""
        return [t if t < self.same else 0 for t in tokens]

    def _part(self, twin: Request) -> Part | None:
        part = min(twin.behind, CATCH_UP)
        wanted = -(-(twin.computed + part) // BLOCK) - len(twin.blocks)
        if wanted > self.pool.available() or len(twin.tokens) >= self.model.spec.limit:
            return None
        twin.blocks += self.pool.allocate(max(0, wanted))
        return Part(twin, twin.computed, part)

    def forget(self, request: Request) -> None:
        if request in self.twins:
            twin = self.twins.pop(request)
            del self.known[request]
            self.pool.release(twin.blocks)
            self.runner.forget(twin)


@dataclass(eq=False)
class Trail:
    """What the head has of a request. Its place i (from `base`) joins the model's state there and the token behind it.

    twin.computed: places in the head's cache that stand.  states: (n, D) of the places behind those.
    """

    twin: Request
    base: int
    states: list[Tensor] = field(default_factory=list)
    waiting: int = 0  # rows of `states`


class PredictionHead:
    """The model's first layer of multi-token prediction proposes (nn/mtp.py); for tokens further ahead it reads its own states.

    It needs the model's last hidden states (`observe`). Where a prefix came from the cache there are none: then the head
    reads what follows. `tokens`: of its cache.  make: what runs it, of blocks, their size, and places.
    """

    def __init__(self, model: Decoder, tokens: int, places: int, make: Callable[[int, int, int], Predictor] | None = None):
        check_proposer(model.spec, "mtp")
        self.pool = NoReuse(-(-tokens // BLOCK), BLOCK)
        self.predictor = (make or partial(Predictor, model))(self.pool.blocks, BLOCK, places)
        self.trails: dict[Request, Trail] = {}

    def observe(self, parts: Sequence[Part], hidden: Tensor) -> None:
        """hidden (N, D): of the parts' tokens, in order. Kept until the next proposal, CATCH_UP places a request."""
        at = 0
        for part in parts:
            states, at = hidden[at : at + part.count], at + part.count
            trail = self.trails.get(part.request)
            if trail is not None:
                self._keep(trail, part.start - trail.base)
            if trail is None or trail.base + trail.twin.computed + trail.waiting != part.start or trail.waiting + part.count > CATCH_UP:
                self.forget(part.request)
                trail = self.trails[part.request] = Trail(Request(part.request.prompt, part.request.params), part.start)
            trail.states.append(states.clone())
            trail.waiting += part.count

    def propose(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        drafts: dict[Request, list[int]] = {r: [] for r in requests}
        going = [r for r in requests if r in self.trails and self._ready(r)]
        states: dict[Request, Tensor] = {}
        for r in going:
            trail = self.trails[r]
            states[r] = torch.cat(trail.states)
            trail.states, trail.waiting = [], 0
        stands = {r: self.trails[r].twin.computed + len(states[r]) for r in going}
        tokens = {r: r.tokens[len(r.tokens) - len(states[r]) :] for r in going}
        for ahead in range(most):
            going = [r for r in going if self._room(self.trails[r].twin, len(tokens[r]))]
            if not going:
                break
            for group in [[r for r in going if len(tokens[r]) == 1], *([r] for r in going if len(tokens[r]) > 1)]:
                self._run(group, tokens, states)
            logits = self.predictor.logits(torch.cat([states[r] for r in going]))
            told = [(r, token) for r, token in zip(going, drawn(going, logits, ahead), strict=True) if token >= 0]
            going = [r for r, _ in told]
            for r, token in told:
                drafts[r].append(token)
                tokens[r] = [token]
        for r, length in stands.items():
            self.trails[r].twin.computed = min(length, self.trails[r].twin.computed)
        return [drafts[r] for r in requests]

    def _run(self, group: list[Request], tokens: dict[Request, list[int]], states: dict[Request, Tensor]) -> None:
        """One pass of the head for requests with as many tokens each; `states` becomes that of the last place, (1, D)."""
        if not group:
            return
        twins, n = [self.trails[r].twin for r in group], len(tokens[group[0]])
        made = self.predictor.run(twins, [tokens[r] for r in group], torch.stack([states[r] for r in group]))
        for r, twin, state in zip(group, twins, made, strict=True):
            states[r] = state[-1:]
            twin.computed += n

    def _ready(self, r: Request) -> bool:
        """Whether the states reach the place before the last token; what was computed behind it, for refused tokens, goes."""
        trail = self.trails[r]
        self._keep(trail, len(r.tokens) - 1 - trail.base)
        return trail.waiting > 0 and trail.base + trail.twin.computed + trail.waiting == len(r.tokens) - 1

    @staticmethod
    def _keep(trail: Trail, places: int) -> None:
        """Only so many places stand."""
        extra = trail.twin.computed + trail.waiting - places
        if extra > 0 and trail.waiting:
            states = torch.cat(trail.states)[: max(0, trail.waiting - extra)]
            trail.states, trail.waiting = [states], len(states)
        trail.twin.computed = max(0, min(trail.twin.computed, places))

    def _room(self, twin: Request, more: int) -> bool:
        wanted = -(-(twin.computed + more) // BLOCK) - len(twin.blocks)
        if wanted > self.pool.available():
            return False
        twin.blocks += self.pool.allocate(max(0, wanted))
        return True

    def forget(self, request: Request) -> None:
        if request in self.trails:
            twin = self.trails.pop(request).twin
            self.pool.release(twin.blocks)
            self.predictor.forget(twin)
