"""What one request asks of the sampler."""

from __future__ import annotations

from dataclasses import dataclass

from pellucid.errors import BadInput


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. Order: temperature, then top-k, then top-p, then min-p."""

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
    logprobs: bool = False
    """Also return the log-probability of every token, under the distribution it was drawn from before truncation."""
    ignore_eos: bool = False
    """Go on to max_tokens whatever is generated (for benchmarks)."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, (str, list)):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        rules = [
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "from 0 (greedy) to 100"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or None"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1], or None"),
            ("n", 1 <= self.n <= 4096, "from 1 to 4096"),
            ("stop", len(self.stop) <= 16 and all(self.stop), "at most 16 non-empty texts"),
        ]
        for name, fine, must in rules:
            if not fine:
                raise BadInput(f"{name} = {getattr(self, name)!r} is not possible", f"it must be {must}")
