"""Coefficients that follow a measurement: the KL penalty's and the entropy bonus'. Plain numbers, so a checkpoint holds them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pellucid.errors import BadInput


@dataclass
class KLController:
    """beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon) (Ziegler et al., arXiv 1909.08593, sec. 2.2).

    n: completions of the step. target=None: the coefficient stays as it is.
    """

    value: float
    target: float | None = None
    horizon: int = 10_000

    def __post_init__(self) -> None:
        if self.value < 0 or self.horizon <= 0 or (self.target is not None and self.target <= 0):
            raise BadInput("a KL controller needs a coefficient of at least 0, and a positive target and horizon")

    def update(self, kl: float, n: int) -> float:
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * n / self.horizon
        return self.value

    def state(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class EntropyController:
    """Skywork's adaptive entropy bonus (arXiv 2505.22312): hold the entropy above a target, never push it further up.

        c <- c + step if H <= target else c - step, within [low, high];    the bonus acts only while H <= target

    `coefficient` is what the next step uses; before anything was measured it is 0. target=None: a constant.
    """

    value: float
    target: float | None = None
    step: float = 0.005
    low: float = 0.0
    high: float = 1.0
    measured: float | None = None

    @property
    def coefficient(self) -> float:
        if self.target is None:
            return self.value
        return self.value if self.measured is not None and self.measured <= self.target else 0.0

    def update(self, entropy: float) -> float:
        """entropy: mean over the tokens of the step, nats."""
        if self.target is not None:
            change = self.step if entropy <= self.target else -self.step
            self.value = min(max(self.value + change, self.low), self.high)
            self.measured = entropy
        return self.coefficient

    def state(self) -> dict[str, Any]:
        return asdict(self)
