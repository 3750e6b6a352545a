"""Which optimizer gets which parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pellucid.errors import BadInput
from pellucid.optim.muon import Muon


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and its step sizes."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the matrices inside the layers, AdamW for embedding, head, norms and biases; adamw: AdamW for all."""
    lr: float = 0.02
    """Learning rate of Muon (or of AdamW, when it takes all)."""
    adam_lr: float = 0.003
    """Learning rate of AdamW beside Muon."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices."""
    dtype: str = "float32"
    """Of Muon's matrix products; bfloat16 is enough for them, and faster where the machine computes in it."""


class Optimizers:
    """Several optimizers as one: step, zero_grad, a common factor on their learning rates, state in and out."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers
        self.base = [[g["lr"] for g in o.param_groups] for o in optimizers]

    def set_factor(self, factor: float) -> None:
        for optimizer, rates in zip(self.optimizers, self.base):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor

    @property
    def lr(self) -> float:
        return float(self.optimizers[0].param_groups[0]["lr"])

    def step(self) -> None:
        for o in self.optimizers:
            o.step()

    def zero_grad(self) -> None:
        for o in self.optimizers:
            o.zero_grad(set_to_none=True)

    def state_tensors(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """The state as flat named tensors: '<parameter>::<key>'. Numbers become 0-d tensors."""
        return {
            f"{names[p]}::{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for o in self.optimizers for p, state in o.state.items() for key, value in state.items()
        }

    def load_state_tensors(self, parameters: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
        """The inverse. Learning rates are not part of the state: the schedule sets them.

        Errors: BadInput for the state of another optimizer; KeyError for a parameter that is not trained here.
        """
        owner = {p: o for o in self.optimizers for g in o.param_groups for p in g["params"]}
        for full, value in tensors.items():
            name, key = full.split("::")
            p = parameters[name]
            if (key == "momentum") != isinstance(owner[p], Muon):
                raise BadInput(f"the saved state of {name} is that of another optimizer",
                               f"it holds {key}, which {type(owner[p]).__name__} does not know",
                               "resume with the optimizer of the interrupted run, or start again without --resume")
            owner[p].state[p][key] = value.to(p.device, copy=True)


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizers:
    """Splits the trainable parameters as `config.name` says."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    parts = {f"{n}.weight": m.parts for n, m in model.named_modules() if hasattr(m, "parts")}
    fused = next(iter(named.values())).device.type in ("cpu", "cuda")
    if config.name == "adamw":
        matrices = [p for n, p in named.items() if p.ndim >= 2 and not n.endswith("bias")]  # biases of experts are stacked
        vectors = [p for n, p in named.items() if p.ndim < 2 or n.endswith("bias")]
        groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
        return Optimizers([torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)])
    inner = [n for n, p in named.items() if n.startswith("layers.") and not n.endswith("bias")
             and (p.ndim == 2 or (p.ndim == 3 and n in parts))]  # three dimensions: the matrices of experts
    muon = Muon([dict(params=[named[n] for n in inner], parts=[parts.get(n, (named[n].shape[-2],)) for n in inner])],
                lr=config.lr, weight_decay=config.weight_decay, dtype=getattr(torch, config.dtype))
    rest = [p for n, p in named.items() if n not in set(inner)]
    adam = torch.optim.AdamW(rest, lr=config.adam_lr, betas=config.betas, weight_decay=0.0, fused=fused)
    return Optimizers([muon, adam])
