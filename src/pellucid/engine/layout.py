"""How a model is spread over processes of this machine, and whether it can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pellucid.errors import BadInput
from pellucid.nn import DecoderSpec
from pellucid.parallel import check_split

MOST = 64


@dataclass(frozen=True)
class Layout:
    """tp: processes that share every layer of one engine (tensor parallelism; experts whole).  dp: engines beside each other, each
    with all weights and requests of its own.  dp_attention: processes with requests and cache of their own that share feed-forwards
    and experts; with tp groups of so many processes, which share their attention.  disaggregate: one process computes prompts, another goes
    on with the answers."""

    tp: int = 1
    dp: int = 1
    dp_attention: int = 1
    disaggregate: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "dp_attention"):
            if not 1 <= getattr(self, name) <= MOST:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)} is not possible", f"it must be from 1 to {MOST}")
        if (self.dp > 1) + (self.dp_attention > 1) + self.disaggregate > 1 or (self.disaggregate and self.tp > 1):
            raise BadInput("these ways of using several processes do not go together", "--tp can be combined with --dp or --dp-attention",
                           "give --tp with one of them, or --disaggregate")

    @property
    def processes(self) -> int:
        return 2 if self.disaggregate else self.tp * self.dp * self.dp_attention

    @property
    def kind(self) -> str:
        return "disaggregated" if self.disaggregate else "attention" if self.dp_attention > 1 else "tensor" if self.tp > 1 else "replicas"

    @property
    def leads(self) -> list[int]:
        """The processes that have an engine."""
        return list(range(0, self.processes, self.tp))

    @property
    def entries(self) -> list[int]:
        """Those of them that requests are given to."""
        return [0] if self.disaggregate else self.leads

    @property
    def proposing(self) -> list[int]:
        """Those of them whose requests get drafts: they have gone beyond their first token."""
        return [1] if self.disaggregate else self.leads

    @property
    def links(self) -> list[tuple[int, int]]:
        """Processes that speak with each other."""
        if self.disaggregate:
            return [(0, 1)]
        return [(lead, lead + i) for lead in self.leads for i in range(1, self.tp)]

    @property
    def together(self) -> bool:
        """Whether all engines step at the same time."""
        return self.dp_attention > 1

    def check(self, spec: Any) -> None:
        """BadInput where a model cannot be spread so."""
        if not isinstance(spec, DecoderSpec):
            raise BadInput("only decoders are served by several processes", next="use one process for this model")
        check_split(spec, *self.sharing)

    @property
    def sharing(self) -> tuple[int, int | None]:
        """Processes that a model's weights are cut over, and those that its mixers are, where they are fewer."""
        return (self.tp * self.dp_attention, self.tp) if self.together else (self.tp, None)
