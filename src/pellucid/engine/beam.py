"""Beam search over the engine: of all continuations of a prompt's n prefixes, the n best that have not ended go on.

A round is one token: each beam is a request of the engine whose prompt is the prefix; what it needs are the most probable
next tokens. Beams share blocks through the prefix cache: a round computes the tokens behind a prefix's last full block.
Searches, and whatever else the engine runs, go on side by side. A beam whose logits are no numbers is given up, the others go on; a
search that has lost all of them ends with nothing `done`. The rules are transformers': an ended candidate counts if
it is among the n best of its round; scores are sums of log-probabilities over (length ** length_penalty); a search is done
when no open beam, scored at its present length, can beat the worst of n ended ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pellucid.engine.core import Engine
from pellucid.engine.params import MOST_LOGPROBS, SamplingParams
from pellucid.engine.request import Request
from pellucid.errors import BadInput


@dataclass
class Beam:
    """tokens: behind the prompt, with the end token.  logprob: their sum.  score: what ended beams are ranked by."""

    tokens: list[int]
    logprob: float = 0.0
    score: float = 0.0
    reason: str = ""  # "stop" | "length"


class Search:
    """One prompt's search; `requests` of a round, then `take` what they brought, until nothing is `open`."""

    def __init__(self, prompt: Sequence[int], beams: int, max_tokens: int, eos: Iterable[int] = (), length_penalty: float = 1.0,
                 early_stopping: bool = False, namespace: str = ""):
        self.eos = set(eos)
        self.candidates = max(2, 1 + len(self.eos)) * beams  # n of them cannot all have ended
        if beams < 1 or self.candidates > MOST_LOGPROBS or max_tokens < 1:
            raise BadInput(f"a search with {beams} beams for {max_tokens} tokens is not possible",
                           f"it needs {self.candidates} candidates a round; {MOST_LOGPROBS} can be asked for", "use fewer beams, and at least one token")
        self.prompt, self.beams, self.max_tokens = list(prompt), beams, max_tokens
        self.length_penalty, self.early_stopping, self.namespace = length_penalty, early_stopping, namespace
        self.open, self.done = [Beam([])], list[Beam]()
        self.params = SamplingParams(max_tokens=1, logprobs=self.candidates, ignore_eos=True)

    def requests(self) -> list[Request]:
        return [Request(self.prompt + beam.tokens, self.params, namespace=self.namespace) for beam in self.open]

    def take(self, answered: Sequence[Request]) -> None:
        """answered: the requests of this round, in order, each with its most probable tokens."""
        found = [(beam.logprob + logprob, i, token) for i, (beam, r) in enumerate(zip(self.open, answered, strict=True))
                 if not r.fault for token, logprob in r.tops[0]]
        found.sort(key=lambda f: -f[0])
        length, going = len(self.open[0].tokens) + 1, list[Beam]()
        for rank, (logprob, i, token) in enumerate(found[: self.candidates]):
            beam, ended = Beam([*self.open[i].tokens, token], logprob), token in self.eos
            if (ended or length == self.max_tokens) and rank < self.beams:
                beam.score, beam.reason = logprob / length**self.length_penalty, "stop" if ended else "length"
                self.done.append(beam)
            elif not ended and len(going) < self.beams:
                going.append(beam)
        self.done.sort(key=lambda beam: -beam.score)
        del self.done[self.beams :]
        self.open = [] if length == self.max_tokens or self._settled(going, length) else going

    def _settled(self, going: list[Beam], length: int) -> bool:
        if len(self.done) < self.beams:
            return False
        return self.early_stopping or not going or going[0].logprob / length**self.length_penalty <= self.done[-1].score


def run_searches(engine: Engine, searches: Sequence[Search]) -> None:
    """All of them together, until all are done; `done` holds what they found."""
    rounds: dict[Request, tuple[Search, list[Request]]] = {}

    def begin(search: Search) -> None:
        requests = search.requests()
        for r in requests:
            engine.add(r)
            rounds[r] = search, requests

    for search in searches:
        begin(search)
    while rounds:
        for r, _ in engine.step():
            if r not in rounds:
                continue  # somebody else's
            search, requests = rounds[r]
            if all(other.finish_reason for other in requests):
                for other in requests:
                    del rounds[other]
                search.take(requests)
                if search.open:
                    begin(search)
