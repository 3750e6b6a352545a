"""Optimizers and schedules."""

from pellucid.optim.build import OptimConfig, Optimizers, build_optimizer
from pellucid.optim.muon import Muon, orthogonalize
from pellucid.optim.schedule import Schedule

__all__ = ["Muon", "OptimConfig", "Optimizers", "Schedule", "build_optimizer", "orthogonalize"]
