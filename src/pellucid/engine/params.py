"""What one request asks of the sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pellucid.errors import BadInput

MOST_LOGPROBS = 100
"""Alternatives that can be asked for at each place."""


@dataclass(frozen=True)
class StructuredOutput:
    """The form that an answer must have: exactly one of the five. Needs the extra `structured` (see engine/structured.py)."""

    json_schema: Mapping[str, Any] | bool | str | None = None
    """JSON that satisfies this JSON Schema (as an object, or its text)."""
    regex: str | None = None
    """Text that matches this regular expression from beginning to end."""
    grammar: str | None = None
    """Text of this grammar: Lark's EBNF, or llama.cpp's GBNF (`root ::= ...`)."""
    choice: tuple[str, ...] = ()
    """One of these texts, word for word."""
    json_object: bool = False
    """Any JSON object."""
    thinking: bool = False
    """The answer may begin with a thought, or the prompt has opened one: the form holds for what comes behind it."""

    def __post_init__(self) -> None:
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        given = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        given += [name for name in ("choice", "json_object") if getattr(self, name)]
        if len(given) != 1:
            raise BadInput(f"a structured output with {', '.join(given) or 'nothing'} is not possible",
                           next="give exactly one of json_schema, regex, grammar, choice, json_object")
        if not all(isinstance(text, str) and text for text in self.choice):
            raise BadInput("choice of a structured output must be non-empty texts")


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. Order, as in transformers and vLLM: logit_bias, repetition_penalty, frequency and
    presence penalties, what must not come yet or at all (min_tokens, structured), temperature, top-k, top-p, min-p, typical-p."""

    max_tokens: int = 256
    """Most tokens to generate."""
    temperature: float = 0.0
    """0 is greedy; logits are divided by it otherwise."""
    top_k: int | None = None
    """Keep the k most probable tokens."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probabilities reach p (nucleus sampling, arXiv 1904.09751)."""
    min_p: float | None = None
    """Keep tokens with at least this share of the top token's probability (arXiv 2407.01082)."""
    seed: int | None = None
    """A request with a seed gives the same tokens whatever else is in the batch."""
    n: int = 1
    """Samples for each prompt; sample j uses seed + j."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    logprobs: bool | int = False
    """True: also return the log-probability of every token. A number: those of this many most probable tokens beside it (0: of none).
    They are the model's at the request's temperature (greedy: at 1), before penalties, bias, truncation and constraints."""
    ignore_eos: bool = False
    """Go on to max_tokens whatever is generated (for benchmarks)."""
    typical_p: float | None = None
    """Keep the tokens whose surprise is closest to the expected one, up to probability p (locally typical sampling, arXiv 2202.00666)."""
    repetition_penalty: float = 1.0
    """Logits of tokens that stand in prompt or answer: divided by it where positive, else multiplied (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Taken once from the logit of every token that the answer holds."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for every time that the answer holds it."""
    logit_bias: Mapping[int, float] | None = None
    """token -> what is added to its logit."""
    min_tokens: int = 0
    """No end token, stop token or stop text before so many tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end the answer; like the end token they are kept among the ids and not in the text."""
    best_of: int | None = None
    """Samples that are drawn, of which the `n` with the highest log-probability per token are returned."""
    prompt_logprobs: int | None = None
    """Also return the log-probability of every prompt token behind the first, and of this many most probable ones at its place."""
    structured: StructuredOutput | None = None
    """The form that the answer must have."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, (str, list)):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if isinstance(self.stop_token_ids, list):
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        bias = self.logit_bias or {}
        rules = [
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "from 0 (greedy) to 100"),
            ("top_k", self.top_k is None or 1 <= self.top_k < 2**31, "at least 1 (and below 2^31), or None"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or None"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1], or None"),
            ("typical_p", self.typical_p is None or 0 < self.typical_p <= 1, "in (0, 1], or None"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("logit_bias", len(bias) <= 1024 and all(isinstance(t, int) and t >= 0 and math.isfinite(b) for t, b in bias.items()),
             "at most 1024 pairs of a token's id and a finite number"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "from 0 to max_tokens"),
            ("stop_token_ids", len(self.stop_token_ids) <= 1024 and all(isinstance(t, int) and t >= 0 for t in self.stop_token_ids),
             "at most 1024 token ids"),
            ("n", 1 <= self.n <= 4096, "from 1 to 4096"),
            ("best_of", self.best_of is None or self.n <= self.best_of <= 4096, "from n to 4096, or None"),
            ("stop", len(self.stop) <= 16 and all(self.stop), "at most 16 non-empty texts"),
            ("logprobs", 0 <= self.logprobs <= MOST_LOGPROBS, f"True, False, or from 0 to {MOST_LOGPROBS}"),
            ("prompt_logprobs", self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MOST_LOGPROBS, f"from 0 to {MOST_LOGPROBS}, or None"),
        ]
        for name, fine, must in rules:
            if not fine:
                raise BadInput(f"{name} = {getattr(self, name)!r} is not possible", f"it must be {must}")

    @property
    def top(self) -> int | None:
        """Alternatives asked for at each place of the answer; None: not even the log-probability of the token itself."""
        return None if self.logprobs is False else 0 if self.logprobs is True else self.logprobs

    @property
    def samples(self) -> int:
        """How many are drawn."""
        return self.best_of or self.n

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
