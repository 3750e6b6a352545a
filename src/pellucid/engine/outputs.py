"""What comes back from a model: a finished answer, or a piece of one that is being written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Completion:
    """One sample: `token_ids` hold the end token where one was generated, `text` does not show it."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str
    top_logprobs: list[list[tuple[int, float]]] | None = None
    score: float | None = None  # of a beam search: the sum of the log-probabilities over length ** length_penalty


@dataclass
class RequestOutput:
    """prompt_logprobs: of the prompt's tokens behind the first; prompt_top_logprobs: the most probable ones in their places."""

    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[float] | None = None
    prompt_top_logprobs: list[list[tuple[int, float]]] | None = None


@dataclass
class Chunk:
    """A piece of a streamed answer: whole characters only. The last piece carries `finish_reason`."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
