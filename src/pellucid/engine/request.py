"""A request on its way through the engine: two counters, and what it holds.

`len(tokens)` is how far it is known, `computed` how far the cache holds it. Each step hands out tokens so that the second
catches up with the first, and everything is a value of the difference: decoding is 1, a prompt is its length, a chunk is
what a step's budget leaves of it, a hit in the prefix cache starts `computed` further on, preemption sets it back to 0,
drafts of speculative decoding lengthen `tokens` for a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from pellucid.engine.params import SamplingParams

if TYPE_CHECKING:
    from pellucid.engine.adapters import Adapter
    from pellucid.engine.structured import Constraint


UNMOVED = 2**62
GONE = -1
"""In a table of blocks: one that was given back."""


class State(Enum):
    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"
    SWAPPED = "swapped"  # its blocks' content lies in host memory
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """tokens: the prompt, then what was generated, then drafts.  tables: for each group of layers (engine/layer_groups.py; mostly there
    is one) the blocks of the cache, in order; they hold at least `computed` tokens. GONE: behind the group's window.

    namespace: requests share cached prefixes only within one (a tenant, an adapter).  priority: smaller is served first.
    adapter: low-rank changes of the weights that it runs with; its namespace must be of this adapter alone.
    """

    prompt: list[int]
    params: SamplingParams
    seed: int = 0
    namespace: str = ""
    priority: int = 0
    adapter: Adapter | None = None
    number: int = 0  # of arrival
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    drafts: int = 0  # how many of the last tokens are only proposed
    tables: list[list[int]] = field(default_factory=lambda: [[]])
    moved: int = UNMOVED  # the first place in the tables where another block stands since the runner looked
    published: int = 0  # full blocks that the prefix cache was told of
    keys: list[bytes] = field(default_factory=list)  # of full blocks, for the chain of hashes
    state: State = State.WAITING
    finish_reason: str | None = None  # "stop" | "length" | "cancelled" | "error"
    fault: str = ""  # of an "error": "not_numbers" (its logits), "form_lost" (too complex to follow) | "refused" (by another process)
    hit: int = 0  # tokens that the prefix cache gave at first admission
    preemptions: int = 0
    logprobs: list[float] = field(default_factory=list)  # of the output's tokens, where asked for
    tops: list[list[tuple[int, float]]] = field(default_factory=list)  # at each place of the output the most probable tokens
    prompt_logprobs: list[float] = field(default_factory=list)  # of the prompt's tokens behind the first
    prompt_tops: list[list[tuple[int, float]]] = field(default_factory=list)
    constraint: Constraint | None = None  # what is left of the form that the answer must have

    def __post_init__(self) -> None:
        self.tokens = self.tokens or list(self.prompt)

    @property
    def blocks(self) -> list[int]:
        """The first group's: all there are where the layers are alike."""
        return self.tables[0]

    @blocks.setter
    def blocks(self, blocks: list[int]) -> None:
        self.tables[0] = blocks

    @property
    def output(self) -> list[int]:
        """What was generated, without drafts."""
        return self.tokens[len(self.prompt) : len(self.tokens) - self.drafts]

    @property
    def generated(self) -> int:
        """How many tokens `output` holds."""
        return len(self.tokens) - self.drafts - len(self.prompt)

    @property
    def reusable(self) -> int:
        """How many of its tokens may come from the prefix cache: where log-probabilities of the prompt are asked for, none whose
        successor's is not known yet."""
        return len(self.tokens) if self.params.prompt_logprobs is None or len(self.prompt_logprobs) == len(self.prompt) - 1 else len(self.prompt_logprobs)

    @property
    def behind(self) -> int:
        """Tokens that are known and not yet computed."""
        return len(self.tokens) - self.computed

    @property
    def writing(self) -> bool:
        """Its tokens are computed up to the last one (drafts apart): a step gives it its next."""
        return self.behind - self.drafts <= 1

    @property
    def limit(self) -> int:
        """Tokens that it may come to hold."""
        return len(self.prompt) + self.params.max_tokens
