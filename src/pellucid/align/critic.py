"""The critic of PPO: what the rest of an answer is worth, judged before each of its tokens.

A second model with one number for a head, as verl and trl's PPO have it: the policy's trunk would have to serve two losses
of different size. It starts as a copy of the policy whose head says 0, or from a trained reward model, and has an optimizer
of its own. The value of token t is read where t is predicted, so it knows the answer up to t - 1.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pellucid.align.aggregation import token_weights
from pellucid.align.reward_model import RewardModel
from pellucid.align.update import Update
from pellucid.align.value import value_loss
from pellucid.nn import Decoder, Routing
from pellucid.optim import OptimConfig, Schedule, build_optimizer
from pellucid.train import Stepper
from pellucid.train.loss import balance_share, routing_of
from pellucid.train.ranks import ALONE, Ranks

FILE = Path("critic") / "state.safetensors"


class Critic:
    """A `RewardModel` that is trained beside the policy."""

    def __init__(self, model: RewardModel, optim: OptimConfig, schedule: Schedule, clip: float | None = 1.0, ranks: Ranks = ALONE):
        self.model, self.ranks = model, ranks
        self.stepper = Stepper(model, build_optimizer(model, optim), schedule, clip, ranks)

    def read(self, update: Update, micro: slice, routing: Routing | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The values before the micro-batch's trained tokens, their completions, and their numbers in the experience."""
        hidden, _, whose, at = update.states(self.model, micro, routing)
        values = self.model.score(hidden).squeeze(-1)
        return values.to(torch.promote_types(values.dtype, torch.float32)), whose, at

    def values(self, update: Update, micro_rows: int) -> Tensor:
        """Of every trained token, (M,)."""

        def found(micro: slice) -> tuple[Tensor, ...]:
            values, _, at = self.read(update, micro)
            return values, at

        return update.measure(micro_rows, found, self.ranks)[0]

    def step(self, update: Update, micro_rows: int, progress: float, *, coefficient: float, clip: float | None) -> dict[str, Any]:
        """One optimizer step towards the experience's returns; the values, their targets and those of the rollout, (m,) each."""
        x, seen = update.experience, [(torch.zeros(0, device=update.experience.device),) * 3]
        assert x.returns is not None and x.values is not None
        returns, old = x.returns, x.values

        def share(micro: slice) -> Tensor:
            routing = routing_of(self.model)
            values, whose, at = self.read(update, micro, routing)
            seen.append((values.detach(), returns[at], old[at]))
            loss = value_loss(values, returns[at], old[at], clip)
            return coefficient * (loss * token_weights(whose, "token-mean", update.counts)).sum() + balance_share(routing, len(at) / max(update.counts.tokens, 1))

        result = self.stepper.step(update.micro(micro_rows, self.ranks), share, progress)
        return {"loss": result.loss, "grad_norm": result.grad_norm, "seen": [self.ranks.cat(torch.cat(parts)) for parts in zip(*seen)]}

    # --- stop and go on -----------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Weights and optimizer state, exactly."""
        names: dict[Tensor, str] = {p: n for n, p in self.model.named_parameters()}
        state = {f"optimizer/{k}": v.contiguous() for k, v in self.stepper.optimizer.state_tensors(names).items()}
        (folder / FILE).parent.mkdir()
        save_file(state | {f"weights/{n}": p.detach().contiguous() for n, p in self.model.named_parameters()}, folder / FILE)

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """The inverse of `write`. Errors: OSError or KeyError where the folder holds no critic, or another one."""
        tensors = load_file(folder / FILE)
        named: dict[str, Tensor] = dict(self.model.named_parameters())
        for name, p in named.items():
            p.copy_(tensors.pop(f"weights/{name}"))
        self.stepper.optimizer.load_state_tensors(named, {k.removeprefix("optimizer/"): v for k, v in tensors.items()})


def critic_of(policy: Decoder) -> RewardModel:
    """The policy's weights, copied, under a head of zeros."""
    model = RewardModel.of(copy.deepcopy(policy))
    with torch.no_grad():
        model.score.weight.zero_()
    return model

